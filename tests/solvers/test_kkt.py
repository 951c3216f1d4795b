"""The reference solver: constrained toys to 1e-6 from its default starts, and what it says of its answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

import bilevel
from bilevel import InvalidProblem, Problem
from bilevel.problems import Task
from bilevel.problems.toys import box, ineq, llc, mci, shen, sin
from bilevel.solvers.kkt import KKT


def solved(task: Task, solver: KKT, steps: int = 6) -> bilevel.Solution:
    return bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize("make", [ineq, mci, box, llc, partial(llc, n=8)], ids=["ineq", "mci", "box", "llc", "llc-8"])
def test_constrained_toys(make: Callable[[], Task]) -> None:
    task = make()
    solution = solved(task, KKT())
    error = task.x_error(solution.x)
    assert error is not None
    assert error <= 1e-6
    assert task.evaluate is not None
    assert task.evaluate(solution.x, solution.y)["y_error"] <= 1e-6
    report = solution.state.report
    assert float(report.lower_violation) <= 1e-9
    assert float(report.upper_violation) == 0.0
    assert float(report.lower_gap) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("make", [ineq, mci, box, llc], ids=["ineq", "mci", "box", "llc"])
def test_constrained_toys_by_trust_region(make: Callable[[], Task]) -> None:
    task = make()
    solution = solved(task, KKT(starts=1, method="trust-constr", max_steps=400))
    error = task.x_error(solution.x)
    assert error is not None
    assert error <= 1e-4


def test_several_starts_find_the_global_minimum() -> None:
    """From 0.4 one start ends in the local minimum of 0.3824; more starts find 1.2152."""
    task = shen(start=0.3)
    local = solved(task, KKT(starts=1))
    assert float(local.x) == pytest.approx(0.3823600747669883, abs=1e-5)
    best = solved(task, KKT(starts=8, spread=1.5))
    assert float(best.x) == pytest.approx(1.2151454754759206, abs=1e-5)
    assert best.best_value < local.best_value


@pytest.mark.parametrize(
    ("make", "multiplier"), [(ineq, 2.5), (mci, 0.0), (llc, -(3**0.5))], ids=["ineq", "mci", "llc"]
)
def test_multipliers_are_told(make: Callable[[], Task], multiplier: float) -> None:
    task = make()
    solution = solved(task, KKT(starts=1))
    assert float(solution.state.multiplier) == pytest.approx(multiplier, abs=1e-6)
    found = bilevel.conditions(task.problem, solution.x, solution.y, solution.state.multiplier)
    for value in (found.upper_violation, found.lower_violation, found.stationarity, found.complementarity):
        assert float(value) < 1e-9


def test_margin_tells_an_inactive_multiplier() -> None:
    """INEQ's constraint is active with multiplier 2.5; MCI's is active with multiplier 0: a kink in x is near."""
    assert float(solved(ineq(), KKT(starts=1)).state.report.multiplier_margin) == pytest.approx(2.5)
    assert float(solved(mci(), KKT(starts=1)).state.report.multiplier_margin) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_lower_stationary_point_that_is_no_minimum_has_a_gap() -> None:
    """`g = (y^2 - 1)^2 + y / 2` has a worse local minimum near 0.93; f prefers it, the reformulation cannot tell."""
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square() + x.square(),
        lower=lambda x, y, b: (y.square() - 1).square() + 0.5 * y + 0.0 * x * y,
    )
    start = torch.ones((), dtype=torch.float64)
    solution = bilevel.solve(problem, KKT(starts=3, spread=2.0, max_steps=50), start, start, steps=3)
    assert float(solution.y) == pytest.approx(0.93, abs=0.02)
    assert float(solution.state.report.lower_gap) > 0.5


def test_smooth_unconstrained_problems_are_a_special_case() -> None:
    task = bilevel.problems.quadratic()
    solution = solved(task, KKT(starts=1), steps=2)
    error = task.x_error(solution.x)
    assert error is not None
    assert error <= 1e-6
    convex = sin(n=1)
    assert KKT().backtracked(0.5) == KKT()
    assert solved(convex, KKT(starts=2), steps=2).state.report is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"starts": 0}, "starts >= 1"),
        ({"relaxation": 0.0}, "relaxation > 0"),
        ({"shrink": 1.0}, "shrink < 1"),
        ({"method": "COBYLA"}, "SLSQP"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        KKT(**options)  # type: ignore[arg-type]


def test_what_it_cannot_treat_is_refused() -> None:
    task = bilevel.problems.quadratic()
    parts = {
        "too many unknowns": (bilevel.problems.quadratic(d=600), {}, "up to 500 unknowns"),
        "single precision": (bilevel.problems.quadratic(dtype=torch.float32), {}, "float64"),
        "another set": (task, {"lower_set": bilevel.Ball(1.0)}, "Box or NonNegative, got Ball"),
        "kinks": (task, {"regularizer": bilevel.ElasticNet(l1=0.1)}, "kinks"),
        "batches": (task, {"lower_data": bilevel.Shuffled(torch.zeros(8, 1), batch_size=2)}, "same batch"),
    }
    for of, change, message in parts.values():
        problem = Problem(upper=of.problem.upper, lower=of.problem.lower, **change)  # type: ignore[arg-type]
        with pytest.raises(InvalidProblem, match=message):
            bilevel.solve(problem, KKT(starts=1), of.x0, of.y0, steps=1)
