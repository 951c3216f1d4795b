"""Keep your own training loop, and ask for a hypergradient where you need one; it says how far to trust it."""

import torch
from torch.nn import functional as F

import bilevel

generator = torch.Generator().manual_seed(0)
inputs, truth = torch.randn(80, 10, generator=generator), torch.randn(10, generator=generator)
targets = inputs @ truth + 2.0 * torch.randn(80, generator=generator)
train, validation = (inputs[:40], targets[:40]), (inputs[40:], targets[40:])

problem = bilevel.Problem(
    upper=lambda x, y, batch: F.mse_loss(batch[0] @ y, batch[1]),
    lower=lambda x, y, batch: F.mse_loss(batch[0] @ y, batch[1]),
    regularizer=bilevel.L2(weight=lambda x: x["log_decay"].exp()),
    upper_data=bilevel.Full(validation),
    lower_data=bilevel.Full(train),
)

log_decay = torch.tensor(-3.0, requires_grad=True)
weight = torch.zeros(10, requires_grad=True)
upper = torch.optim.Adam([log_decay], lr=0.1)
lower = torch.optim.SGD([weight], lr=0.1)

losses = []
for _ in range(60):
    for _ in range(20):  # your training, as it is
        lower.zero_grad()
        penalty = 0.5 * log_decay.detach().exp() * weight.square().sum()
        (F.mse_loss(train[0] @ weight, train[1]) + penalty).backward()
        lower.step()
    found = bilevel.hypergradient(problem, {"log_decay": log_decay.detach()}, weight.detach())
    log_decay.grad = found.gradient["log_decay"]
    upper.step()
    losses.append(float(F.mse_loss(validation[0] @ weight, validation[1]).detach()))

print(f"decay {float(log_decay.detach().exp()):.3f}, validation loss {losses[0]:.4f} -> {losses[-1]:.4f}")
print("last hypergradient:", found.certificate)
assert losses[-1] < losses[0]
