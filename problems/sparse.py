"""Sparse models on real data: their penalties chosen on validation data, through kinks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.data import Full
from bilevel.layout import Variables
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import Part, Split, breast_cancer, converted, diabetes, shares, standardized
from bilevel.regularizers import L1, ElasticNet, Regularizer, SparseGroupL1
from bilevel.sets import Box

DIABETES = "Efron et al., Annals of Statistics 32, 2004 (no licence stated); as shipped by scikit-learn (BSD-3)"
CANCER = "Wolberg et al., Wisconsin diagnostic breast cancer, 1995 (CC BY 4.0); shipped by scikit-learn (BSD-3)"
SEX = 1
"""The one feature of the diabetes data that has two values, so that its square says nothing new."""
NEARLY_ALL = math.log(0.9)
NEARLY_NONE = -12.0
"""Logarithms of the largest and least penalty, relative to the least at which all weights are 0."""


def lasso(seed: int = 0, *, interactions: bool = True, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Choose the strength of a lasso on the diabetes data.

        g = ‖A y - t‖^2 / 2n + e^x ‖y‖_1,   f = ‖A' y - t'‖^2 / 2n'

    With e^a the least strength at which y = 0, x lies between `a - 12` and `a + log(.9)` and starts at `a - 1`. Half of
    the patients train, a quarter validates, a quarter tests; features and target are standardized on the training data.

    Args:
        seed: of the split.
        interactions: add the 45 products of two features and the 9 squares that are not constant: 64 features.
        dtype: of all numbers.
        device: of all tensors.

    References:
        Efron, Hastie, Johnstone, Tibshirani, "Least angle regression", Annals of Statistics 32, 2004 (data, and the 64
        features).
    """
    split = _diabetes(seed, interactions, dtype, device)
    largest = _largest(split.train)
    problem_set = Box(float(largest) + NEARLY_NONE, float(largest) + NEARLY_ALL)
    return _regression("lasso", split, L1(lambda x: x.exp()), problem_set, largest - 1)


def elastic_net(
    seed: int = 0, *, interactions: bool = True, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Task:
    """Choose both strengths of an elastic net on the diabetes data.

        g = ‖A y - t‖^2 / 2n + e^(x_1) ‖y‖_1 + e^(x_2) ‖y‖^2 / 2,   f = ‖A' y - t'‖^2 / 2n'

    x is `{"l1": x_1, "l2": x_2}`; x_1 is bounded as in `lasso` and x_2 by -12 and 2. The data are those of `lasso`.

    Args:
        seed: of the split.
        interactions: as in `lasso`.
        dtype: of all numbers.
        device: of all tensors.
    """
    split = _diabetes(seed, interactions, dtype, device)
    largest = _largest(split.train)
    a = float(largest)
    bounded = Box({"l1": a + NEARLY_NONE, "l2": -12.0}, {"l1": a + NEARLY_ALL, "l2": 2.0})
    net = ElasticNet(l1=lambda x: x["l1"].exp(), l2=lambda x: x["l2"].exp())
    start = {"l1": largest - 1, "l2": torch.full_like(largest, -3.0)}
    return _regression("elastic-net", split, net, bounded, start)


def sparse_group(seed: int = 0, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Choose both strengths of a sparse group lasso: which of ten measurements of a tumor matter, and how.

        g = mean cross-entropy + e^(x_1) ‖y‖_1 + e^(x_2) sum_G ‖y_G‖,   f = mean cross-entropy on validation data

    The breast cancer data hold ten measurements of cell nuclei, three statistics of each (mean, standard error, worst):
    the ten groups. The intercept, `y["bias"]`, has no penalty. x is `{"l1": x_1, "group": x_2}`, each between -12 and
    0. Half of the tumors train, a quarter validates, a quarter tests; features are standardized on the training data.

    Args:
        seed: of the split.
        dtype: of all numbers.
        device: of all tensors.
    """
    train, validation, test = converted(standardized(shares(breast_cancer(), 0.5, 0.25, seed)), dtype, device)
    zero = torch.zeros((), dtype=dtype, device=device)
    groups = torch.arange(30, device=device) % 10

    def logits(y: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return inputs @ y["weight"] + y["bias"]

    def loss(x: Variables, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits(y, batch[0]), batch[1])

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        found, kept = logits(y, test.inputs), (y["weight"] != 0).view(3, 10)
        return {
            "test_accuracy": float(((found > 0) == (test.targets > 0.5)).double().mean()),
            "test_loss": float(F.binary_cross_entropy_with_logits(found, test.targets)),
            "features": float(kept.sum()),
            "groups": float(kept.any(0).sum()),
        }

    problem = Problem(
        upper=loss,
        lower=loss,
        upper_data=Full((validation.inputs, validation.targets)),
        lower_data=Full((train.inputs, train.targets)),
        regularizer=SparseGroupL1(
            l1=lambda x: {"weight": x["l1"].exp()}, group=lambda x: x["group"].exp(), groups={"weight": groups}
        ),
        upper_set=Box(-12.0, 0.0),
    )
    start = {"l1": zero - 5, "group": zero - 5}
    y0 = {"weight": zero.expand(30).clone(), "bias": zero}
    return Task("sparse-group", problem, start, y0, steps=100, evaluate=evaluate, source=CANCER)


def _diabetes(seed: int, interactions: bool, dtype: torch.dtype, device: str) -> Split:
    data = diabetes()
    if interactions:
        inputs = (data.inputs - data.inputs.mean(0)) / data.inputs.std(0)
        d = inputs.shape[1]
        pairs = [inputs[:, i] * inputs[:, j] for i in range(d) for j in range(i, d) if (i, j) != (SEX, SEX)]
        data = Part(torch.cat([inputs, torch.stack(pairs, 1)], 1), data.targets)
    split = standardized(shares(data, 0.5, 0.25, seed))
    mean, scale = split.train.targets.mean(), split.train.targets.std()
    return converted(Split(*(Part(part.inputs, (part.targets - mean) / scale) for part in split)), dtype, device)


def _largest(train: Part) -> Tensor:
    """Return the logarithm of the least strength at which a lasso is 0."""
    correlation: Tensor = train.inputs.T @ train.targets / len(train.targets)
    return correlation.abs().max().log()


def _regression(name: str, split: Split, regularizer: Regularizer, upper_set: Box, start: Variables) -> Task:
    train, validation, test = split

    def loss(x: Variables, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (batch[0] @ y - batch[1]).square().mean()

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        errors = (test.inputs @ y - test.targets).square()
        explained = 1 - errors.mean() / (test.targets - test.targets.mean()).square().mean()
        return {
            "test_mse": float(errors.mean()), "test_r2": float(explained), "features": float((y != 0).sum()),
        }  # fmt: skip

    problem = Problem(
        upper=loss,
        lower=loss,
        upper_data=Full((validation.inputs, validation.targets)),
        lower_data=Full((train.inputs, train.targets)),
        regularizer=regularizer,
        upper_set=upper_set,
    )
    y0 = torch.zeros_like(train.inputs[0])
    return Task(name, problem, start, y0, steps=100, evaluate=evaluate, source=DIABETES)
