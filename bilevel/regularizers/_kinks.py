"""Formulas that the kinked terms share."""

from __future__ import annotations

import torch
from torch import Tensor


def soft(v: Tensor, threshold: Tensor) -> Tensor:
    """Return `sign(v) max(|v| - threshold, 0)`, exactly 0 below the threshold."""
    # Strictly less: at v = 0 without a threshold the derivative in v must be that of the identity, and NaN must stay.
    return torch.where(v.abs() < threshold, torch.zeros_like(v), v - threshold * v.sign())


def entry_slack(weight: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """Return `a_j - |gradient_j|` where a_j > 0 and y_j = 0, inf elsewhere."""
    return torch.where((y == 0) & (weight > 0), weight - gradient.abs(), torch.inf)


def entry_distance(weight: Tensor, y: Tensor) -> Tensor:
    """Return |y_j| where a_j > 0 and y_j is not 0, inf elsewhere."""
    return torch.where((y != 0) & (weight > 0), y.abs(), torch.inf)


def group_norm(y: Tensor, ids: Tensor) -> Tensor:
    """Return for each entry `[..., d]` the norm of its group, whose id is in [0, d]; the derivative at 0 is 0."""
    square = torch.zeros((*y.shape[:-1], y.shape[-1] + 1), dtype=y.dtype, device=y.device)
    square = square.index_add(-1, ids, y.square())[..., ids]
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), square)


def group_sum(v: Tensor, ids: Tensor) -> Tensor:
    """Return for each entry `[..., d]` the sum over its group."""
    total = torch.zeros((*v.shape[:-1], v.shape[-1] + 1), dtype=v.dtype, device=v.device)
    return total.index_add(-1, ids, v)[..., ids]


def shrunk(v: Tensor, ids: Tensor, threshold: Tensor) -> Tensor:
    """Return `v_G max(1 - threshold_G / ‖v_G‖, 0)`, exactly 0 for groups no longer than their threshold."""
    norm = group_norm(v, ids)
    stays = ~(norm < threshold)
    # A group of norm 0 without a threshold stays as it is; one of norm 0 at its threshold is 0 either way.
    factor = torch.where(stays & (norm > 0), 1 - threshold / torch.where(norm > 0, norm, 1.0), torch.ones_like(norm))
    return torch.where(stays, v * factor, torch.zeros_like(v))
