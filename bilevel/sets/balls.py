"""Bounds on a sum over all entries: simplices and balls."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any, final

import torch
from torch import Tensor

from bilevel.layout import Layout
from bilevel.sets._base import Projection, Set, project_bare
from bilevel.status import InvalidProblem


@final
@dataclass(frozen=True, eq=False)
class Simplex(Set):
    """Keep weights: `{v >= 0: sum v = total}`, for the whole vector or along one axis of each leaf.

    Args:
        total: > 0.
        axis: of every leaf (of one block); each line along it is a simplex of its own. None: all entries of all leaves
            (of one block) are one.

    Raises:
        InvalidProblem: the total is not positive and finite, or (at `bind`) a leaf lacks the axis.

    Cost:
        One sort.

    References:
        M. Held, P. Wolfe, H. Crowder, "Validation of subgradient optimization", Math. Programming 6, 1974.

    Example:
        >>> Simplex().project(torch.tensor([0.5, 1.0, -2.0]))
        tensor([0.2500, 0.7500, 0.0000])
    """

    total: float = 1.0
    axis: int | None = None

    def __post_init__(self) -> None:
        if not (isfinite(self.total) and self.total > 0):
            raise InvalidProblem(f"Simplex(total=...) must be positive and finite, got {self.total}.")

    def project(self, point: Tensor) -> Tensor:
        """Return the projection of the whole tensor, or of each line along the axis."""
        if self.axis is None:
            return _onto_simplex(point.reshape(-1), self.total).reshape(point.shape)
        if not -point.dim() <= self.axis < point.dim():
            raise InvalidProblem(f"Simplex(axis={self.axis}) does not fit the shape {tuple(point.shape)}.")
        return _onto_simplex(point.movedim(self.axis, -1), self.total).movedim(-1, self.axis)

    def bind(self, layout: Layout) -> Projection:
        """Return the projection of flat vectors."""
        if self.axis is None:
            return lambda flat: _onto_simplex(flat, self.total)
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            if not -len(shape) <= self.axis < len(shape):
                raise InvalidProblem(f"Simplex(axis={self.axis}) does not fit leaf '{name}' of shape {tuple(shape)}.")
        # Counted from the end, an axis is the same with and without the dimension of blocks.
        axes = [self.axis if self.axis < 0 else self.axis - len(shape) for shape in layout.shapes]

        def project(flat: Tensor) -> Tensor:
            leaves = zip(layout.views(flat), axes, strict=True)
            return layout.concat([Simplex(self.total, axis).project(leaf) for leaf, axis in leaves])

        return project


@final
@dataclass(frozen=True, eq=False)
class Ball(Set):
    """Stay near a center: `{v: ‖v - center‖ <= radius}`, the Euclidean norm over all entries (of one block).

    Args:
        radius: >= 0.
        center: given like a bound of `Box`.

    Raises:
        InvalidProblem: the radius is negative or not finite, or (at `bind`) the center fits no leaf.

    Example:
        >>> Ball(1.0).project(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    radius: float
    center: Any = 0.0

    def __post_init__(self) -> None:
        _check_radius("Ball", self.radius)

    def project(self, point: Tensor) -> Tensor:
        """Return `center + (point - center) min(1, radius / ‖point - center‖)`."""
        return project_bare(self, point)

    def bind(self, layout: Layout) -> Projection:
        """Return the projection of flat vectors."""
        center = layout.spread(self.center, 0.0, what="Ball(center)").detach().clone()
        if not center.isfinite().all():
            raise InvalidProblem(f"Ball(center=...) must be finite, got {self.center}.")

        def project(flat: Tensor) -> Tensor:
            apart = flat - center
            # Float64: squares of large float32 entries overflow. The root is taken only where it is differentiable.
            square = apart.double().square().sum(-1, keepdim=True)
            outside = square > self.radius**2
            scale = self.radius / torch.where(outside, square, torch.ones_like(square)).sqrt()
            return torch.where(outside, center + (apart * scale).to(flat.dtype), flat)

        return project


@final
@dataclass(frozen=True, eq=False)
class L1Ball(Set):
    """Bound the sum of absolute values: `{v: sum |v_j| <= radius}`, over all entries (of one block).

    Args:
        radius: >= 0.

    Raises:
        InvalidProblem: the radius is negative or not finite.

    References:
        J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, "Efficient projections onto the l1-ball for learning in high
        dimensions", ICML 2008.

    Example:
        >>> L1Ball(1.0).project(torch.tensor([-2.0, 1.5, 0.1]))
        tensor([-0.7500,  0.2500,  0.0000])
    """

    radius: float

    def __post_init__(self) -> None:
        _check_radius("L1Ball", self.radius)

    def project(self, point: Tensor) -> Tensor:
        """Return the projection of the whole tensor."""
        return self._rows(point.reshape(-1)).reshape(point.shape)

    def bind(self, layout: Layout) -> Projection:
        """Return the projection of flat vectors."""
        return self._rows

    def _rows(self, flat: Tensor) -> Tensor:
        size = flat.abs()
        inside = size.sum(-1, keepdim=True, dtype=torch.float64) <= self.radius
        return torch.where(inside, flat, flat.sign() * _onto_simplex(size, self.radius))


def _onto_simplex(rows: Tensor, total: float) -> Tensor:
    """Project the last dimension onto `{v >= 0, sum v = total}`."""
    # Subtracting the maximum changes nothing but rounding; float64 sums keep long float32 rows exact.
    shifted = rows - rows.amax(-1, keepdim=True).detach()
    falling = shifted.sort(dim=-1, descending=True).values
    excess = falling.cumsum(-1, dtype=torch.float64) - total
    count = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    active = (falling * count > excess).sum(-1, keepdim=True).clamp_min(1)
    threshold = excess.gather(-1, active - 1) / active
    return (shifted - threshold).clamp_min(0).to(rows.dtype)


def _check_radius(name: str, radius: float) -> None:
    if not (isfinite(radius) and radius >= 0):
        raise InvalidProblem(f"{name}(radius=...) must be finite and >= 0, got {radius}.")
