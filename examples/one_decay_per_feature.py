"""Tune one L2 strength per feature of a linear regression by the hypergradient of the validation loss."""

import torch
from torch.nn import functional as F

import bilevel

# Twenty features of which five matter: an L2 strength of its own lets each useless one be switched off.
generator = torch.Generator().manual_seed(0)


def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw n examples."""
    inputs = torch.randn(n, 20, generator=generator)
    return inputs, inputs[:, :5].sum(1) + torch.randn(n, generator=generator)


train, validation, test = draw(40), draw(40), draw(1000)


def loss(x: torch.Tensor, y: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Give the mean squared error of a batch, the same at both levels."""
    return F.mse_loss(batch[0] @ y, batch[1])


problem = bilevel.Problem(
    upper=loss,
    lower=loss,
    upper_data=bilevel.Full(validation),
    lower_data=bilevel.Full(train),
    regularizer=bilevel.L2(weight=lambda x: x.exp()),  # x: logarithms of the strengths
    upper_set=bilevel.Box(-6.0, 4.0),
)
x0, y0 = torch.full((20,), -1.0), torch.zeros(20)
equal = bilevel.solve(problem, bilevel.implicit(), x0, y0, steps=1)
tuned = bilevel.solve(problem, bilevel.implicit(), x0, y0, steps=100)
print(tuned)

before, after = (float(F.mse_loss(test[0] @ y, test[1])) for y in (equal.best_y, tuned.best_y))
print(f"test error with equal strengths {before:.3f}, tuned {after:.3f}; the noise alone gives 1")
print("logarithms of the strengths:", tuned.best_x.numpy().round(1))
assert after < before
