"""Step like torch.optim, save in the middle, and go on: mini-batches, a network, one weight decay per layer."""

import io

import torch
from torch import nn
from torch.nn import functional as F

import bilevel

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(240, 8, generator=generator)
labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
torch.manual_seed(0)
net = bilevel.functional(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)))


def loss(x: torch.Tensor, y: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Give the mean cross-entropy of a batch."""
    return F.cross_entropy(net(y, batch[0]), batch[1])


def decays(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Decay both layers, each by its own strength."""
    return {"0.weight": x[0].exp(), "2.weight": x[1].exp()}


problem = bilevel.Problem(
    upper=loss,
    lower=loss,
    regularizer=bilevel.L2(weight=decays),
    upper_data=bilevel.Full((inputs[120:], labels[120:])),
    lower_data=bilevel.Shuffled((inputs[:120], labels[:120]), batch_size=60),
    upper_set=bilevel.Box(-8.0, 0.0),
)

# Far from a minimum a network curves downwards in places; truncate=True then takes what CG has, and flags it.
estimator = bilevel.Implicit(linear=bilevel.CG(max_steps=10, damping=0.1), truncate=True)
solver = bilevel.HypergradientDescent(lower=bilevel.SGD(0.5), lower_steps=20, estimator=estimator)
x0 = torch.tensor([-4.0, -4.0])
session = bilevel.Session(problem, solver, x0, net.parameters())
losses = [float(session.step().upper_value) for _ in range(20)]

saved = io.BytesIO()
torch.save(session.state_dict(), saved)
saved.seek(0)

again = bilevel.Session(problem, solver, x0, net.parameters())
again.load_state_dict(torch.load(saved, weights_only=True))
losses += [float(again.step().upper_value) for _ in range(20)]
print(f"validation loss {losses[0]:.3f} -> {losses[-1]:.3f}; decays {again.x.exp().numpy().round(4)}; {again.counts}")
assert losses[-1] < losses[0]
