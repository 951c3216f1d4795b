"""What is told of an answer under constraints: each number against a closed form, and what solvers leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import BLOCC, KKT, LVHBA, MEHA, Box, ElasticNet, InvalidProblem, Power, Problem, Solver, conditions
from bilevel.problems import toys


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def both(**fields: Any) -> Problem:
    """Return min ‖y - 3‖² / 2, y1 <= x, y2 <= 9, y3 = 2 x below: y* = (x, 3, 2 x), multipliers (3 - x, 0, 3 - 2 x)."""
    return Problem(
        upper=lambda x, y, b: x.sum() + y.sum(),
        lower=lambda x, y, b: 0.5 * (y - 3).square().sum(),
        constraint=lambda x, y, b: torch.stack([y[0] - x, y[1] - 9]),
        equality=lambda x, y, b: (y[2] - 2 * x).reshape(1),
        **fields,
    )


X = torch.tensor(1.0, dtype=torch.float64)
Y, MULTIPLIER = doubles(1.0, 3.0, 2.0), doubles(2.0, 0.0, 1.0)


def test_all_vanish_at_a_solution() -> None:
    found = conditions(both(), X, Y, MULTIPLIER)
    assert found.constraint.tolist() == [0.0, -6.0]
    assert found.equality.tolist() == [0.0]
    assert found.constraint_multiplier.tolist() == [2.0, 0.0]
    assert found.equality_multiplier.tolist() == [1.0]
    assert found.active.tolist() == [True, False]
    for value in (found.upper_violation, found.lower_violation, found.stationarity, found.complementarity):
        assert float(value) == 0.0
    assert str(found) == (
        "violation 0.0e+00 above, 0.0e+00 below; lower stationarity 0.0e+00, complementarity 0.0e+00; 1 of 2 "
        "inequalities active, largest multiplier 2"
    )


@pytest.mark.parametrize(
    ("x", "y", "multiplier", "expected"),
    [
        (
            1.0,
            (1.25, 3.0, 2.0),
            (2.0, 0.0, 1.0),
            {"lower_violation": 0.25, "stationarity": 0.25, "complementarity": 0.5},
        ),
        (1.0, (1.0, 9.5, 2.0), (2.0, 0.0, 1.0), {"lower_violation": 0.5, "stationarity": 6.5, "complementarity": 0.0}),
        (1.0, (1.0, 3.0, 1.5), (2.0, 0.0, 1.0), {"lower_violation": 0.5, "stationarity": 0.5, "complementarity": 0.0}),
        (1.0, (1.0, 3.0, 2.0), (2.5, 0.0, 1.0), {"lower_violation": 0.0, "stationarity": 0.5, "complementarity": 0.0}),
        (1.0, (1.0, 3.0, 2.0), (2.0, 0.5, 1.0), {"lower_violation": 0.0, "stationarity": 0.5, "complementarity": 3.0}),
        (
            4.0,
            (4.0, 3.0, 8.0),
            (-1.0, 0.0, -5.0),
            {"lower_violation": 0.0, "stationarity": 0.0, "complementarity": 1.0},
        ),
    ],
)
def test_each_number_against_its_closed_form(
    x: float, y: tuple[float, ...], multiplier: tuple[float, ...], expected: dict[str, float]
) -> None:
    found = conditions(both(), torch.tensor(x, dtype=torch.float64), doubles(*y), doubles(*multiplier))
    for name, value in expected.items():
        assert float(getattr(found, name)) == pytest.approx(value, abs=1e-14), name


def test_sets_count_as_constraints_without_multipliers_of_their_own() -> None:
    problem = both(lower_set=Box(0.0, 2.5), upper_set=Box(-1.0, 0.5))
    at_bound = conditions(problem, X, doubles(1.0, 2.5, 2.0), MULTIPLIER)
    assert float(at_bound.upper_violation) == 0.5
    assert float(at_bound.stationarity) == 0.0  # y2 = 2.5 is held by its bound
    assert float(at_bound.lower_violation) == 0.0
    outside = conditions(problem, X, doubles(1.0, 3.0, 2.0), MULTIPLIER)
    assert float(outside.lower_violation) == 0.5


def test_declared_terms_take_part() -> None:
    """With ‖y‖² / 2 below: y* = (1, 1.5, 2), multipliers (1, 0, -1); with ‖y‖_1 / 2: (1, 2.5, 2) and (1.5, 0, .5)."""
    smooth = both(regularizer=bilevel.L2(1.0))
    assert float(conditions(smooth, X, doubles(1.0, 1.5, 2.0), doubles(1.0, 0.0, -1.0)).stationarity) < 1e-14
    kinked = both(regularizer=ElasticNet(l1=0.5))
    assert float(conditions(kinked, X, doubles(1.0, 2.5, 2.0), doubles(1.5, 0.0, 0.5)).stationarity) < 1e-14
    task = toys.lasso1()
    exact = conditions(task.problem, doubles(1.0).sum(), doubles(2.0, 1.0, 0.0))
    assert float(exact.stationarity) < 1e-14
    assert exact.constraint.shape == exact.equality_multiplier.shape == (0,)
    assert "largest multiplier none" in str(exact)


def test_blocks() -> None:
    t = doubles(2.0, 9.0)[:, None]
    problem = Problem(
        upper=lambda x, y, b: (x - y).square().sum(),
        lower=lambda x, y, b: 0.5 * (y - 3).square().sum(),
        constraint=lambda x, y, b: x + y - b,
        lower_data=bilevel.Full(t),
        blocks=2,
    )
    found = conditions(problem, X, doubles(1.0, 3.0)[:, None], doubles(2.0, 0.0)[:, None])
    assert found.constraint.tolist() == [[0.0], [-5.0]]
    assert float(found.stationarity) == float(found.lower_violation) == float(found.complementarity) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "steps", "tolerance"),
    [(KKT(starts=1), 6, 1e-9), (BLOCC(), 200, 1e-3), (LVHBA(penalty=Power(1.0, 0.3)), 600, 1e-2)],
    ids=["KKT", "BLOCC", "LVHBA"],
)
def test_what_solvers_leave_behind(solver: Solver[Any], steps: int, tolerance: float) -> None:
    task = toys.ineq()
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps)
    found = conditions(task.problem, solution.x, solution.y, solution.state.multiplier)
    assert float(found.constraint_multiplier) == pytest.approx(2.5, abs=10 * tolerance)
    assert float(found.upper_violation) == 0.0
    assert float(found.lower_violation) <= tolerance
    assert float(found.stationarity) <= 2 * tolerance
    assert float(found.complementarity) <= 5 * tolerance


def test_a_relaxed_lower_level_shows_in_its_stationarity() -> None:
    """MEHA's answer lies below the optimum by what it leaves of the lower level's conditions."""
    task = toys.box()
    short, long = (bilevel.solve(task.problem, MEHA(), task.x0, task.y0, steps=steps) for steps in (50, 800))
    left = [float(conditions(task.problem, s.x, s.y).stationarity) for s in (short, long)]
    assert left[0] > 3 * left[1] > 1e-3


def test_nothing_of_the_user_changes() -> None:
    x, y, multiplier = X.clone().requires_grad_(), Y.clone(), MULTIPLIER.clone().requires_grad_()
    found = conditions(both(), x, y, multiplier)
    assert not found.stationarity.requires_grad
    assert not found.constraint_multiplier.requires_grad
    assert torch.equal(y, Y)
    assert x.grad is None


@pytest.mark.parametrize("multiplier", [None, doubles(1.0, 2.0), doubles(1.0, 2.0, 3.0, 4.0)])
def test_multipliers_that_do_not_fit_are_refused(multiplier: Tensor | None) -> None:
    with pytest.raises(InvalidProblem, match=r"multipliers of shape \(3,\).*pass solution\.state\.multiplier"):
        conditions(both(), X, Y, multiplier)
