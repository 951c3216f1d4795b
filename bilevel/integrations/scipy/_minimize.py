"""SciPy's optimizers on the upper level, for hypergradients that are accurate. Needs the extra `scipy`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from bilevel.callbacks import Callback
from bilevel.dry_run import open_oracles
from bilevel.hypergradients import Implicit
from bilevel.integrations.scipy._run import Run
from bilevel.integrations.scipy._sets import stated
from bilevel.layout import Variables
from bilevel.linear import CG
from bilevel.optimizers import LBFGS, ProximalGradient
from bilevel.problem import Problem
from bilevel.solution import Solution
from bilevel.solvers import HypergradientDescent, SparseDescent
from bilevel.solvers._base import Solver
from bilevel.status import InvalidProblem

Method: TypeAlias = Literal["L-BFGS-B", "SLSQP", "trust-constr"]


def minimize(
    problem: Problem,
    x0: Variables,
    y0: Variables | None = None,
    *,
    method: Method | None = None,
    solver: Solver[Any] | None = None,
    steps: int = 200,
    tol: float = 1e-6,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Solution:
    """Minimize `F(x) = f(x, y*(x))` with a quasi-Newton method of SciPy.

    Each evaluation solves the lower level tightly and certifies the hypergradient. Few evaluations are needed, but
    values and hypergradients must agree with one another: line searches stall on what is noise to them. For
    mini-batches and cheap, rough hypergradients use `bilevel.solve`.

    Args:
        problem: what to minimize; every step must see the same data.
        x0: upper start, projected on the upper set.
        y0: lower start; `problem.lower_init(x0)` if None.
        method: "L-BFGS-B" (bounds), "SLSQP" or "trust-constr" (bounds and linear constraints). None: the first that
            takes the upper set. Box and NonNegative become bounds; Halfspace, Affine and Simplex linear constraints;
            a Product may hold any of them.
        solver: gives hypergradients by its `certify`; its upper optimizer is not used. None: `HypergradientDescent`
            with L-BFGS and CG run to 1e-10, or `SparseDescent` where the lower level has a set or kinks.
        steps: iterations of SciPy, >= 0; each takes one evaluation or more.
        tol: > 0, converged where `‖x - P(x - h)‖ <= tol`, h the hypergradient, P the projection on the upper set.
        callbacks: called after each evaluation with an `Event`, at the x that was evaluated; one that returns True
            stops the run.
        seed: of randomness inside the objectives.
        options: handed to SciPy, over the ones set here.

    Returns:
        A `Solution` with one row of history an evaluation, each with its error estimate. CONVERGED only where the
        measure above says so, whatever SciPy says; STALLED where SciPy could go no further, STEP_LIMIT, STOPPED, or
        the status of a failed evaluation. `x` is feasible.

    Raises:
        InvalidProblem: an upper set that SciPy cannot take by this method, random batches, a solver that forms no
            hypergradient, and whatever the dry run finds.

    Cost:
        Per evaluation: a lower solve, a hypergradient, and its certificate (about two more).

    Notes:
        HypergradientInaccurate is warned of where the estimated error of the last hypergradient exceeds `tol`. F has
        kinks where active sets of the lower level change, on which these methods may stall.

    References:
        Byrd, Lu, Nocedal, Zhu (1995), "A limited memory algorithm for bound constrained optimization"; Kraft (1988),
        "A software package for sequential quadratic programming"; Byrd, Hribar, Nocedal (1999), "An interior point
        algorithm for large-scale nonlinear programming".

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.ridge()
        >>> solution = minimize(task.problem, task.x0, task.y0)
        >>> solution.status.name, len(solution.history) < 60
        ('CONVERGED', True)
    """
    if steps < 0 or not tol > 0:
        raise InvalidProblem(f"minimize needs steps >= 0 and tol > 0, got {steps} and {tol}.")
    solver = _fitting(problem) if solver is None else solver
    oracles, x, y = open_oracles(problem, x0, y0, seed=seed, needs_hvp=solver.needs_hvp, trains=solver.replays)
    for level, data in (("upper", problem.upper_data), ("lower", problem.lower_data)):
        if data is not None and not data.deterministic:
            raise InvalidProblem(
                f"the {level} data give another batch each step; SciPy needs one function: use bilevel.Full, or "
                "bilevel.solve."
            )
    bounds, constraints = stated(problem.upper_set, oracles.x_layout, x)
    chosen = method or ("SLSQP" if constraints else "L-BFGS-B")
    if chosen not in _OPTIONS:
        raise InvalidProblem(f"method must be one of {', '.join(_OPTIONS)}, got {method!r}.")
    if constraints and chosen == "L-BFGS-B":
        raise InvalidProblem(f"L-BFGS-B takes bounds only, not {problem.upper_set!r}: use SLSQP or trust-constr.")
    run = Run(oracles, solver, solver.init(oracles, x, y), callbacks, tol)
    return run.to_end(
        x,
        method=chosen,
        bounds=bounds,
        constraints=constraints,
        options=_OPTIONS[chosen](tol / math.sqrt(len(x)), steps) | dict(options or {}),
    )


_OPTIONS: dict[str, Any] = {
    "L-BFGS-B": lambda tol, steps: {"gtol": tol, "ftol": 0.0, "maxiter": steps, "maxfun": 10 * steps + 10},
    "SLSQP": lambda tol, steps: {"ftol": 1e-4 * tol**2, "maxiter": steps},
    "trust-constr": lambda tol, steps: {"gtol": 0.0, "xtol": 1e-16, "barrier_tol": 1e-16, "maxiter": steps},
}
"""When each method gives up by itself; where x is stationary, the run stops it before."""


def _fitting(problem: Problem) -> Solver[Any]:
    if problem.proximal:
        return SparseDescent(lower=ProximalGradient(tol=1e-10, max_steps=10_000))
    return HypergradientDescent(
        lower=LBFGS(tol=1e-10), lower_steps=2000, estimator=Implicit(linear=CG(tol=1e-10, max_steps=1000))
    )
