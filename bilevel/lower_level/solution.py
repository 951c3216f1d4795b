"""The door to the lower level alone: train with these hyperparameters, and say how well it went."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bilevel.dry_run import open_oracles
from bilevel.layout import Variables
from bilevel.lower_level.minimizers import minimize
from bilevel.problem import Problem
from bilevel.status import InvalidProblem, Status


@dataclass(frozen=True)
class LowerSolution:
    """What a minimization of the lower level ended in. All tensors are detached.

    Args:
        y: lower variables, structured like the start.
        upper_value: f(x, y), 0-dim.
        lower_value: g(x, y) with its regularizer, 0-dim.
        residual: norm of the lower gradient in y; with a lower set or kinks, of the proximal gradient. SLSQP does not
            tell it: what a relative error of sqrt(eps) would leave.
        status: CONVERGED, STALLED (as far as rounding lets it), or STEP_LIMIT.
        steps: iterations made.
    """

    y: Variables
    upper_value: Tensor
    lower_value: Tensor
    residual: float
    status: Status
    steps: int


def solve_lower(
    problem: Problem,
    x: Variables,
    y0: Variables | None = None,
    *,
    tol: float = 1e-8,
    max_steps: int | None = None,
    step: int = 0,
    seed: int = 0,
) -> LowerSolution:
    """Minimize the lower objective at x from y0, and evaluate the upper one there.

        y = argmin g(x, .) + r(x, .) over Y with c(x, .) <= 0,    from y0

    It is what a change of x is worth in the end: `F(x) = f(x, y)`. Where g is not convex, y is the minimum that the
    start leads to. L-BFGS solves smooth lower levels, proximal gradients those with a lower set or kinks, and SciPy's
    SLSQP those with constraints, up to 500 variables.

    Args:
        problem: the statement, with the same lower batch at every step.
        x: upper variables; projected on the upper set.
        y0: lower start; `problem.lower_init(x)` if None.
        tol: > 0, of the norm of the (proximal) gradient, in units of the lower objective over those of y. SLSQP goes as
            far as it can.
        max_steps: >= 0; None lets each minimizer choose: 2000 of L-BFGS and SLSQP, 20000 proximal gradients.
        step: which batches.
        seed: of batches and of randomness inside the objectives.

    Returns:
        y with both values. Look at its status.

    Raises:
        InvalidProblem: an option out of range, mini-batches below, constraints without SciPy or on more variables, or
            what the dry run finds.
        Diverged: the lower objective falls without end.
        NonFinite: a lower value or gradient is not finite.

    Cost:
        One lower gradient a step, rarely more, and five to measure a proximal step.

    Example:
        >>> import torch
        >>> problem = Problem(
        ...     upper=lambda x, y, batch: (y - 3.0).square(), lower=lambda x, y, batch: (y - 2.0 * x).square())
        >>> found = solve_lower(problem, torch.tensor(1.0), torch.tensor(0.0))
        >>> round(float(found.y), 6), round(float(found.upper_value), 6), found.status.name
        (2.0, 1.0, 'CONVERGED')
    """
    if not tol > 0 or (max_steps is not None and max_steps < 0):
        raise InvalidProblem(f"solve_lower needs tol > 0 and max_steps >= 0 or None, got {tol} and {max_steps}.")
    oracles, flat_x, flat_y = open_oracles(problem, x, y0, seed=seed, needs_hvp=False, trains=True)
    if not problem.deterministic_lower:
        raise InvalidProblem(
            "solve_lower needs the same lower batch at every step: state lower_data=bilevel.Full(...)."
        )
    found = minimize(oracles, flat_x, flat_y, step, tol=tol, max_steps=max_steps)
    lower_value, _ = oracles.lower_gradient(flat_x, found.y, step)
    upper = oracles.upper_gradient(flat_x, found.y, step)
    y = oracles.y_layout.unflatten(found.y)
    return LowerSolution(y, upper.value, lower_value, found.residual, found.status, found.steps)
