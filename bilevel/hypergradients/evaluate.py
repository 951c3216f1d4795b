"""The door for people with a loop of their own: one hypergradient, on request."""

from __future__ import annotations

from bilevel.dry_run import open_oracles
from bilevel.hypergradients._base import Estimator, Hypergradient
from bilevel.hypergradients.active_set import ActiveSet
from bilevel.hypergradients.implicit import Implicit
from bilevel.hypergradients.kkt import ImplicitKKT
from bilevel.layout import Variables
from bilevel.problem import Problem
from bilevel.status import NonFinite


def hypergradient(
    problem: Problem,
    x: Variables,
    y: Variables,
    *,
    estimator: Estimator | None = None,
    step: int = 0,
    seed: int = 0,
    certify: bool = True,
) -> Hypergradient:
    """Estimate `dF/dx` at `(x, y)`, where y (nearly) minimizes the lower objective at x.

    Args:
        problem: the statement.
        x: upper variables.
        y: a lower solution at x, as exact as you have it.
        estimator: how; if None, `ImplicitKKT()` where the lower level has constraints, `ActiveSet()` where it has a
            lower set or kinks, else `Implicit()`.
        step: which batches.
        seed: of batches and of randomness inside the objectives.
        certify: estimate the error too, for about two more hypergradients.

    Returns:
        The gradient, structured like x and detached, with its certificate.

    Raises:
        InvalidProblem: and relatives, from the dry run.
        LinearSolveFailed: the linear system has no trustworthy solution.
        NonFinite: the hypergradient is infinite or not a number.

    Example:
        >>> import torch
        >>> problem = Problem(
        ...     upper=lambda x, y, batch: 0.5 * (y - 3.0).square().sum(),
        ...     lower=lambda x, y, batch: (y - 2.0 * x).square().sum())
        >>> h = hypergradient(problem, torch.tensor(1.0), torch.tensor(2.0))
        >>> float(h.gradient)  # a (a x - t) with a = 2, t = 3
        -2.0
    """
    chosen = fitting(problem) if estimator is None else estimator
    oracles, flat_x, flat_y = open_oracles(problem, x, y, seed=seed, trains=chosen.replays)
    state = chosen.init(oracles, flat_x, flat_y)
    estimate, _ = chosen.estimate(oracles, flat_x, flat_y, state, upper_step=step, lower_step=step, certify=certify)
    bad = (~estimate.gradient.isfinite()).nonzero()
    if len(bad):
        leaf = oracles.x_layout.name_of(int(bad[0]))
        raise NonFinite(
            f"the hypergradient in x's leaf '{leaf}' is not finite at step {step}, though both objectives are: scale "
            "them, or use float64."
        )
    return Hypergradient(oracles.x_layout.unflatten(estimate.gradient), estimate.certificate)


def fitting(problem: Problem) -> Estimator:
    """Return the estimator for what the lower level of a problem is made of."""
    if not isinstance(problem, Problem):  # which the door will say
        return Implicit()
    if problem.constrained:
        return ImplicitKKT()
    return ActiveSet() if problem.proximal else Implicit()
