"""Solve the lower level alone: train with these hyperparameters, and say how well it went."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bilevel.dry_run import open_oracles
from bilevel.layout import Variables
from bilevel.optimizers import LBFGS, Minimum, ProximalGradient
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.status import Diverged, InvalidProblem, NonFinite, Status


@dataclass(frozen=True)
class LowerSolution:
    """What a minimization of the lower level ended in. All tensors are detached.

    Args:
        y: lower variables, structured like the start.
        upper_value: f(x, y), 0-dim.
        lower_value: g(x, y) with its regularizer, 0-dim.
        gradient_norm: of the lower objective in y; with a lower set or kinks, of the proximal gradient. 0-dim.
        status: CONVERGED, STALLED (as far as rounding lets it), or STEP_LIMIT.
        steps: iterations made.
    """

    y: Variables
    upper_value: Tensor
    lower_value: Tensor
    gradient_norm: Tensor
    status: Status
    steps: int


def solve_lower(
    problem: Problem,
    x: Variables,
    y0: Variables | None = None,
    *,
    tol: float = 1e-8,
    max_steps: int = 2000,
    step: int = 0,
    seed: int = 0,
) -> LowerSolution:
    """Minimize the lower objective at x from y0, and evaluate the upper one there.

        y = argmin g(x, .) + r(x, .) over Y,    from y0

    It is what a change of x is worth in the end: `F(x) = f(x, y)`. Where g is not convex, y is the minimum that the
    start leads to. L-BFGS solves smooth lower levels; proximal gradients those with a lower set or kinks.

    Args:
        problem: the statement, without constraints and with the same lower batch at every step.
        x: upper variables; projected on the upper set.
        y0: lower start; `problem.lower_init(x)` if None.
        tol: > 0, of the norm of the (proximal) gradient, in units of the lower objective over those of y.
        max_steps: >= 0.
        step: which batches.
        seed: of batches and of randomness inside the objectives.

    Returns:
        y with both values. Look at its status.

    Raises:
        InvalidProblem: constraints, mini-batches below, or what the dry run finds.
        Diverged: the lower objective falls without end.
        NonFinite: a lower value or gradient is not finite.

    Cost:
        One lower gradient a step, rarely more, and five to measure a proximal step.

    Example:
        >>> problem = Problem(
        ...     upper=lambda x, y, batch: (y - 3.0).square(), lower=lambda x, y, batch: (y - 2.0 * x).square())
        >>> found = solve_lower(problem, torch.tensor(1.0), torch.tensor(0.0))
        >>> round(float(found.y), 6), round(float(found.upper_value), 6), found.status.name
        (2.0, 1.0, 'CONVERGED')
    """
    optimizers = LBFGS(tol=tol, max_steps=max_steps), ProximalGradient(tol=tol, max_steps=max_steps)
    oracles, flat_x, flat_y = open_oracles(problem, x, y0, seed=seed, needs_hvp=False, trains=True)
    if problem.constraint is not None or problem.equality is not None:
        raise InvalidProblem(
            "solve_lower minimizes without constraints c(x, y) or h(x, y); solve with KKT or BLOCC, and check the "
            "answer by bilevel.conditions."
        )
    if not problem.deterministic_lower:
        raise InvalidProblem(
            "solve_lower needs the same lower batch at every step: state lower_data=bilevel.Full(...)."
        )
    if smooth(problem):
        found = minimize_smooth(oracles, optimizers[0], flat_x, flat_y, batch=step)
    else:
        found = minimize_proximal(oracles, optimizers[1], flat_x, oracles.project_y(flat_y), batch=step)
    lower_value, _ = oracles.lower_gradient(flat_x, found.y, step)
    upper = oracles.upper_gradient(flat_x, found.y, step)
    y = oracles.y_layout.unflatten(found.y)
    return LowerSolution(y, upper.value, lower_value, found.gradient_norm, found.status, found.steps)


def smooth(problem: Problem) -> bool:
    """Whether the lower level has neither a set nor kinks."""
    return problem.lower_set is None and (problem.regularizer is None or problem.regularizer.smooth)


def minimize_smooth(
    oracles: Oracles,
    optimizer: LBFGS,
    x: Tensor,
    y: Tensor,
    *,
    batch: int = 0,
    upper_step: int = 0,
    max_steps: int | None = None,
) -> Minimum:
    """Minimize a smooth lower objective at x from y, on one lower batch.

    Raises:
        Diverged: the lower objective falls without end.
        NonFinite: it is not finite wherever the line search looked.
    """
    found = optimizer.minimize(lambda point: oracles.lower_gradient(x, point, batch), y, max_steps=max_steps)
    return _ended(found, upper_step, "wherever L-BFGS looked", "a regularizer (bilevel.L2)")


def minimize_proximal(
    oracles: Oracles, optimizer: ProximalGradient, x: Tensor, y: Tensor, *, batch: int = 0, upper_step: int = 0
) -> Minimum:
    """Minimize a lower objective with kinks or a lower set at x from y, on one lower batch.

    Raises:
        Diverged: the lower objective falls without end.
        NonFinite: it is not finite wherever prox steps led.
    """
    declared = oracles.declared(x)
    found = optimizer.minimize(
        lambda point: oracles.lower_gradient(x, point, batch, declared=False),
        lambda v, length: oracles.project_y(declared.prox(v, length)),
        y,
    )
    return _ended(found, upper_step, "wherever prox steps led", "a regularizer or a lower_set")


def _ended(found: Minimum, upper_step: int, where: str, bound: str) -> Minimum:
    if found.status is Status.NON_FINITE:
        raise NonFinite(f"the lower objective is not finite at upper step {upper_step}, {where}.")
    if found.status is Status.DIVERGED:
        raise Diverged(
            f"the lower objective falls to {float(found.value):.3g} at upper step {upper_step} and may be unbounded "
            f"below; bound it with {bound}, or restrict x (upper_set)."
        )
    return found
