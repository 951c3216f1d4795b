"""Bounds on each entry by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, final

import torch
from torch import Tensor

from bilevel.layout import Layout
from bilevel.sets._base import Projection, Set, is_nested, project_bare
from bilevel.status import InvalidProblem


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
            try:
                lower, upper = (torch.as_tensor(bound, dtype=torch.float64) for bound in (self.lower, self.upper))
            except (TypeError, ValueError) as error:
                raise InvalidProblem(f"Box: {self.lower!r} and {self.upper!r} are no bounds; give numbers.") from error
            if lower.dim() == 0 or upper.dim() == 0 or lower.shape == upper.shape:
                _check_bounds(lower, upper, lambda index: "")

    def project(self, point: Tensor) -> Tensor:
        """Return `point` clamped to the bounds."""
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


def _check_bounds(lower: Tensor, upper: Tensor, where: Callable[[int], str]) -> None:
    bad = ~((lower <= upper) & (lower < inf) & (upper > -inf))
    if bad.any():
        index = int(bad.reshape(-1).nonzero()[0])
        low, high = (float(bound.expand(bad.shape).reshape(-1)[index]) for bound in (lower, upper))
        raise InvalidProblem(f"Box: bounds must satisfy lower <= upper, got {low} and {high}{where(index)}.")
