"""Projections of both levels' variables at once, for `Problem(joint_set=...)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, final

import torch
from torch import Tensor

from bilevel.layout import Layout, Variables
from bilevel.sets._base import Set
from bilevel.status import Infeasible, InvalidProblem

DOUBLINGS = 60
BISECTIONS = 200
SWEEPS = 20_000
CLOSE = 1e-11
"""Where alternating projections stop: a change, and a distance between the sets, relative to the size of the point."""


@final
@dataclass(frozen=True, eq=False)
class JointHalfspace:
    """Project on `{(x, y) in X x Y: <normal_x, x> + <normal_y, y> <= offset}`.

    Without sets a formula; with them, one multiplier t is bisected: the answer is the projection on X x Y of the point
    moved by t against the normal, for the least t >= 0 at which it is feasible. Exact for every X and Y.

    Args:
        normal_x: given like a bound of `Box`, for x.
        normal_y: likewise for y. Both normals must not be 0.
        offset: finite.
        upper_set: X, None for all x.
        lower_set: Y, None for all y. It sees y as one vector: blocks need a joint set of your own.

    Raises:
        InvalidProblem: a normal or the offset is not finite, or both normals are 0.

    Cost:
        One pass over the numbers, or about 60 projections on X and Y.

    Example:
        >>> near = JointHalfspace(1.0, 1.0, offset=2.0)
        >>> near(torch.tensor(2.0), torch.tensor(4.0))
        (tensor(0.), tensor(2.))
    """

    normal_x: Any
    normal_y: Any
    offset: float
    upper_set: Set | None = None
    lower_set: Set | None = None

    def __post_init__(self) -> None:
        if not isfinite(self.offset):
            raise InvalidProblem(f"JointHalfspace(offset=...) must be finite, got {self.offset}.")

    def __call__(self, x: Variables, y: Variables) -> tuple[Variables, Variables]:
        """Return the nearest feasible pair, structured like `(x, y)`."""
        pair = _Pair.of(x, y)
        normal = torch.cat(
            [
                layout.spread(given, 0.0, what=f"JointHalfspace({name})", dtype=torch.float64).expand(layout.size)
                for name, given, layout in (("normal_x", self.normal_x, pair.x), ("normal_y", self.normal_y, pair.y))
            ]
        ).detach()
        square = normal.square().sum()
        if not normal.isfinite().all() or not square > 0:
            raise InvalidProblem("JointHalfspace: the normals must be finite and not both 0.")
        project = pair.product(self.upper_set, self.lower_set)
        return pair.nested(_onto_halfspace(pair.flat(x, y), normal, self.offset, project))


@final
@dataclass(frozen=True, eq=False)
class JointPolyhedron:
    """Project on `{(x, y) in X x Y: matrix_x x + matrix_y y <= offset}`, with `=` in the rows marked as equations.

    Without sets an exact quadratic program by an active-set method, which ends after finitely many steps; with them,
    it alternates with projections on X x Y (Dykstra), up to a relative 1e-11.

    Args:
        matrix_x: `[k, p]`, on the flat x: its leaves in order, each row by row.
        matrix_y: `[k, d]`, on the flat y.
        offset: `[k]`.
        equations: booleans `[k]`, which rows are equations; None: none is.
        upper_set: X, None for all x.
        lower_set: Y, None for all y. It sees y as one vector: blocks need a joint set of your own.

    Raises:
        InvalidProblem: shapes differ, or an entry is not finite.

    Cost:
        One QR decomposition at construction, `[p + d, k]`; then about one least-squares problem `[k, active]` for each
        active row.

    References:
        Lawson, Hanson, "Solving least squares problems", 1974 (algorithms NNLS and LDP). Dykstra, "An algorithm for
        restricted least squares regression", Journal of the American Statistical Association, 1983.

    Example:
        >>> near = JointPolyhedron(torch.eye(2), torch.ones(2, 1), offset=torch.tensor([1.0, 1.0]))
        >>> near(torch.tensor([2.0, 0.0]), torch.tensor([0.0]))
        (tensor([1.5000, 0.0000]), tensor([-0.5000]))
    """

    matrix_x: Tensor
    matrix_y: Tensor
    offset: Tensor
    equations: Tensor | None = None
    upper_set: Set | None = None
    lower_set: Set | None = None
    _rows: Tensor = field(init=False, repr=False)
    _basis: Tensor = field(init=False, repr=False)
    _triangle: Tensor = field(init=False, repr=False)
    _lengths: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        k, mask = self.offset.shape, self.equations
        if (
            self.offset.dim() != 1
            or self.matrix_x.dim() != 2
            or self.matrix_y.dim() != 2
            or not self.matrix_x.shape[:1] == self.matrix_y.shape[:1] == k
            or (mask is not None and (mask.shape != k or mask.dtype != torch.bool))
        ):
            raise InvalidProblem(
                "JointPolyhedron needs matrix_x [k, p], matrix_y [k, d], offset [k] and equations (booleans [k]), got "
                f"{tuple(self.matrix_x.shape)}, {tuple(self.matrix_y.shape)}, {tuple(k)} and "
                f"{None if mask is None else (mask.dtype, tuple(mask.shape))}."
            )
        rows = torch.cat([self.matrix_x, self.matrix_y], dim=1).detach().double()
        if not (rows.isfinite().all() and self.offset.isfinite().all()):
            raise InvalidProblem("JointPolyhedron: matrices and offset must be finite.")
        lengths = rows.norm(dim=1)
        lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        rows = rows / lengths[:, None]
        basis, triangle = torch.linalg.qr(rows.T)
        for name, value in (("_rows", rows), ("_basis", basis), ("_triangle", triangle), ("_lengths", lengths)):
            object.__setattr__(self, name, value)

    def __call__(self, x: Variables, y: Variables) -> tuple[Variables, Variables]:
        """Return the nearest feasible pair, structured like `(x, y)`.

        Raises:
            InvalidProblem: the matrices do not fit x and y.
            Infeasible: no pair satisfies the rows (and lies in X x Y).
        """
        pair = _Pair.of(x, y)
        if (self.matrix_x.shape[1], self.matrix_y.shape[1]) != (pair.x.size, pair.y.size):
            raise InvalidProblem(
                f"JointPolyhedron: matrices with {self.matrix_x.shape[1]} and {self.matrix_y.shape[1]} columns do not "
                f"fit x with {pair.x.size} and y with {pair.y.size} entries."
            )
        point, onto_sets = pair.flat(x, y), pair.product(self.upper_set, self.lower_set)
        if onto_sets is None:
            return pair.nested(self._onto_rows(point))
        return pair.nested(_alternated(point, self._onto_rows, onto_sets))

    def _onto_rows(self, point: Tensor) -> Tensor:
        """Project on the polyhedron alone: the least u with `rows (point + u) <= offset`, through its dual."""
        excess = self._rows @ point - self.offset.double() / self._lengths
        free = torch.zeros_like(excess, dtype=torch.bool) if self.equations is None else self.equations
        missed = torch.where(free, excess.abs(), excess.clamp_min(0))
        scale = missed.max() if len(missed) else missed.sum()
        if not scale > 0:
            return point
        # Least distance as nonnegative least squares: min ‖E m - e_last‖ with the columns (-row, excess / scale).
        columns = torch.cat([-self._triangle, (excess / scale)[None]])
        target = torch.zeros_like(columns[:, 0])
        target[-1] = 1.0
        multiplier, active = _nonnegative_least_squares(columns, target, free)
        rest = columns @ multiplier - target
        if rest.norm() <= 1e-9:
            worst = int(missed.argmax())
            raise Infeasible(
                f"JointPolyhedron: no (x, y) satisfies all rows; row {worst} misses by {float(missed[worst]):.3g} "
                "(relative to its length) at the point to project.",
                index=worst,
                amount=float(missed[worst] * self._lengths[worst]),
            )
        # The active rows are known: meet them as equations, without the loss of digits of the detour.
        near: Tensor = point - self._basis @ (torch.linalg.pinv(self._triangle[:, active].T) @ excess[active])
        return near


@dataclass(frozen=True)
class _Pair:
    """x and y as one vector in float64."""

    x: Layout
    y: Layout

    @classmethod
    def of(cls, x: Variables, y: Variables) -> _Pair:
        return cls(Layout.of(x, name="x"), Layout.of(y, name="y"))

    def flat(self, x: Variables, y: Variables) -> Tensor:
        return torch.cat([self.x.flatten(x), self.y.flatten(y)]).double()

    def nested(self, flat: Tensor) -> tuple[Variables, Variables]:
        x, y = flat.to(self.x.dtype).split([self.x.size, self.y.size])
        return self.x.unflatten(x), self.y.unflatten(y)

    def product(self, upper: Set | None, lower: Set | None) -> Callable[[Tensor], Tensor] | None:
        """Return the projection on X x Y, None if both are everything."""
        if upper is None and lower is None:
            return None
        parts = [
            (lambda v: v) if kept is None else kept.bind(layout) for kept, layout in ((upper, self.x), (lower, self.y))
        ]

        def project(flat: Tensor) -> Tensor:
            x, y = flat.split([self.x.size, self.y.size])
            return torch.cat([parts[0](x), parts[1](y)])

        return project


def _onto_halfspace(
    point: Tensor, normal: Tensor, offset: float, onto_sets: Callable[[Tensor], Tensor] | None
) -> Tensor:
    if onto_sets is None:
        near: Tensor = point - ((normal @ point - offset).clamp_min(0) / normal.square().sum()) * normal
        return near

    def excess(t: Tensor) -> tuple[Tensor, Tensor]:
        moved = onto_sets(point - t * normal)
        return normal @ moved - offset, moved

    low = torch.zeros((), dtype=point.dtype, device=point.device)
    over, nearest = excess(low)
    if over <= 0:
        return nearest
    high = over / normal.square().sum()
    for _ in range(DOUBLINGS):
        over, nearest = excess(high)
        if over <= 0:
            break
        high = 2 * high
    else:
        raise Infeasible(
            f"JointHalfspace: no (x, y) in X x Y is feasible; the least excess found is {float(over):.3g}.",
            index=0,
            amount=float(over),
        )
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        over, moved = excess(middle)
        low, high, nearest = (low, middle, moved) if over <= 0 else (middle, high, nearest)
    return nearest


def _alternated(point: Tensor, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Tensor:
    """Project on the intersection of two sets by Dykstra's alternating projections; the answer is in the second."""
    at, p, q = point, torch.zeros_like(point), torch.zeros_like(point)
    for _ in range(SWEEPS):
        through = first(at + p)
        p = at + p - through
        after = second(through + q)
        q = through + q - after
        size = CLOSE * (1 + after.norm())
        if (after - at).norm() <= size and (after - through).norm() <= size:
            return after
        at = after
    gap = (after - through).abs()
    raise Infeasible(
        f"JointPolyhedron: after {SWEEPS} alternating projections the rows and X x Y are still "
        f"{float(gap.norm()):.3g} apart: they have no point in common, or touch at too small an angle.",
        index=int(gap.argmax()),
        amount=float(gap.max()),
    )


def _nonnegative_least_squares(columns: Tensor, target: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Return `argmin ‖columns m - target‖` over `m >= 0` (any sign where `free`), and which columns are in use."""
    count = columns.shape[1]
    m, used = columns.new_zeros(count), free.clone()
    tol = 1e-12 * columns.norm(dim=0)
    if used.any():
        m[used] = torch.linalg.pinv(columns[:, used]) @ target
    for _ in range(3 * count + 10):
        descent = columns.T @ (target - columns @ m)
        descent[used] = 0.0
        best = int((descent - tol).argmax())
        if not descent[best] > tol[best]:
            break
        used[best] = True
        for _ in range(count):
            trial = torch.zeros_like(m)
            trial[used] = torch.linalg.pinv(columns[:, used]) @ target
            blocking = used & ~free & (trial <= 0)
            if not blocking.any():
                break
            ratios = m[blocking] / (m[blocking] - trial[blocking])
            m = m + ratios.min() * (trial - m)
            leaving = blocking & (m <= 1e-14 * m.abs().max())
            # At least the row that blocked leaves, whatever rounding makes of it.
            leaving[blocking.nonzero()[int(ratios.argmin())]] = True
            used, m = used & ~leaving, torch.where(leaving, torch.zeros_like(m), m)
        m = trial
    return m, used
