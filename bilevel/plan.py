"""Which solver fits a problem, what a step of each would cost, and which one to take, from what holds at the start."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from bilevel import solvers
from bilevel.costs import Cost, Sizes, cost_of
from bilevel.data import Episodes
from bilevel.facts import Facts, described, measured
from bilevel.hypergradients import Implicit
from bilevel.layout import Variables
from bilevel.linear import CG, Dense, Jacobi
from bilevel.optimizers import SGD, Optimizer
from bilevel.problem import Problem
from bilevel.report import Row, table
from bilevel.solvers import (
    BAMM,
    BLOCC,
    F2SA,
    KKT,
    LVHBA,
    MEHA,
    VPBGD,
    HypergradientDescent,
    Metagradient,
    ProxF2SA,
    SparseDescent,
    amigo,
    imaml,
    implicit,
)
from bilevel.solvers._base import Solver
from bilevel.solvers.published import maml
from bilevel.status import BilevelError, InvalidProblem

Auto: TypeAlias = Literal["auto"]
"""In place of a solver: the one that `plan` recommends."""

SMALL = 100
"""Lower variables up to which d products, all at once, are no price for an exact solve."""
KKT_SIZE = 100
"""Unknowns up to which SciPy solves for both levels together."""
SPREAD = 10.0
"""Ratio of declared curvatures from which on a preconditioner that undoes them pays."""


@dataclass(frozen=True)
class Choice:
    """One solver with its defaults.

    Args:
        name: as in `bilevel`.
        family: "second order", "first order" (no second derivatives) or "through training".
        fits: whether it may be used on the problem.
        why: why not; or a caution, or nothing.
        cost: of one upper step, None where it cannot be told in advance.
    """

    name: str
    family: str
    fits: bool
    why: str
    cost: Cost | None


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `print` it.

    Args:
        facts: measured at the start.
        choices: every solver of the library with its defaults.
        recommended: what to write, None if no solver fits.
        reason: of the recommendation, or why there is none.
        cost: of one upper step of what is recommended, None where it cannot be told in advance.
        chosen: the recommended solver itself.
    """

    facts: Facts
    choices: tuple[Choice, ...]
    recommended: str | None
    reason: str
    cost: Cost | None
    chosen: Solver[Any] | None

    def solver(self) -> Solver[Any]:
        """Return the recommended solver.

        Raises:
            InvalidProblem: none fits.
        """
        if self.chosen is None:
            raise InvalidProblem(f"no solver fits this problem as stated: {self.reason}")
        return self.chosen

    def __str__(self) -> str:
        rows: list[Row] = []
        for choice in self.choices:
            row: Row = {"solver": choice.name, "family": choice.family, "fits": "yes" if choice.fits else "no"}
            rows.append(row | (_cells(choice.cost) if choice.fits else {}) | {"note": choice.why or None})
        lines = [described(self.facts), "", table(rows), ""]
        if any(choice.cost is not None and not choice.cost.exact for choice in self.choices):
            lines += ["Costs are those of one upper step; ~: of most steps, it depends on where they lead.", ""]
        lines.append(f"Recommended: {self.recommended or 'none'}, because {self.reason}")
        if self.cost is not None:
            cells = _cells(self.cost)
            lines.append(f"One upper step: {cells['gradients']} gradients, {cells['HVPs']} HVPs, {cells['crosses']} "
                         f"cross products, {cells['MiB']} MiB beside the data.")  # fmt: skip
        return "\n".join(lines)


def plan(
    problem: Problem,
    x0: Variables,
    y0: Variables | None = None,
    *,
    lower: Optimizer[Any] | None = None,
    lower_steps: int = 50,
    seed: int = 0,
) -> Plan:
    """Measure a problem at its start, and say which solvers fit it, what a step of each costs, and which one to take.

    The recommendation rests on what was measured: constraints and kinks of the lower level, whether second derivatives
    work, its curvature at the start and near it, whether all lower batches are alike, and sizes. A lower level that
    looks convex at two points need not be; then the certificate of the solve tells.

    Args:
        problem: the statement.
        x0: upper start.
        y0: lower start; `problem.lower_init(x0)` if None.
        lower: optimizer of y, where training itself is the lower level: x acts through it, or counts as it is and not
            by its limit.
        lower_steps: of each training, with `lower`.
        seed: of batches and of randomness inside the objectives.

    Raises:
        InvalidProblem: and relatives, from the dry run at the door.

    Cost:
        About 20 gradients, and 60 products with the lower Hessian.

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.quadratic()
        >>> found = plan(task.problem, task.x0, task.y0)
        >>> found.recommended, found.cost.crosses
        ('implicit(linear=Dense())', 1)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a solve warns of the same
        oracles, x, y, facts = measured(problem, x0, y0, seed)
        sizes = Sizes(facts.upper, y.numel(), facts.lower, facts.graph, facts.itemsize)
        choices = tuple(_judged(name, problem, facts, sizes) for name in solvers.__all__)
        troubles: list[str] = []
        for name, solver, reason in _candidates(problem, facts, lower, lower_steps):
            try:
                solver.init(oracles, x, y)
            except (BilevelError, ImportError) as error:
                troubles.append(f"{name}: {error}")
                continue
            return Plan(facts, choices, name, reason, cost_of(solver, problem, sizes), solver)
    unfit = f"{facts.only_through_training} If it acts through an optimizer, name it: plan(..., lower=SGD(...))."
    return Plan(facts, choices, None, " | ".join(troubles) or unfit, None, None)


# -- which solvers fit ------------------------------------------------------------------------------------------------


def _judged(name: str, problem: Problem, facts: Facts, sizes: Sizes) -> Choice:
    solver: Solver[Any] = getattr(solvers, name)()
    family = "through training" if solver.replays else "second order" if solver.needs_hvp else "first order"
    why = _objection(solver, problem, facts)
    if why:
        return Choice(name, family, False, why, None)
    return Choice(name, family, True, _caution(solver, facts), cost_of(solver, problem, sizes))


def _objection(solver: Solver[Any], problem: Problem, facts: Facts) -> str:
    """Say why a solver must not be used, in a few words."""
    try:
        solver.refuse(problem)
    except InvalidProblem as error:
        return "does not handle " + str(error).partition("does not handle ")[2].partition(":")[0]
    if facts.only_through_training is not None and not solver.replays:
        return "x acts through the start or the optimizer of training alone"
    if facts.second_order is None and (solver.needs_hvp or solver.replays):
        return "the lower objective cannot be differentiated twice"
    if isinstance(solver, KKT):
        if importlib.util.find_spec("scipy") is None:
            return "needs SciPy"
        if facts.upper + facts.lower * (facts.blocks or 1) > KKT_SIZE:
            return f"more than {KKT_SIZE} unknowns"
    if isinstance(solver, LVHBA) and problem.constrained and problem.joint_set is None:
        return "needs Problem(joint_set=...), a projection on the joint set"
    return ""


def _caution(solver: Solver[Any], facts: Facts) -> str:
    if isinstance(solver, HypergradientDescent) and not solver.replays:
        if facts.bends_down:
            return "not convex here: damping, or a start near a minimum"
        if facts.flat:
            return "flat directions here: an L2 regularizer, or damping"
    if facts.second_order == "differences" and solver.needs_hvp:
        return "each product is a difference of gradients"
    return ""


# -- which one to take ------------------------------------------------------------------------------------------------

Candidate: TypeAlias = tuple[str, Solver[Any], str]


def _candidates(problem: Problem, facts: Facts, lower: Optimizer[Any] | None, steps: int) -> Iterator[Candidate]:
    """Yield what to take, and why, the best first; the first that accepts the problem is recommended."""
    if facts.only_through_training is not None:
        if problem.blocks is not None and problem.lower_init is not None and lower is None:
            held = problem.lower_data.steps if isinstance(problem.lower_data, Episodes) else 1
            name = f"maml(lower_steps={held})" if held > 1 else "maml()"
            yield name, maml(lower_steps=held), f"x is the start from which {problem.blocks} tasks are adapted to"
        if lower is not None or problem.lower_init is not None:
            yield _trained(lower, steps, "x acts through training alone, so training itself is differentiated")
    elif problem.constrained:
        yield from _constrained(problem, facts)
    elif facts.parts:
        yield from _nonsmooth(facts)
    elif facts.second_order in (None, "differences"):
        yield "F2SA()", F2SA(), "second derivatives of the lower objective are missing, and F2SA needs none"
    elif facts.bends_down:
        yield from _nonconvex(problem, facts, lower, steps)
    elif facts.flat:
        low, high = facts.curvature or (0.0, 0.0)
        why = (
            f"the lower objective is flat in places (curvature from {low:.2g} to {high:.2g}): its solutions may be many"
        )
        if lower is not None:
            yield _trained(lower, steps, f"{why}, and training says which")
        yield "BAMM()", BAMM(), why
        yield "MEHA()", MEHA(), why
    else:
        yield from _convex(problem, facts)


def _trained(lower: Optimizer[Any] | None, steps: int, reason: str) -> Candidate:
    solver = Metagradient(lower=SGD(lr=None) if lower is None else lower, lower_steps=steps)
    return f"Metagradient(lower=..., lower_steps={steps})", solver, reason


def _constrained(problem: Problem, facts: Facts) -> Iterator[Candidate]:
    unknowns = facts.upper + facts.lower * (facts.blocks or 1)
    if unknowns <= KKT_SIZE and facts.every_batch_alike and importlib.util.find_spec("scipy") is not None:
        yield "KKT()", KKT(), f"the lower level has constraints, and {unknowns} unknowns are few enough for SciPy"
    if problem.joint_set is not None:
        yield "LVHBA()", LVHBA(), "the lower level has constraints, and there is a joint projection"
    yield "BLOCC()", BLOCC(), "the lower level has constraints, and no joint projection"


def _nonsmooth(facts: Facts) -> Iterator[Candidate]:
    what = "kinks" if "kinks" in facts.parts else "a lower set"
    if facts.every_batch_alike and facts.second_order not in (None, "differences"):
        yield "SparseDescent()", SparseDescent(), f"{what}: it differentiates on the active set, and is certified"
    if "kinks" in facts.parts:
        yield "MEHA()", MEHA(), "kinks: it needs their prox alone"
    else:
        yield "ProxF2SA()", ProxF2SA(), "a lower set: it projects on it, and needs no second derivatives"
        yield "VPBGD()", VPBGD(), "a lower set: it projects on it, and needs no second derivatives"


def _nonconvex(problem: Problem, facts: Facts, lower: Optimizer[Any] | None, steps: int) -> Iterator[Candidate]:
    assert facts.curvature is not None
    low, high = facts.curvature
    seen = f"the lower objective is not convex (curvature from {low:.2g} to {high:.2g})"
    if lower is not None:
        yield _trained(lower, steps, f"{seen}; the derivative of training holds for any shape")
    elif facts.every_batch_alike:
        damping = float(f"{2 * abs(low):.1g}")
        estimator = Implicit(linear=CG(damping=damping), truncate=True)
        yield (
            f"HypergradientDescent(estimator=Implicit(linear=CG(damping={damping:g}), truncate=True), lower_steps=100)",
            HypergradientDescent(estimator=estimator, lower_steps=100),
            f"{seen}; damping covers what it curves downwards, and many lower steps lead to where it does not",
        )
    yield "F2SA()", F2SA(), f"{seen} and seen in mini-batches; F2SA solves no linear system"


def _convex(problem: Problem, facts: Facts) -> Iterator[Candidate]:
    assert facts.curvature is not None
    low, high = facts.curvature
    seen = f"the lower objective is smooth and looks strongly convex (curvature from {low:.2g} to {high:.2g})"
    if problem.blocks is not None and problem.lower_init is not None:
        yield "imaml()", imaml(), f"{seen}, in {problem.blocks} blocks that start from x"
    elif not facts.every_batch_alike:
        yield (
            "amigo()",
            amigo(),
            f"{seen} and comes in mini-batches: a few steps on y and on the linear system each time",
        )
    elif facts.lower <= SMALL:
        yield (
            "implicit(linear=Dense())",
            implicit(linear=Dense()),
            f"{seen}, and d = {facts.lower} is small: solve exactly",
        )
    elif facts.spread > SPREAD:
        yield (
            "implicit(linear=CG(preconditioner=Jacobi()))",
            implicit(linear=CG(preconditioner=Jacobi())),
            f"{seen}, and declared weights that differ {facts.spread:.2g}-fold are undone by a preconditioner",
        )
    yield "implicit()", implicit(), seen


# -- words ------------------------------------------------------------------------------------------------------------


def _cells(cost: Cost | None) -> Row:
    if cost is None:
        return {"gradients": "?", "HVPs": "?", "crosses": "?", "MiB": "?"}
    about = ["" if now == most else "~" for now, most in zip(cost[:3], cost.most, strict=True)]
    calls = dict(
        zip(("gradients", "HVPs", "crosses"), (f"{a}{n}" for a, n in zip(about, cost[:3], strict=True)), strict=True)
    )
    return calls | {"MiB": f"{cost.bytes / 2**20:.2g}"}
