"""Logistic regression with one decay per feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.data import Full
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import breast_cancer, converted, shares, standardized
from bilevel.regularizers import L2
from bilevel.sets import Box


def logistic_regression(seed: int = 0, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Choose one log-decay per feature of a logistic regression on the breast cancer data.

        g = mean cross-entropy on training data + sum_j e^(x_j) y_j^2 / 2,   f = the same mean on validation data

    with `-8 <= x <= 4`; the intercept, `y["bias"]`, is not decayed. Half of the tumors train, a quarter validates, a
    quarter tests; features are standardized on the training data.

    Args:
        seed: of the split.
        dtype: of all numbers.
        device: of all tensors.
    """
    train, validation, test = converted(standardized(shares(breast_cancer(), 0.5, 0.25, seed)), dtype, device)
    d = train.inputs.shape[1]

    def logits(y: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return inputs @ y["weight"] + y["bias"]

    def loss(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits(y, batch[0]), batch[1])

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        found = logits(y, test.inputs)
        return {
            "test_accuracy": float(((found > 0) == (test.targets > 0.5)).double().mean()),
            "test_loss": float(F.binary_cross_entropy_with_logits(found, test.targets)),
        }

    problem = Problem(
        upper=loss,
        lower=loss,
        upper_data=Full((validation.inputs, validation.targets)),
        lower_data=Full((train.inputs, train.targets)),
        regularizer=L2(weight=lambda x: {"weight": x.exp()}),
        upper_set=Box(-8.0, 4.0),
    )
    start = torch.full((d,), -4.0, dtype=dtype, device=device)
    y0 = {"weight": torch.zeros(d, dtype=dtype, device=device), "bias": torch.zeros((), dtype=dtype, device=device)}
    return Task(
        "logistic-regression", problem, start, y0, steps=100, evaluate=evaluate,
        source="Wolberg et al., Wisconsin diagnostic breast cancer, 1995 (CC BY 4.0); shipped by scikit-learn (BSD-3)",
    )  # fmt: skip
