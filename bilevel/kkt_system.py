"""The lower level's optimality conditions as a smooth system, with exact dense derivatives: for small problems.

dg/dy + (dc/dy)^T lam + (dh/dy)^T nu - low + high = 0,   h = 0,   c <= 0 <= lam,   lo <= y <= hi,   low, high >= 0
and complementarity:   lam c = 0,   low (y - lo) = 0,   high (hi - y) = 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.layout import Layout
from bilevel.oracles import Function, Oracles
from bilevel.sets import Box, NonNegative, Set
from bilevel.status import InvalidProblem

LARGEST = 500
FAR = 1e300
Vector: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parts:
    """The unknowns of the system, cut out of one vector v: x `[p]`, y `[d]` and the multipliers."""

    x: Tensor
    y: Tensor
    constraint: Tensor
    equality: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class KKTSystem:
    """Both levels of a problem as functions of one vector of x, y and multipliers.

    Args:
        oracles: the problem's; its batches of step 0 are used throughout.
        x: a point, for sizes.
        y: a point, for sizes.

    Raises:
        InvalidProblem: more than 500 unknowns, blocks, a nonsmooth regularizer, or sets other than Box and NonNegative.
    """

    oracles: Oracles
    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        problem = self.oracles.problem
        if problem.blocks is not None:
            raise InvalidProblem("the reference solver takes no blocks; stack them into one lower problem.")
        if self.size > LARGEST:
            raise InvalidProblem(f"the reference solver takes up to {LARGEST} unknowns, got {self.size}; use LVHBA.")
        for name, given in (("upper_set", problem.upper_set), ("lower_set", problem.lower_set)):
            if given is not None and not isinstance(given, Box | NonNegative):
                raise InvalidProblem(
                    f"the reference solver takes {name}=Box or NonNegative, got {type(given).__name__}; write it as "
                    "constraint= or equality=."
                )

    # -- unknowns ------------------------------------------------------------------------------------------------

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of x, y, and the multipliers of c, h, lo, hi (0 for a bound that is infinite everywhere)."""
        lower, upper = self.y_bounds
        bounded = (int(lower.isfinite().sum()), int(upper.isfinite().sum()))
        return (len(self.x), len(self.y), self._length("constraint"), self._length("equality"), *bounded)

    @property
    def size(self) -> int:
        """Number of unknowns."""
        return sum(self.sizes)

    def split(self, v: Tensor) -> Parts:
        """Cut v into its parts."""
        return Parts(*v.split(self.sizes))

    @cached_property
    def x_bounds(self) -> tuple[Tensor, Tensor]:
        """Bounds of x, infinite where there are none."""
        return _bounds(self.oracles.problem.upper_set, self.oracles.x_layout, self.x)

    @cached_property
    def y_bounds(self) -> tuple[Tensor, Tensor]:
        """Bounds of y."""
        return _bounds(self.oracles.problem.lower_set, self.oracles.y_layout, self.y)

    # -- functions -----------------------------------------------------------------------------------------------

    def upper(self, v: Tensor) -> Tensor:
        """Return f, 0-dim."""
        parts = self.split(v)
        return self._call("upper", parts.x, parts.y)

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        """Return g with its regularizer, 0-dim."""
        regularizer, layout = self.oracles.problem.regularizer, self.oracles.y_layout
        value = self._call("lower", x, y)
        if regularizer is None:
            return value
        coefficients = regularizer.coefficients(self.oracles.x_layout.unflatten(x), layout)
        return value + regularizer.value(coefficients, y)

    def constraint(self, x: Tensor, y: Tensor) -> Tensor:
        """Return c `[q]`, empty without a constraint."""
        return self._vector("constraint", x, y)

    def equality(self, x: Tensor, y: Tensor) -> Tensor:
        """Return h `[r]`, empty without an equality."""
        return self._vector("equality", x, y)

    def stationarity(self, v: Tensor) -> Tensor:
        """Return the gradient in y of the lower Lagrangian, `[d]`."""
        parts = self.split(v)

        def lagrangian(y: Tensor) -> Tensor:
            value = self.lower(parts.x, y) + self.constraint(parts.x, y) @ parts.constraint
            return value + self.equality(parts.x, y) @ parts.equality

        slope: Tensor = torch.func.grad(lagrangian)(parts.y)
        lower, upper = self.y_bounds
        return slope - self._place(parts.low, lower) + self._place(parts.high, upper)

    def slacks(self, v: Tensor) -> Tensor:
        """Return what must be >= 0 beside the multipliers: -c, y - lo, hi - y."""
        parts = self.split(v)
        lower, upper = self.y_bounds
        above, below = (parts.y - lower)[lower.isfinite()], (upper - parts.y)[upper.isfinite()]
        return torch.cat([-self.constraint(parts.x, parts.y), above, below])

    def multipliers(self, v: Tensor) -> Tensor:
        """Return the multipliers that go with `slacks`."""
        parts = self.split(v)
        return torch.cat([parts.constraint, parts.low, parts.high])

    def equalities(self, v: Tensor) -> Tensor:
        """Return what must be 0: the stationarity of the lower level and h."""
        parts = self.split(v)
        return torch.cat([self.stationarity(v), self.equality(parts.x, parts.y)])

    def violation(self, v: Tensor) -> Tensor:
        """Return the largest violation of any condition of the lower level, 0-dim."""
        slacks, multipliers = self.slacks(v), self.multipliers(v)
        parts = torch.cat([self.equalities(v).abs(), -slacks, -multipliers, (slacks * multipliers).abs()])
        return parts.clamp_min(0).max()

    def _call(self, name: Function, x: Tensor, y: Tensor) -> Tensor:
        # Under a transform too: one call of the user's function, whatever is derived from it.
        self.oracles.count(values=1)
        return self.oracles.call(name, 0, self.oracles.x_layout.views(x), self.oracles.y_layout.views(y))

    def _vector(self, name: Function, x: Tensor, y: Tensor) -> Tensor:
        if getattr(self.oracles.problem, name) is None:
            return y.new_zeros(0)
        return self._call(name, x, y).reshape(-1)

    def _length(self, name: Function) -> int:
        return len(self._vector(name, self.x, self.y))

    def _place(self, values: Tensor, bound: Tensor) -> Tensor:
        # Scatter into the bounded entries without writing in place, so that it can be transformed.
        index = bound.isfinite().nonzero().squeeze(-1)
        return torch.zeros_like(bound).index_add(0, index, values)


def _bounds(constraint: Set | None, layout: Layout, like: Tensor) -> tuple[Tensor, Tensor]:
    """Read the bounds of an elementwise set off the projections of points far away."""
    if constraint is None:
        return torch.full_like(like, -torch.inf), torch.full_like(like, torch.inf)
    project = constraint.bind(layout)
    ends = []
    for far in (-FAR, FAR):
        end = project(torch.full_like(like, far))
        ends.append(torch.where(end.abs() >= FAR, torch.full_like(end, far * torch.inf), end))
    return ends[0], ends[1]
