"""Logistic regression with one decay per feature."""

from __future__ import annotations

import torch

from bilevel.problems._base import Task
from bilevel.problems._datasets import CANCER, tumors
from bilevel.problems._linear import classification_judge, cross_entropy, stated
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
    split = tumors(seed, dtype, device)
    d = split.train.inputs.shape[1]
    decay = L2(weight=lambda x: {"weight": x.exp()})
    problem = stated(cross_entropy, split, regularizer=decay, upper_set=Box(-8.0, 4.0))
    start = torch.full((d,), -4.0, dtype=dtype, device=device)
    y0 = {"weight": torch.zeros(d, dtype=dtype, device=device), "bias": torch.zeros((), dtype=dtype, device=device)}
    judge = classification_judge(split.test)
    return Task("logistic-regression", problem, start, y0, steps=100, evaluate=judge, source=CANCER)
