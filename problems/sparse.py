"""Sparse models on real data: their penalties chosen on validation data, through kinks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilevel.layout import Variables
from bilevel.problems._base import Task
from bilevel.problems._datasets import CANCER, DIABETES, Part, Split, patients, tumors
from bilevel.problems._linear import classification_judge, cross_entropy, regression_judge, squares, stated
from bilevel.regularizers import L1, ElasticNet, Regularizer, SparseGroupL1
from bilevel.sets import Box

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

    Notes:
        F has kinks, and several local minima: with ten features, where hardly any penalty is needed, one of them may
        lie at the least x.

    References:
        Efron, Hastie, Johnstone, Tibshirani, "Least angle regression", Annals of Statistics 32, 2004 (data, and the 64
        features).
    """
    split = patients(seed, dtype, device, interactions=interactions)
    largest = _largest(split.train)
    bounded = Box(float(largest) + NEARLY_NONE, float(largest) + NEARLY_ALL)
    return _regression("lasso", split, L1(lambda x: x.exp()), bounded, largest - 1)


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
    split = patients(seed, dtype, device, interactions=interactions)
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
    split = tumors(seed, dtype, device)
    zero = torch.zeros((), dtype=dtype, device=device)
    groups = torch.arange(30, device=device) % 10
    judge = classification_judge(split.test)

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        kept = (y["weight"] != 0).view(3, 10)
        return judge(x, y) | {"features": float(kept.sum()), "groups": float(kept.any(0).sum())}

    penalty = SparseGroupL1(
        l1=lambda x: {"weight": x["l1"].exp()}, group=lambda x: x["group"].exp(), groups={"weight": groups}
    )
    problem = stated(cross_entropy, split, regularizer=penalty, upper_set=Box(-12.0, 0.0))
    start = {"l1": zero - 5, "group": zero - 5}
    y0 = {"weight": zero.expand(30).clone(), "bias": zero}
    return Task("sparse-group", problem, start, y0, steps=100, evaluate=evaluate, source=CANCER)


def _largest(train: Part) -> Tensor:
    """Return the logarithm of the least strength at which a lasso is 0."""
    correlation: Tensor = train.inputs.T @ train.targets / len(train.targets)
    return correlation.abs().max().log()


def _regression(name: str, split: Split, regularizer: Regularizer, upper_set: Box, start: Variables) -> Task:
    judge = regression_judge(split.test)

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        return judge(x, y) | {"features": float((y != 0).sum())}

    problem = stated(squares, split, regularizer=regularizer, upper_set=upper_set)
    y0 = torch.zeros_like(split.train.inputs[0])
    return Task(name, problem, start, y0, steps=100, evaluate=evaluate, source=DIABETES)
