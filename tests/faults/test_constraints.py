"""Faults of constraints below: no feasible start, none at some x, no constraint qualification, wrong statements."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import BLOCC, KKT, LVHBA, Box, Infeasible, InfeasibleStart, InvalidProblem, Problem, Solver, Status
from bilevel.sets.joint import JointHalfspace, JointPolyhedron

SOLVERS: dict[str, Solver[Any]] = {"LVHBA": LVHBA(), "BLOCC": BLOCC(), "KKT": KKT(starts=1)}


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def halfspace(**fields: Any) -> Problem:
    """Return min (y - 3)² / 2, y <= 2 - x below; with x <= 1.5 the solution is x = 1.5, y = .5."""
    parts: dict[str, Any] = {
        "upper": lambda x, y, b: 0.5 * (x - 2).square().sum() + 0.5 * (y - 1).square().sum(),
        "lower": lambda x, y, b: 0.5 * (y - 3).square().sum(),
        "constraint": lambda x, y, b: x + y - 2,
        "joint_set": JointHalfspace(1.0, 1.0, offset=2.0),
    }
    return Problem(**(parts | fields))


# -- 44: infeasible start ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_row_44_infeasible_starts_are_mended(name: str) -> None:
    starts = doubles(4.0), doubles(7.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = bilevel.solve(halfspace(), SOLVERS[name], *starts, steps=2)
    assert solution.status is Status.COMPLETED
    assert float(solution.x + solution.y) <= 2 + 0.2
    assert (starts[0].tolist(), starts[1].tolist()) == ([4.0], [7.0])


@pytest.mark.parametrize("name", ["BLOCC", "KKT"])
def test_row_44_where_x_must_move_that_is_told(name: str) -> None:
    problem = halfspace(joint_set=None, lower_set=Box(0.0, 5.0))
    with pytest.warns(InfeasibleStart, match=r"no lower variables satisfy the constraints at x0.*moved in x by 1\."):
        solution = bilevel.solve(problem, SOLVERS[name], doubles(3.0), doubles(0.0), steps=0)
    assert float(solution.x) == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["BLOCC", "KKT"])
def test_row_44_without_a_feasible_point_the_entry_and_its_amount_are_named(name: str) -> None:
    problem = halfspace(joint_set=None, constraint=lambda x, y, b: torch.cat([y - 9, y.square() + 1.5]))
    message = r"at the start x0: entry 1 of the constraint misses by 1\.5.*feasible where <= 0.*relax the constraint"
    with pytest.raises(Infeasible, match=message) as caught:
        bilevel.solve(problem, SOLVERS[name], doubles(0.0), doubles(0.0))
    assert caught.value.index == 1
    assert caught.value.amount == pytest.approx(1.5)


def test_row_44_joint_sets_without_a_point() -> None:
    empty = JointPolyhedron(torch.zeros(2, 1), doubles(1.0, -1.0)[:, None], doubles(0.0, -1.0))
    problem = halfspace(constraint=lambda x, y, b: torch.cat([y, 1 - y]), joint_set=empty)
    with pytest.raises(Infeasible, match=r"no \(x, y\) satisfies all rows"):
        bilevel.solve(problem, LVHBA(), doubles(0.0), doubles(0.0))


# -- 45: empty lower set for some x ------------------------------------------------------------------------------------


def emptied(**fields: Any) -> Problem:
    """Return a problem whose lower level, 0 <= y <= 1 - x, is empty for x > 1, while the upper level strives for 3."""
    return Problem(
        upper=lambda x, y, b: 0.5 * (x - 3).square().sum() + 0.5 * y.square().sum(),
        lower=lambda x, y, b: 0.5 * (y - 1).square().sum(),
        constraint=lambda x, y, b: torch.cat([y + x - 1, -y]),
        **fields,
    )


@pytest.mark.parametrize("how", ["raise", "backtrack"])
def test_row_45_a_lower_level_without_feasible_points_ends_the_run(how: Any) -> None:
    start = doubles(0.0), doubles(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning about multipliers beside it
        solution = bilevel.solve(emptied(), BLOCC(), *start, steps=100, on_nonfinite=how)
    assert solution.status is (Status.INFEASIBLE if how == "raise" else Status.STALLED)
    assert not solution.status.ok
    assert "no lower variables found that satisfy the constraints at the x of step" in solution.message
    assert "bound x with upper_set, or relax the constraint" in solution.message
    assert "was c >= 0 meant" not in solution.message
    assert solution.state.step < 64


def test_row_45_the_advice_helps() -> None:
    bounded = emptied(upper_set=Box(-5.0, 0.9))
    solution = bilevel.solve(bounded, BLOCC(), doubles(0.0), doubles(0.5), steps=100)
    assert solution.status is Status.COMPLETED
    assert float(solution.x) == pytest.approx(0.9)
    assert float(solution.y) == pytest.approx(0.1, abs=1e-2)


def test_row_45_joint_projections_never_leave_the_domain() -> None:
    rows = JointPolyhedron(doubles(1.0, 0.0)[:, None], doubles(1.0, -1.0)[:, None], doubles(1.0, 0.0))
    solution = bilevel.solve(emptied(joint_set=rows), LVHBA(), doubles(0.0), doubles(0.5), steps=300)
    assert solution.status is Status.COMPLETED
    assert float(solution.x) == pytest.approx(1.0, abs=2e-2)
    exact = bilevel.solve(emptied(), KKT(starts=1), doubles(0.0), doubles(0.5), steps=6)
    assert float(exact.x) == pytest.approx(1.0, abs=1e-6)


# -- 46: no constraint qualification -----------------------------------------------------------------------------------


def squared(**fields: Any) -> Problem:
    """Return y = x stated as (y - x)² <= 0: no multiplier exists. The solution is x = 1/2."""
    return Problem(
        upper=lambda x, y, b: 0.5 * (x - 1).square().sum() + 0.5 * y.square().sum(),
        lower=lambda x, y, b: 0.5 * (y - 3).square().sum(),
        constraint=lambda x, y, b: (y - x).square(),
        **fields,
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_row_46_squares_of_equations(name: str) -> None:
    """Without the check KKT would end at x = 3, where the conditions hold by accident."""
    joint = (lambda x, y: (0.5 * (x + y), 0.5 * (x + y))) if name == "LVHBA" else None
    solution = bilevel.solve(squared(joint_set=joint), SOLVERS[name], doubles(0.0), doubles(0.0), steps=200)
    assert solution.status is Status.CQ_FAILURE
    assert not solution.status.ok
    assert "cancel or vanish there" in solution.message
    assert "Restate the constraints (no squares of equations" in solution.message


def test_row_46_in_single_precision() -> None:
    """There the square of 1e-3 is 0 up to rounding."""
    solution = bilevel.solve(squared(), BLOCC(), torch.zeros(1), torch.zeros(1), steps=64)
    assert solution.status is Status.CQ_FAILURE
    assert "cancel or vanish there" in solution.message


@pytest.mark.parametrize("name", SOLVERS)
def test_row_46_restating_the_equation_is_the_advice_that_helps(name: str) -> None:
    row = JointPolyhedron(doubles(-1.0)[:, None], doubles(1.0)[:, None], doubles(0.0), torch.tensor([True]))
    plain = squared()
    problem = Problem(upper=plain.upper, lower=plain.lower, equality=lambda x, y, b: y - x, joint_set=row)
    steps = {"LVHBA": 600, "BLOCC": 100, "KKT": 6}[name]
    solution = bilevel.solve(problem, SOLVERS[name], doubles(0.0), doubles(0.0), steps=steps)
    assert solution.status is Status.COMPLETED
    assert float(solution.x) == pytest.approx(0.5, abs=2e-2)
    assert float(solution.state.multiplier) == pytest.approx(2.5, abs=5e-2)


def shrinking() -> Problem:
    """y1² - y2 <= x and y1² + y2 <= 0: at x = 0, where the upper level goes, 0 is all that is left, on both bounds."""
    return Problem(
        upper=lambda x, y, b: x.sum(),
        lower=lambda x, y, b: y[0] + 0.05 * y.square().sum(),
        constraint=lambda x, y, b: torch.stack([y[0].square() - y[1] - x.sum(), y[0].square() + y[1]]),
        upper_set=Box(0.0, 5.0),
    )


@pytest.mark.slow
def test_row_46_a_lower_level_that_shrinks_to_a_point() -> None:
    solution = bilevel.solve(shrinking(), BLOCC(lower_steps=30), doubles(1.0), doubles(0.0, 0.0), steps=200)
    assert solution.status is Status.CQ_FAILURE
    assert float(solution.state.multiplier.min()) > 10


def test_row_46_multipliers_of_a_lower_level_that_shrinks_to_a_point_are_told() -> None:
    """Both grow like 1 / (4 |y1|) as x falls; the reference solver stops short of x = 0, where there are none."""
    solution = bilevel.solve(shrinking(), KKT(starts=1), doubles(1.0), doubles(0.0, 0.0), steps=4)
    found = bilevel.conditions(shrinking(), solution.x, solution.y, solution.state.multiplier)
    assert float(found.constraint_multiplier.min()) > 30
    assert 0 <= float(solution.x) < 1e-3


@pytest.mark.parametrize("name", SOLVERS)
def test_row_46_large_multipliers_alone_are_no_fault(name: str) -> None:
    """g in other units has a multiplier of 2.5e4."""
    problem = halfspace(lower=lambda x, y, b: 0.5e4 * (y - 3).square().sum())
    solver = {"LVHBA": LVHBA(bound=1e6), "BLOCC": BLOCC(bound=1e6), "KKT": KKT(starts=1)}[name]
    steps = 6 if name == "KKT" else 130
    solution = bilevel.solve(problem, solver, doubles(0.0), doubles(0.0), steps=steps)
    assert solution.status is Status.COMPLETED
    assert float(solution.state.multiplier.max()) > 5e3


# -- 47: wrong statements ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (lambda x, y, b: (x + y - 2).sum(), r"returned shape \(\); for one entry use \.reshape\(1\)"),
        (lambda x, y, b: (x + y - 2) <= 0, r"returned torch\.bool; return the amount"),
        (lambda x, y, b: (x + y - 2).sqrt(), r"is not finite in entry 0 at the start"),
        (lambda x, y, b: x - 2, r"does not depend on y; what binds x alone belongs in upper_set"),
    ],
    ids=["shape", "comparison", "nan", "x-alone"],
)
def test_row_47_wrong_constraints(name: str, constraint: Any, text: str) -> None:
    problem = halfspace(constraint=constraint)
    with pytest.raises(InvalidProblem, match=rf"the constraint {text}.*returns one tensor \[q\].*feasible where <= 0"):
        bilevel.solve(problem, SOLVERS[name], doubles(0.0), doubles(0.0))


def test_row_47_flipped_signs() -> None:
    """y² >= -1 was meant, and stated as c >= 0 instead of c <= 0."""
    problem = halfspace(constraint=lambda x, y, b: y.square() + 1, joint_set=None)
    with pytest.raises(Infeasible, match=r"At the start all entries are >= 0: was c >= 0 meant\? Then return -c"):
        bilevel.solve(problem, BLOCC(), doubles(0.0), doubles(0.0))
    flipped = halfspace(constraint=lambda x, y, b: 2 - x - y)
    with pytest.raises(InvalidProblem, match=r"joint_set and the constraints disagree: entry 0 is 2 at the projected"):
        bilevel.solve(flipped, LVHBA(), doubles(0.0), doubles(0.0))
