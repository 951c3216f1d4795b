"""Folds as blocks: the training and validation parts of every fold, standardized, stacked and padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Split = tuple[Any, Any]
"""Indices of the training and of the validation rows."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of every fold, padded with zeros to one length n.

    Args:
        inputs: `[m, n, d]`.
        targets: `[m, n, c]` (c = 1 for one target).
        weights: `[m, n]`, each row adds up to 1; 0 where padded.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors, block by block."""
        return self.inputs, self.targets, self.weights


@dataclass(frozen=True, eq=False)
class Folds:
    """Both parts of every fold, in units of its own training part.

    Args:
        train: rows that the lower level sees.
        validation: rows that the upper level sees.
        total: sum of the sample weights of each training part, `[m]`.
        center: of the features, `[m, d]`.
        scale: of the features, `[m, d]`.
        target_center: `[m, c]`, zeros for classes.
        target_scale: one number for all folds, so that their losses have one unit.
    """

    train: Part
    validation: Part
    total: Tensor
    center: Tensor
    scale: Tensor
    target_center: Tensor
    target_scale: float

    @classmethod
    def of(
        cls, X: Any, targets: Any, weights: Any, splits: Sequence[Split], *, center: bool, center_targets: bool
    ) -> Folds:
        """Cut, standardize and stack.

        Args:
            X: `[n, d]`.
            targets: `[n, c]`.
            weights: `[n]`, >= 0; rows of weight 0 are left out.
            splits: of the folds.
            center: subtract the mean of each feature.
            center_targets: subtract that of the targets, and divide by their deviation.

        Raises:
            ValueError: a part of a fold has no rows, or no weight.
        """
        train: list[Any] = []
        validation: list[Any] = []
        rows: list[Any] = []
        scaled = center_targets
        spread = _deviation(targets, weights, center) if scaled else np.ones(1)
        target_scale = float(np.sqrt(np.mean(spread**2)))
        for k, split in enumerate(splits):
            fit, judge = (_kept(index, weights, k) for index in split)
            share = weights[fit] / weights[fit].sum()
            mean = share @ X[fit] if center else np.zeros(X.shape[1])
            scale = _deviation(X[fit], weights[fit], center)
            offset = share @ targets[fit] if center and center_targets else np.zeros(targets.shape[1])
            for part, index in ((train, fit), (validation, judge)):
                part.append(((X[index] - mean) / scale, (targets[index] - offset) / target_scale, weights[index]))
            rows.append((weights[fit].sum(), mean, scale, offset))
        total, mean, scale, offset = (torch.as_tensor(np.stack(column)) for column in zip(*rows, strict=True))
        return cls(_stacked(train), _stacked(validation), total, mean, scale, offset, target_scale)


def _kept(index: Any, weights: Any, fold: int) -> Any:
    index = np.asarray(index)
    index = np.flatnonzero(index) if index.dtype == bool else index
    index = index[weights[index] > 0]
    if len(index) == 0:
        raise ValueError(f"Fold {fold} has a part without samples of positive weight.")
    return index


def _deviation(values: Any, weights: Any, center: bool) -> Any:
    """Return the root mean square deviation of each column, 1 where it is constant."""
    share = weights / weights.sum()
    mean = share @ values
    deviation = np.sqrt(share @ (values - mean if center else values) ** 2)
    floor = 10 * np.finfo(float).eps * np.maximum(np.abs(values).max(0), np.finfo(float).tiny)
    return np.where(deviation > floor, deviation, 1.0)


def _stacked(parts: Sequence[tuple[Any, Any, Any]]) -> Part:
    n = max(len(weights) for _, _, weights in parts)

    def padded(values: Any) -> Tensor:
        return torch.as_tensor(np.concatenate([values, np.zeros((n - len(values), *values.shape[1:]))]))

    inputs, targets, weights = (torch.stack([padded(part[i]) for part in parts]) for i in range(3))
    return Part(inputs, targets, weights / weights.sum(-1, keepdim=True))
