"""Ridge regression with one decay per feature: an implicit problem on real data whose hypergradient is a formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.data import Full
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import Part, converted, diabetes, shares, standardized
from bilevel.regularizers import L2
from bilevel.sets import Box


def ridge(seed: int = 0, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Choose one log-decay per feature of a ridge regression on the diabetes data.

        g = ‖A y - c‖^2 / 2n + sum_j e^(x_j) y_j^2 / 2,   f = ‖A' y - c'‖^2 / 2n',   -8 <= x <= 4

    With `H = A^T A / n + diag(e^x)`: `y* = H^-1 A^T c / n` and `dF/dx_j = -e^(x_j) y*_j w_j`, where `H w = df/dy`.
    Half of the patients train, a quarter validates, a quarter tests. Features and target are standardized on the
    training data, so no intercept is needed, and a mean squared error of 1 is what predicting the mean gives.

    Args:
        seed: of the split.
        dtype: of all numbers.
        device: of all tensors.
    """
    split = standardized(shares(diabetes(), 0.5, 0.25, seed))
    mean, scale = split.train.targets.mean(), split.train.targets.std()
    train, validation, test = (Part(part.inputs, (part.targets - mean) / scale) for part in split)
    train, validation, test = converted(split._replace(train=train, validation=validation, test=test), dtype, device)
    n, d = train.inputs.shape
    covariance, moment = train.inputs.T @ train.inputs / n, train.inputs.T @ train.targets / n

    def loss(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (batch[0] @ y - batch[1]).square().mean()

    def lower_solution(x: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.solve(covariance + x.exp().diag(), moment)
        return solution

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        errors = (test.inputs @ y - test.targets).square()
        explained = 1 - errors.mean() / (test.targets - test.targets.mean()).square().mean()
        return {"test_mse": float(errors.mean()), "test_r2": float(explained)}

    problem = Problem(
        upper=loss,
        lower=loss,
        upper_data=Full((validation.inputs, validation.targets)),
        lower_data=Full((train.inputs, train.targets)),
        regularizer=L2(weight=lambda x: x.exp()),
        upper_set=Box(-8.0, 4.0),
        lower_solution=lower_solution,
    )
    start = torch.full((d,), -2.0, dtype=dtype, device=device)
    return Task(
        "ridge", problem, start, lower_solution(start), steps=200, evaluate=evaluate,
        source="Efron et al., Annals of Statistics 32, 2004 (no licence stated); as shipped by scikit-learn (BSD-3)",
    )  # fmt: skip
