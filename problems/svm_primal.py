"""A support vector machine through its primal, under coupled constraints: how much slack each sample is granted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.data import Full
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import CANCER, Part, breast_cancer, converted, shares, standardized
from bilevel.sets import Box
from bilevel.sets.joint import JointPolyhedron

FEATURES = [20, 21, 24]
"""Radius, texture and smoothness of the worst nuclei."""
LARGEST = 2.0
"""Slack that no sample needs more of: with it a sample on the wrong margin is content."""
COST = 0.1


def svm_primal(
    seed: int = 0, *, samples: int = 20, wrong: int = 2, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Task:
    """Grant each sample of a linear support vector machine its own slack, where some labels are wrong.

        g = (‖w‖^2 + b^2 + ‖u‖^2) / 2   s.t.   1 - x_i - u_i - s_i (<w, a_i> + b) <= 0   for each training sample i
        f = mean log(1 + exp(1 - s (<w, a> + b))) on validation data + 0.05 mean x^2,   0 <= x <= 2

    Sample i may miss the margin by x_i freely; what it misses beyond that, u_i, costs. With x = 0 this is the machine
    with squared slacks. The upper level pays for x and finds the samples that should not count: the labels of the
    first `wrong` ones are flipped. A few tumors train, a quarter of all validates, the rest tests, on three features,
    standardized on the training data. y is `{"weight": [3], "bias": [], "slack": [samples]}`. The constraints couple
    both levels; their gradients are always independent, thanks to u, so multipliers are unique: they are u itself.

    Small enough for `KKT`. `LVHBA(penalty=Power(0.1, 0.49), lr=0.2, upper_lr=0.3)` agrees with it after 3,000
    steps, `BLOCC()` after 600.

    Args:
        seed: of the split.
        samples: to train on.
        wrong: how many of them have wrong labels.
        dtype: of all numbers.
        device: of all tensors.

    References:
        Yao, Yu, Zeng, Zhang, ICLR 2024 (tune a primal machine by LV-HBA). Jiang, Xiao, Tenorio, Real-Rojas, Marques,
        Chen, NeurIPS 2024 (bound each sample's slack by an upper variable, as here where going beyond costs too much).
    """
    data = breast_cancer()
    data = Part(data.inputs[:, FEATURES], 2 * data.targets - 1)
    split = standardized(shares(data, samples / len(data.targets), 0.25, seed))
    train, validation, test = converted(split, dtype, device)
    signs = torch.where(torch.arange(samples, device=device) < wrong, -train.targets, train.targets)
    rows = signs[:, None] * F.pad(train.inputs, (0, 1), value=1.0)

    def margins(y: dict[str, Tensor], inputs: Tensor, signs: Tensor) -> Tensor:
        return signs * (inputs @ y["weight"] + y["bias"])

    def upper(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.softplus(1 - margins(y, *batch)).mean() + 0.5 * COST * x.square().mean()

    def lower(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        return 0.5 * (y["weight"].square().sum() + y["bias"].square() + y["slack"].square().sum())

    def constraint(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        return 1 - x - y["slack"] - margins(y, train.inputs, signs)

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        suspects = x.topk(wrong).indices
        return {
            "test_accuracy": float((margins(y, *test) > 0).double().mean()),
            "wrong_labels_found": float((suspects < wrong).sum()),
            "largest_violation": float(constraint(x, y, None).max()),
        }

    # Bounds of x as rows keep the joint projection exact.
    one, none = torch.eye(samples, dtype=dtype, device=device), torch.zeros(samples, dtype=dtype, device=device)
    problem = Problem(
        upper=upper,
        lower=lower,
        constraint=constraint,
        upper_data=Full((validation.inputs, validation.targets)),
        upper_set=Box(0.0, LARGEST),
        joint_set=JointPolyhedron(
            matrix_x=torch.cat([-one, -one, one]),
            matrix_y=F.pad(torch.cat([-rows, -one], 1), (0, 0, 0, 2 * samples)),
            offset=torch.cat([none - 1, none, none + LARGEST]),
        ),
    )
    y0 = {"weight": none.new_zeros(len(FEATURES)), "bias": none.new_zeros(()), "slack": none + 1}
    return Task("svm-primal", problem, none, y0, steps=3000, evaluate=evaluate, source=CANCER)
