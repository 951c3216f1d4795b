"""Closed convex sets, given by their Euclidean projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, final

import torch
from torch import Tensor

from bilevel._linear_sets import Affine, Halfspace
from bilevel._set import Projection, Set, is_list, is_nested, project_bare
from bilevel.layout import Layout
from bilevel.status import InvalidProblem

__all__ = [
    "Affine",
    "Ball",
    "Box",
    "Halfspace",
    "L1Ball",
    "NonNegative",
    "Product",
    "Projection",
    "Set",
    "Simplex",
]


@final
@dataclass(frozen=True, eq=False)
class Box(Set):
    """Bound each entry: `{v: lower <= v <= upper}`; its projection clamps.

    Args:
        lower: a number, a tensor that broadcasts to the variable, or a structure nested like the variables whose
            entries broadcast to their leaves. Left out dict keys, and -inf, mean no bound.
        upper: likewise, with inf.

    Raises:
        InvalidProblem: a bound is not a number, or lower > upper, or (at `bind`) a bound fits no leaf.

    Example:
        >>> Box(-1, torch.tensor([1.0, 5.0])).project(torch.tensor([-3.0, 7.0]))
        tensor([-1.,  5.])
    """

    lower: Any = -inf
    upper: Any = inf

    def __post_init__(self) -> None:
        if not is_nested(self.lower) and not is_nested(self.upper):
            lower, upper = (torch.as_tensor(bound, dtype=torch.float64) for bound in (self.lower, self.upper))
            if lower.dim() == 0 or upper.dim() == 0 or lower.shape == upper.shape:
                _check_bounds(lower, upper, lambda index: "")

    def project(self, point: Tensor) -> Tensor:
        """Return `point` clamped to the bounds.

        Raises:
            InvalidProblem: the bounds are nested or have another shape; then use `bind`.
        """
        if is_nested(self.lower) or is_nested(self.upper):
            raise InvalidProblem("Box with nested bounds has no projection of a bare tensor; use bind(layout).")
        return project_bare(self, point)

    def bind(self, layout: Layout) -> Projection:
        """Return the clamp of flat vectors."""
        lower = layout.spread(self.lower, -inf, what="Box(lower)")
        upper = layout.spread(self.upper, inf, what="Box(upper)")
        _check_bounds(lower, upper, lambda index: f" for '{layout.name_of(index % layout.size)}'")
        lower, upper = lower.detach().clone(), upper.detach().clone()
        return lambda flat: flat.clamp(lower, upper)


@final
@dataclass(frozen=True, eq=False)
class NonNegative(Set):
    """Keep each entry at least 0: `{v: v >= 0}`.

    Example:
        >>> NonNegative().project(torch.tensor([-3.0, 7.0]))
        tensor([0., 7.])
    """

    def project(self, point: Tensor) -> Tensor:
        """Return `max(point, 0)`."""
        return point.clamp_min(0)

    def bind(self, layout: Layout) -> Projection:
        """Return the projection of flat vectors."""
        return self.project


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
        if is_nested(self.center):
            raise InvalidProblem("Ball with a nested center has no projection of a bare tensor; use bind(layout).")
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


@final
@dataclass(frozen=True, eq=False)
class Product(Set):
    """Constrain parts of the variables, each by a set of its own.

    Args:
        structure: nested like the variables, with a Set or None (free) at each leaf. A set higher up constrains all
            leaves below it together. Left out dict keys are free.

    Raises:
        InvalidProblem: an entry is no Set, or (at `bind`) the nesting differs or a set does not fit its leaf.

    Example:
        >>> layout = Layout.of({"rate": torch.zeros(1), "mix": torch.zeros(2)})
        >>> Product({"mix": Simplex()}).bind(layout)(torch.tensor([-7.0, 3.0, 0.0]))
        tensor([-7.,  1.,  0.])
    """

    structure: Any

    def project(self, point: Tensor) -> Tensor:
        """Return the projection of a bare tensor, for a structure that is a bare set; else use `bind`."""
        return project_bare(self, point)

    def bind(self, layout: Layout) -> Projection:
        """Return the projection of flat vectors, part by part."""
        parts: list[tuple[slice, Projection]] = []
        _collect(layout, layout.skeleton, self.structure, parts)

        def project(flat: Tensor) -> Tensor:
            pieces, at = [], 0
            for place, part in parts:
                pieces += [flat[..., at : place.start], part(flat[..., place])]
                at = place.stop
            return torch.cat([*pieces, flat[..., at:]], dim=-1)

        return project


def _collect(layout: Layout, node: Any, structure: Any, parts: list[tuple[slice, Projection]]) -> None:
    if structure is None:
        return
    if isinstance(structure, Set):
        place, own = layout.part(node)
        parts.append((place, structure.bind(own)))
    elif isinstance(structure, Mapping) and isinstance(node, Mapping) and structure.keys() <= node.keys():
        for key, child in node.items():
            _collect(layout, child, structure.get(key), parts)
    elif is_list(structure) and is_list(node) and len(structure) == len(node):
        for child, entry in zip(node, structure, strict=True):
            _collect(layout, child, entry, parts)
    else:
        names = layout.part(node)[1].names
        raise InvalidProblem(f"Product: {structure!r} does not fit the leaves {names}; give Sets nested like them.")


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


def _check_bounds(lower: Tensor, upper: Tensor, where: Callable[[int], str]) -> None:
    bad = ~((lower <= upper) & (lower < inf) & (upper > -inf))
    if bad.any():
        index = int(bad.reshape(-1).nonzero()[0])
        low, high = (float(bound.expand(bad.shape).reshape(-1)[index]) for bound in (lower, upper))
        raise InvalidProblem(f"Box: bounds must satisfy lower <= upper, got {low} and {high}{where(index)}.")


def _check_radius(name: str, radius: float) -> None:
    if not (isfinite(radius) and radius >= 0):
        raise InvalidProblem(f"{name}(radius=...) must be finite and >= 0, got {radius}.")
