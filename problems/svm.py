"""A support vector machine through its dual, a quadratic on a box: one C, or one for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.data import Full
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import CANCER, Part, tumors
from bilevel.sets import Box


def svm(seed: int = 0, *, per_sample: bool = False, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Choose the C of a linear support vector machine on the breast cancer data.

        min_w ‖w‖^2 / 2 + sum_i (C_i / n) max(1 - s_i <w, a_i>, 0),   C = e^x

    is solved through its dual in shares of the bound, `alpha_i = (C_i / n) y_i`:

        g = ‖sum_i alpha_i s_i a_i‖^2 / 2 - sum_i alpha_i,   0 <= y_i <= 1,   f = mean max(1 - s <w, a>, 0)^2

    with `w = sum_i alpha_i s_i a_i` and f on validation data; unlike a logarithmic loss, f gains nothing from scores
    beyond the margin, so it does not push C up where the data can be separated. `y_i` is 0 for samples beyond the
    margin, 1 for those inside or on its wrong side, and between on the margin: only those move with x. A constant
    feature serves as the intercept. `-6 <= x <= 6`. Half of the tumors train, a quarter validates, a quarter tests;
    features are standardized on the training data.

    Args:
        seed: of the split.
        per_sample: one C for each training sample instead of one for all.
        dtype: of all numbers.
        device: of all tensors.

    References:
        Cortes, Vapnik, "Support-vector networks", Machine Learning 20, 1995.
    """
    train, validation, test = (_signed(part) for part in tumors(seed, dtype, device))
    rows, n = train.inputs * train.targets.unsqueeze(-1), len(train.targets)

    def weights(x: Tensor, y: Tensor) -> Tensor:
        return (x.exp() / n * y) @ rows

    def dual(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return weights(x, y).square().sum() / 2 - (x.exp() / n * y).sum()

    def upper(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.relu(1 - (batch[0] @ weights(x, y)) * batch[1]).square().mean()

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        return {
            "test_accuracy": float((test.inputs @ weights(x, y) * test.targets > 0).double().mean()),
            "support_vectors": float((y > 0).sum()),
            "on_the_margin": float(((y > 0) & (y < 1)).sum()),
        }

    problem = Problem(
        upper=upper,
        lower=dual,
        upper_data=Full((validation.inputs, validation.targets)),
        lower_set=Box(0.0, 1.0),
        upper_set=Box(-6.0, 6.0),
    )
    start = torch.full((n,) if per_sample else (), 1.0, dtype=dtype, device=device)
    y0 = torch.full((n,), 0.5, dtype=dtype, device=device)
    return Task("svm", problem, start, y0, steps=60, evaluate=evaluate, source=CANCER)


def _signed(part: Part) -> Part:
    """Return inputs with a constant feature, and targets -1 and 1."""
    return Part(F.pad(part.inputs, (0, 1), value=1.0), 2 * part.targets - 1)
