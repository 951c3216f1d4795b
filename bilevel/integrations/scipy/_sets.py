"""Upper sets as bounds and linear constraints of SciPy."""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy import optimize
from torch import Tensor

from bilevel.layout import Layout
from bilevel.sets import Affine, Box, Halfspace, NonNegative, Product, Set, Simplex
from bilevel.status import InvalidProblem


def stated(upper_set: Set | None, layout: Layout, x: Tensor) -> tuple[Any, list[Any]]:
    """Return an upper set as SciPy's bounds and linear constraints."""
    low, high = torch.full_like(x, -math.inf), torch.full_like(x, math.inf)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    whole = (slice(0, len(x)), layout, upper_set)
    for place, own, part in upper_set.parts(layout) if isinstance(upper_set, Product) else [whole]:
        if isinstance(part, Box | NonNegative):
            project = part.bind(own)
            low[place], high[place] = project(low[place]), project(high[place])
        elif part is not None:
            if isinstance(part, Simplex):
                low[place] = 0.0
            matrix, least, most = _linear(part, own, like=x)
            full = matrix.new_zeros(len(matrix), len(x))
            full[:, place] = matrix
            rows.append((full, least, most))
    arrays = [tuple(tensor.cpu().double().numpy() for tensor in row) for row in rows]
    bounded = bool((low.isfinite() | high.isfinite()).any())
    bounds = optimize.Bounds(low.cpu().double().numpy(), high.cpu().double().numpy()) if bounded else None
    return bounds, [optimize.LinearConstraint(*row) for row in arrays]


def _linear(part: Set, layout: Layout, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (A, least, most) with `least <= A v <= most`."""
    if isinstance(part, Halfspace):
        normal = layout.spread(part.normal, 0.0, what="Halfspace(normal)", dtype=torch.float64).expand(layout.size)
        offset = normal.new_tensor([part.offset])
        return normal[None], torch.full_like(offset, -math.inf), offset
    if isinstance(part, Affine):
        # An orthonormal basis of the rows: SLSQP fails where equations depend on each other.
        matrix, rhs = part._basis, part._basis @ part._origin
        return matrix, rhs, rhs
    if isinstance(part, Simplex):
        matrix = _lines(part, layout, like)
        total = matrix.new_full((len(matrix),), part.total)
        return matrix, total, total
    raise InvalidProblem(
        f"SciPy takes bounds and linear constraints, got {part!r}: use Box, NonNegative, Halfspace, Affine, Simplex or "
        "a Product of these, or bilevel.solve, which takes every set."
    )


def _lines(simplex: Simplex, layout: Layout, like: Tensor) -> Tensor:
    """Return a row of ones and zeros for each simplex."""
    number = torch.arange(layout.size, device=like.device)
    if simplex.axis is None:
        return torch.ones(1, layout.size, dtype=torch.float64, device=like.device)
    leaves = [leaf.movedim(simplex.axis, -1).reshape(-1, leaf.shape[simplex.axis]) for leaf in layout.views(number)]
    return torch.stack([torch.isin(number, line).double() for lines in leaves for line in lines])
