"""What one upper step of a solver takes, in calls of the oracles and in memory, before any step is made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any, NamedTuple

from bilevel.hypergradients.implicit import Implicit
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.linear import CG, MINRES, Dense, Identity, LinearSolver, Neumann, Nystrom
from bilevel.optimizers import LBFGS, SGD, Adam, AdamW, Optimizer
from bilevel.problem import Problem
from bilevel.replay import Schedule, Sqrt, StoreAll
from bilevel.solvers import (
    BAMM,
    BDA,
    BLOCC,
    BOME,
    F2BA,
    F2SA,
    F3SA,
    GPBGD,
    LVHBA,
    MEHA,
    VPBGD,
    HypergradientDescent,
    Metagradient,
    ProxF2SA,
)

MEASUREMENT = 10
"""Products that measuring the largest curvature takes, at some steps."""


class Sizes(NamedTuple):
    """What costs depend on.

    Args:
        upper: p, entries of x.
        lower: d, entries of y, all blocks together.
        row: entries of y in one block.
        graph: bytes that the graph of one lower gradient holds, beside the data.
        itemsize: bytes of a number.
    """

    upper: int
    lower: int
    row: int
    graph: int
    itemsize: int


class Cost(NamedTuple):
    """Calls in one upper step, and bytes held during it.

    Args:
        gradients: of both objectives and constraints, in most steps.
        hvps: likewise.
        crosses: cross products.
        bytes: of vectors and graphs, beside the data and what the objectives use while they run; an estimate.
        most: gradients, HVPs and cross products of no step are more; equal to the above where it is exact.
    """

    gradients: int
    hvps: int
    crosses: int
    bytes: int
    most: tuple[int, int, int]

    @property
    def exact(self) -> bool:
        """Whether every step takes just that."""
        return self.most == (self.gradients, self.hvps, self.crosses)


def cost_of(solver: Any, problem: Problem, sizes: Sizes) -> Cost | None:
    """Return what one upper step takes, None where it cannot be told in advance (or the solver is not known)."""
    calls = calls_of(solver, problem, sizes)
    if calls is None:
        return None
    typical, most, vectors, graphs = calls
    vectors_bytes = (vectors * sizes.lower + 4 * sizes.upper) * sizes.itemsize
    return Cost(*typical, bytes=vectors_bytes + graphs * sizes.graph, most=most)


Calls = tuple[tuple[int, int, int], tuple[int, int, int], int, int]
"""(gradients, HVPs, cross products) of most steps; the most of any; vectors like y held; graphs held."""


@singledispatch
def calls_of(solver: Any, problem: Problem, sizes: Sizes) -> Calls | None:
    """Return the calls of one step; `calls_of.register` teaches it solvers of your own."""
    return None


def _exactly(gradients: int, hvps: int = 0, crosses: int = 0, *, vectors: int, graphs: int = 1) -> Calls:
    calls = (gradients, hvps, crosses)
    return calls, calls, vectors, graphs


# -- one step, counted from the algorithms ---------------------------------------------------------------------------


@calls_of.register
def _(solver: F2SA, problem: Problem, sizes: Sizes) -> Calls:
    return _exactly(3 * (solver.lower_steps + 1) + 1, vectors=8)


@calls_of.register
def _(solver: F2BA, problem: Problem, sizes: Sizes) -> Calls:
    return _exactly(3 * (solver.lower_steps + 1) + 2, vectors=6)


@calls_of.register
def _(solver: F3SA, problem: Problem, sizes: Sizes) -> Calls:
    return _exactly(13, vectors=10)


@calls_of.register
def _(solver: ProxF2SA, problem: Problem, sizes: Sizes) -> Calls:
    return _exactly(3 * (solver.lower_steps + 1) + 1, vectors=8)


@calls_of.register
def _(solver: VPBGD, problem: Problem, sizes: Sizes) -> Calls:
    typical, most = (solver.lower_steps + 3, 0, 0), (solver.lower_steps + 3 + 240, 0, 0)
    return typical, most if solver.measure_every else typical, 4, 1


@calls_of.register
def _(solver: BOME, problem: Problem, sizes: Sizes) -> Calls:
    typical, most = (solver.lower_steps + 3, 0, 0), (solver.lower_steps + 3 + 48, 0, 0)
    return typical, most if solver.measure_every else typical, 5, 1


@calls_of.register
def _(solver: MEHA, problem: Problem, sizes: Sizes) -> Calls:
    return _exactly(6, vectors=6)


@calls_of.register
def _(solver: LVHBA, problem: Problem, sizes: Sizes) -> Calls:
    return _exactly(4 + 2 * _constraints(problem), vectors=6)


@calls_of.register
def _(solver: BLOCC, problem: Problem, sizes: Sizes) -> Calls:
    T = solver.lower_steps
    return _exactly(3 * T + 4 + 2 * (T + 1) * _constraints(problem), vectors=6)


@calls_of.register
def _(solver: BAMM, problem: Problem, sizes: Sizes) -> Calls:
    typical = (2 if solver.mu == 0 else 3, 1, 1)
    most = (typical[0] + 64, 1, 1) if solver.measure_every else typical
    return typical, most, 5, 1


@calls_of.register
def _(solver: BDA, problem: Problem, sizes: Sizes) -> Calls:
    T = solver.lower_steps
    typical = (2 * T + 2, T, T)
    return typical, (typical[0] + 32, T, T) if solver.measure_every else typical, T + 4, T


@calls_of.register
def _(solver: GPBGD, problem: Problem, sizes: Sizes) -> Calls:
    typical = (2, 1, 1)
    return typical, (34, 17, 17) if solver.measure_every else typical, 4, 1


@calls_of.register
def _(solver: HypergradientDescent, problem: Problem, sizes: Sizes) -> Calls | None:
    if isinstance(solver.estimator, Unrolled):
        return _unrolled(solver.estimator, sizes)
    products = _products(solver.estimator.linear, sizes) if isinstance(solver.estimator, Implicit) else None
    if products is None or not isinstance(solver.estimator, Implicit) or solver.estimator.polish:
        return None
    (hvps, most_hvps, vectors), T = products, solver.lower_steps
    lower = solver.lower
    if lower is None:
        lower = LBFGS() if problem.deterministic_lower else SGD(lr=None)
    if isinstance(lower, LBFGS):
        # A line search that fails is tried once more along the gradient.
        gradients, most = T + 1, 1 + (2 * T + 1) * lower.max_trials
        vectors += 2 * lower.memory + 14
    else:
        gradients = most = T
        vectors += 2
    return (gradients + 2, hvps, 1), (most + 2, most_hvps, 1), vectors + 3, 1


@calls_of.register
def _(solver: Metagradient, problem: Problem, sizes: Sizes) -> Calls | None:
    estimator = solver.estimator
    return _unrolled(estimator, sizes) if isinstance(estimator, Unrolled) else None


def _unrolled(estimator: Unrolled, sizes: Sizes) -> Calls:
    visited = estimator.steps if estimator.truncate is None else min(estimator.truncate, estimator.steps)
    schedule, state = estimator.schedule, 1 + _moments(estimator.lower)
    fitted = schedule.fitted(visited, state * sizes.lower * sizes.itemsize)
    # Every step before those visited, every one visited, those repeated, the upper gradient, the lower one at the end.
    gradients = estimator.steps + fitted.advances(visited) + 2
    typical = (gradients, visited, visited)
    most = typical if not estimator.lower.needs_lr else (gradients + 1, visited + MEASUREMENT, visited)
    return typical, most, state * (fitted.peak(visited) + 3), _graphs(fitted, visited)


# -- parts -------------------------------------------------------------------------------------------------------------


def _products(linear: LinearSolver, sizes: Sizes) -> tuple[int, int, int] | None:
    """Return the products of a linear solve: usually, at most; and the vectors that it holds."""
    if isinstance(linear, CG | MINRES):
        steps = 2 * sizes.row if linear.max_steps is None else linear.max_steps
        prepared = 0
        if isinstance(linear, CG) and linear.preconditioner is not None:
            prepared = sizes.row  # no preconditioner here takes more products than there are variables
        # The residual of the warm start, and one after each restart, of which each has made a step.
        return min(steps, sizes.row) + 2, 2 * steps + 2 + prepared, 8
    if isinstance(linear, Neumann):
        measured = 0 if linear.alpha is not None else MEASUREMENT
        return linear.terms + 2, linear.terms + 2 + measured, 5
    if isinstance(linear, Nystrom):
        return linear.rank + 1, linear.rank + 1, 3 * linear.rank
    if isinstance(linear, Dense):
        return sizes.row, sizes.row, 3 * sizes.row
    return (1, 1, 2) if isinstance(linear, Identity) else None


def _moments(optimizer: Optimizer[Any]) -> int:
    """Return how many vectors like y the state of an optimizer holds."""
    if isinstance(optimizer, SGD):
        return 0 if optimizer.momentum == 0.0 else 1
    return 2 if isinstance(optimizer, Adam | AdamW) else 1


def _graphs(schedule: Schedule, steps: int) -> int:
    """Return how many graphs of lower gradients a schedule holds at once."""
    match schedule:
        case StoreAll(graphs=True):
            return steps
        case Sqrt(graphs=True):
            return steps - schedule.advances(steps)
    return 1


def _constraints(problem: Problem) -> int:
    parts: Sequence[Any] = (problem.constraint, problem.equality)
    return sum(part is not None for part in parts)
