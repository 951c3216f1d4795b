"""Ridge regression with one decay per feature: an implicit problem on real data whose hypergradient is a formula."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.problems._base import Task
from bilevel.problems._datasets import DIABETES, patients
from bilevel.problems._linear import regression_judge, squares, stated
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
    split = patients(seed, dtype, device)
    train = split.train
    n, d = train.inputs.shape
    covariance, moment = train.inputs.T @ train.inputs / n, train.inputs.T @ train.targets / n

    def lower_solution(x: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.solve(covariance + x.exp().diag(), moment)
        return solution

    problem = stated(
        squares,
        split,
        regularizer=L2(weight=lambda x: x.exp()),
        upper_set=Box(-8.0, 4.0),
        lower_solution=lower_solution,
    )
    start = torch.full((d,), -2.0, dtype=dtype, device=device)
    return Task(
        "ridge", problem, start, lower_solution(start), steps=200,
        evaluate=regression_judge(split.test), source=DIABETES,
    )  # fmt: skip
