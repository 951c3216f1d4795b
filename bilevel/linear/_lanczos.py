"""A few Lanczos steps: the range of the curvature from products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.linear._base import dot, norm
from bilevel.linear._krylov import Tridiagonal


def random_signs(b: Tensor, seed: int) -> Tensor:
    """Return random signs shaped like b: the same in every row, so that no answer depends on its neighbors."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, b.shape[-1:], generator=generator).to(b) * 2 - 1).expand_as(b)


def ritz_range(product: Callable[[Tensor], Tensor], vector: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest Ritz value of each row `[..., 1]` after `steps` products from `vector`.

    Without reorthogonalization: repeated values may appear, but none outside the spectrum (up to rounding).
    """
    length = norm(vector)
    alive = length > 0
    before, v = torch.zeros_like(vector), torch.where(alive, vector / length, 0.0).to(vector.dtype)
    beside, lanczos = torch.zeros_like(length), Tridiagonal()
    for _ in range(min(steps, vector.shape[-1])):
        p = product(v)
        diagonal = dot(v, p)
        p = p - (diagonal * v).to(v.dtype) - (beside * before).to(v.dtype)
        beside = norm(p)
        lanczos.diagonal.append(torch.where(alive, diagonal, torch.nan))
        # A row whose Krylov space is exhausted goes on with zeros, which add nothing to its matrix.
        alive = alive & (beside > 10 * torch.finfo(v.dtype).eps * diagonal.abs())
        lanczos.beside.append(torch.where(alive, beside, torch.nan))
        before, v = v, torch.where(alive, p / beside, 0.0).to(v.dtype)
    return lanczos.extremes()
