"""Statements of linear models: a loss of scores, and a decay of each weight."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.data import Full
from bilevel.integrations.sklearn._base import Statement, Tuned, plain
from bilevel.integrations.sklearn._descent import Lower, Strengths, cholesky
from bilevel.integrations.sklearn._folds import Folds
from bilevel.integrations.sklearn._newton import Loss, newton
from bilevel.problem import Problem
from bilevel.regularizers import L2
from bilevel.sets import Box

LEAST, LARGEST = -14.0, 9.0
"""Logarithms of the least and the largest decay for one sample, on standardized features."""


def bounded(total: Tensor) -> Box:
    """Return the bounds of log-decays that add up over samples of this total weight."""
    shift = float(total.mean().log())
    return Box(LEAST + shift, LARGEST + shift)


def ladder(total: Tensor, count: int, steps: int = 8) -> list[Strengths]:
    """Return log-decays from strong to weak, equal for all groups."""
    shift = float(total.mean().log())
    return [
        {"alpha": torch.full((count,), value + shift, dtype=torch.float64)}
        for value in np.linspace(LARGEST - 5, LEAST + 4, steps).tolist()
    ]


class Decayed(Tuned, ABC):
    """A linear model with an L2 penalty: one log-decay for each group of features."""

    def _starts(self, folds: Folds, groups: Tensor) -> Sequence[Strengths]:
        return ladder(folds.total, int(groups.max()) + 1)

    def _by_group(self, x: Strengths) -> Any:
        return plain(x["alpha"].exp(), self.penalty)


def decays(folds: Folds, groups: Tensor, classes: int = 1, intercept: float | None = None) -> Any:
    """Return x -> decays of the weights `[m, D]` for a mean loss: those of a sum, divided by the number of samples.

    Args:
        folds: the data.
        groups: ids of the features' decays.
        classes: columns of scores; weights are ordered feature by feature.
        intercept: decay of the last row of weights, None if there is none.
    """
    ids = groups.repeat_interleave(classes)

    def weight(x: Strengths) -> Tensor:
        each = x["alpha"].exp()[ids] / folds.total[:, None]
        if intercept is None:
            return each
        return torch.cat([each, each.new_full((len(each), classes), intercept)], -1)

    return weight


def squares(x: Any, y: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the mean `(A y - t)^2`."""
    inputs, targets, weights = batch
    return (weights * (inputs @ y - targets[:, 0]).square()).sum()


def halved(x: Any, y: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return half of it."""
    return squares(x, y, batch) / 2


def least_squares(folds: Folds, groups: Tensor) -> Statement:
    """State `g = mean (A y - t)^2 / 2 + sum_j alpha_j y_j^2 / 2n`, `f = mean (A' y - t')^2`."""
    A, t, s = folds.train.batch
    weighted = (A * s.unsqueeze(-1)).mT
    covariance, moment = weighted @ A, weighted @ t
    weight = decays(folds, groups)

    def solved(x: Strengths, y: Tensor) -> Lower:
        hessian = covariance + torch.diag_embed(weight(x))
        return Lower(torch.cholesky_solve(moment, cholesky(hessian)).squeeze(-1), hessian)

    return Statement(
        Problem(
            upper=squares, lower=halved, regularizer=L2(weight), upper_set=bounded(folds.total), blocks=len(A),
            upper_data=Full(folds.validation.batch), lower_data=Full(folds.train.batch),
        ),
        solved,
        torch.zeros_like(A[:, 0]),
    )  # fmt: skip


def scored(folds: Folds, groups: Tensor, loss: Loss, intercept: float | None) -> Statement:
    """State `g = mean loss(A y) + sum_j alpha_j y_j^2 / 2n`, `f = mean loss(A' y)`; y `[d c]`, feature by feature.

    Args:
        folds: the data; a column of ones is appended where there is an intercept.
        groups: ids of the features' decays.
        loss: of scores `[n, c]`.
        intercept: its decay; None for none.
    """
    train, validation = (
        (part.inputs if intercept is None else _with_ones(part.inputs), part.targets, part.weights)
        for part in (folds.train, folds.validation)
    )
    c, d = folds.train.targets.shape[-1], train[0].shape[-1]
    weight = decays(folds, groups, c, intercept)

    def mean_loss(x: Any, y: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        inputs, targets, weights = batch
        return (weights * loss.value(inputs @ y.view(d, c), targets)).sum()

    known: list[Tensor] = []  # the newest Hessian without decay: where to start, with no influence on where to end

    def solved(x: Strengths, y: Tensor) -> Lower:
        decay = weight(x)
        y, hessian = newton(loss, train, decay, y, known[0] if known else None)
        if hessian.dim() == 3:
            known[:] = [hessian - torch.diag_embed(decay)]
        return Lower(y, hessian)

    y0 = train[0].new_zeros(len(train[0]), d * c)
    problem = Problem(
        upper=mean_loss, lower=mean_loss, regularizer=L2(weight), upper_set=bounded(folds.total), blocks=len(y0),
        upper_data=Full(validation), lower_data=Full(train),
    )  # fmt: skip
    return Statement(problem, solved, y0)


def _with_ones(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
