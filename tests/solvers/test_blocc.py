"""BLOCC: its hypergradient, its price, what it solves, and the traps around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import LBFGS, SGD, Box, InvalidProblem, Problem, Status
from bilevel.dry_run import open_oracles
from bilevel.optimizers import Power
from bilevel.problems import Task, toys
from bilevel.solvers.blocc import BLOCC
from bilevel.solvers.f2sa import F2SA
from bilevel.status import MultiplierAtBound

SHORT = BLOCC(lower_steps=3)


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def direction(problem: Problem, x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Any]:
    """Return h at x after many primal-dual steps, and the state."""
    oracles, x, y = open_oracles(problem, x, y, needs_hvp=False)
    solver = BLOCC(upper=SGD(1e-3), penalty=penalty, lower_steps=250)
    after = solver.step(oracles, solver.init(oracles, x, y))
    return (x - after.x) / 1e-3, after


# -- what a step is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [0.3, 1.4])
def test_direction_where_the_constraint_holds_x(x: float) -> None:
    """On `ineq` y = 2 - x at both saddle points: F(x) = (x - 2)² / 2 + (1 - x)² / 2, for every penalty."""
    for penalty in (1.0, 30.0):
        h, after = direction(toys.ineq().problem, doubles(x), doubles(0.0), penalty)
        torch.testing.assert_close(h, doubles(2 * x - 3), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(after.multiplier, doubles(1 + x), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(after.relaxed.multiplier, doubles(1 + x + (x - 1) / penalty), rtol=1e-8, atol=1e-8)


def coupled() -> Problem:
    """Rows that bind and rows that do not, coupled with x both in g and in c, and an equation."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    b = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    return Problem(
        upper=lambda x, y, _: 0.5 * (y - 1).square().sum() + 0.5 * x.square().sum(),
        lower=lambda x, y, _: 0.5 * (torch.arange(1, 5).double() * y.square()).sum() - y @ (b @ x),
        constraint=lambda x, y, _: a @ y - torch.stack([x[0], x[1] - 1, x[0] * x[1] + 5]),
        equality=lambda x, y, _: (y.sum() - 0.5 * x[1]).reshape(1),
    )


def penalized(problem: Problem, x: Tensor, penalty: float) -> float:
    after = direction(problem, x, torch.zeros(4, dtype=torch.float64), penalty)[1]
    z, y = after.y, after.relaxed.y
    value = problem.upper(x, y, None) + penalty * (problem.lower(x, y, None) - problem.lower(x, z, None))
    return float(value)


@pytest.mark.slow
def test_direction_is_the_gradient_of_the_penalized_problem() -> None:
    problem, x, penalty = coupled(), doubles(0.2, -0.4), 4.0
    h, after = direction(problem, x, torch.zeros(4, dtype=torch.float64), penalty)
    assert 0 < int((after.multiplier[:3] > 0.05).sum()) < 3
    assert float(after.multiplier[:3].min()) == 0.0
    for i in range(2):
        e = torch.zeros_like(x)
        e[i] = 1e-3
        slope = (penalized(problem, x + e, penalty) - penalized(problem, x - e, penalty)) / 2e-3
        assert float(h[i]) == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_without_constraints_it_is_f2sa() -> None:
    task = bilevel.problems.quadratic()
    # A measured step would differ by rounding, divided by the length of a difference.
    options: dict[str, Any] = {"upper": SGD(0.02), "penalty": Power(5.0, 0.3), "lower_steps": 3, "lower_lr": 0.1}
    one, other = (
        bilevel.solve(task.problem, solver, task.x0, task.y0, steps=20)
        for solver in (BLOCC(**options), F2SA(**options, momentum=0.0))
    )
    torch.testing.assert_close(one.x, other.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.y, other.y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("problem", "kinds"), [(coupled(), 2), (bilevel.problems.quadratic().problem, 0)])
def test_cost_is_as_stated(problem: Problem, kinds: int) -> None:
    sizes = (2, 4) if kinds else (4, 10)
    oracles, x, y = open_oracles(problem, *(torch.zeros(n, dtype=torch.float64) for n in sizes), needs_hvp=False)
    steps = 4
    solver = BLOCC(lower_steps=steps)
    state = solver.init(oracles, x, y)
    before = oracles.counts
    solver.step(oracles, state)
    spent = oracles.counts - before
    of_constraints = 2 * (steps + 1) * kinds
    assert spent.gradients == (steps + 1) + (2 * steps + 3) + of_constraints
    assert spent.values == 1 + 2 * steps * kinds
    assert (spent.hvps, spent.crosses) == (0, 0)


def test_nothing_moves_at_the_solution() -> None:
    task = toys.ineq()
    oracles, x, y = open_oracles(task.problem, doubles(1.5), doubles(0.5), needs_hvp=False)
    solver = BLOCC(upper=SGD(0.1), penalty=1e3)
    state = solver.init(oracles, x, y)
    held = doubles(2.5)
    state = state._replace(multiplier=held, relaxed=state.relaxed._replace(multiplier=held + 0.5e-3))
    for _ in range(5):
        state = solver.step(oracles, state)
    torch.testing.assert_close(state.y, y, rtol=0, atol=1e-10)
    torch.testing.assert_close(state.multiplier, held, rtol=0, atol=1e-10)
    torch.testing.assert_close(state.x, x, rtol=0, atol=1e-10)


def test_iterates_stay_in_their_sets() -> None:
    """x in [0, 1] and y in [0, 0.6] throughout, and multipliers of inequalities in [0, bound]; y ends at its bound."""
    problem = replace(toys.ineq().problem, joint_set=None, upper_set=Box(0.0, 1.0), lower_set=Box(0.0, 0.6))
    solver = BLOCC(lower_steps=2, bound=20.0)
    oracles, x, y = open_oracles(problem, doubles(0.0), doubles(0.0), needs_hvp=False)
    state = solver.init(oracles, x, y)
    for _ in range(60):
        state = solver.step(oracles, state)
        assert 0 <= float(state.x) <= 1
        for saddle in (state, state.relaxed):
            assert 0 <= float(saddle.y) <= 0.6
            assert 0 <= float(saddle.multiplier) <= 20
    assert float(state.x) == 1.0
    assert float(state.y) == 0.6


# -- what it solves ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "solver", "steps", "tolerance"),
    [
        (toys.ineq(), BLOCC(), 150, 1e-3),
        pytest.param(toys.ineq(), BLOCC(lower_steps=1), 500, 1e-2, marks=pytest.mark.slow),
        (toys.ineq(), BLOCC(upper=SGD(0.1), penalty=1000.0, multiplier_lr=1.5, bound=10.0, lower_steps=3), 150, 1e-3),
        (toys.llc(), SHORT, 100, 1e-2),
        pytest.param(toys.llc(100), BLOCC(), 300, 1e-2, marks=pytest.mark.slow),
        (toys.box(), SHORT, 100, 1e-2),
        pytest.param(toys.box(), BLOCC(penalty=Power(10.0, 0.49)), 1000, 1e-3, marks=pytest.mark.slow),
        (toys.sc(), SHORT, 200, 1e-2),
        (toys.shen(), SHORT, 100, 1e-2),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_toys(task: Task, solver: BLOCC, steps: int, tolerance: float) -> None:
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps)
    assert solution.status is Status.COMPLETED
    assert task.evaluate is not None
    found = task.evaluate(solution.x, solution.y)
    assert found["x_error"] <= tolerance
    assert found["y_error"] <= tolerance


def test_the_bias_falls_like_one_over_the_penalty() -> None:
    task, errors = toys.sc(1), []
    for penalty in (10.0, 100.0):
        solver = BLOCC(penalty=penalty, upper=SGD(0.3), lower_steps=5)
        solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=80)
        errors.append(float((solution.x - task.problem.reference).abs()))
    assert 9.0 < errors[0] / errors[1] < 11.0


def test_equations() -> None:
    """g = ‖y‖² / 2, y1 + y2 = x, so y* = (x / 2, x / 2); f = ‖y - 1‖² / 2: x* = 2, multiplier -1."""
    problem = Problem(
        upper=lambda x, y, _: 0.5 * (y - 1).square().sum(),
        lower=lambda x, y, _: 0.5 * y.square().sum(),
        equality=lambda x, y, _: (y.sum() - x).reshape(1),
    )
    solution = bilevel.solve(problem, SHORT, doubles(0.0).sum(), doubles(0.0, 0.0), steps=200)
    assert float(solution.x) == pytest.approx(2.0, abs=1e-3)
    assert float(solution.state.multiplier) == pytest.approx(-1.0, abs=1e-3)


@pytest.mark.slow
def test_curved_constraints() -> None:
    """min -1^T y on the disk of radius x, f = ‖y - 1‖² + (x - 2)² / 10: y* = x (1, 1) / sqrt(2)."""
    problem = Problem(
        upper=lambda x, y, _: (y - 1).square().sum() + 0.1 * (x - 2).square(),
        lower=lambda x, y, _: 0.05 * y.square().sum() - y.sum(),
        constraint=lambda x, y, _: (y.square().sum() - x.square()).reshape(1),
        upper_set=Box(0.1, 5),
    )
    solution = bilevel.solve(problem, BLOCC(lower_steps=50), doubles(0.5).sum(), doubles(0.3, 0.3), steps=100)
    assert solution.status is Status.COMPLETED
    x_star = (2 * 2**0.5 + 0.4) / 2.2  # of F(x) = 2 (x / sqrt(2) - 1)² + (x - 2)² / 10
    assert float(solution.x) == pytest.approx(x_star, abs=2e-2)
    torch.testing.assert_close(solution.y, (solution.x / 2**0.5).expand(2), rtol=0, atol=2e-2)


def test_float32() -> None:
    task = toys.ineq(dtype=torch.float32)
    solution = bilevel.solve(task.problem, SHORT, task.x0, task.y0, steps=200)
    assert solution.x.dtype == solution.state.relaxed.multiplier.dtype == torch.float32
    assert float(solution.x) == pytest.approx(1.5, abs=1e-3)


def test_multipliers_are_found_in_the_units_of_the_user() -> None:
    task = toys.ineq()
    plain, scaled = (
        Problem(upper=task.problem.upper, lower=task.problem.lower, constraint=lambda x, y, b, s=s: s * (x + y - 2))
        for s in (1.0, 100.0)
    )
    one, other = (bilevel.solve(p, SHORT, task.x0, task.y0, steps=50) for p in (plain, scaled))
    torch.testing.assert_close(one.x, other.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.state.multiplier, 100 * other.state.multiplier, rtol=1e-9, atol=1e-9)


def test_blocks_have_multipliers_of_their_own() -> None:
    """Two lower problems min (y - 3)² / 2, y <= t_b - x, with t = (2, 9): the first is held, the second is free."""
    t = doubles(2.0, 9.0)[:, None]
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (x - 2).square().sum() + 0.5 * (y - 1).square().sum(),
        lower=lambda x, y, b: 0.5 * (y - 3).square().sum(),
        constraint=lambda x, y, b: x + y - b,
        upper_data=bilevel.Full(t),
        lower_data=bilevel.Full(t),
        blocks=2,
    )
    # F = (x - 2)² / 2 + ((1 - x)² + 4) / 4
    solution = bilevel.solve(problem, SHORT, doubles(0.0), 0 * t, steps=100)
    assert float(solution.x) == pytest.approx(5 / 3, abs=1e-2)
    torch.testing.assert_close(solution.y, doubles(1 / 3, 3.0)[:, None], rtol=0, atol=2e-2)
    torch.testing.assert_close(solution.state.multiplier, doubles(8 / 3, 0.0)[:, None], rtol=0, atol=2e-2)


def test_stationarity_vanishes_where_it_converges() -> None:
    task = toys.ineq()
    solution = bilevel.solve(task.problem, SHORT, task.x0, task.y0, steps=500, tol=1e-5)
    assert solution.status is Status.CONVERGED
    assert float(solution.x) == pytest.approx(1.5, abs=1e-3)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_bound_below_the_multiplier_is_told() -> None:
    task = toys.ineq()
    with pytest.warns(MultiplierAtBound, match=r"BLOCC\(bound=") as caught:
        solution = bilevel.solve(task.problem, BLOCC(bound=1.0, lower_steps=3), task.x0, task.y0, steps=100)
    assert len(caught) == 1
    assert abs(float(solution.x) - 1.5) > 0.3


def test_runs_that_diverge_say_so() -> None:
    task = bilevel.problems.quadratic()
    solver = BLOCC(upper=SGD(10.0), lower_steps=3)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=200)
    assert solution.status is Status.DIVERGED
    mended = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=250, on_nonfinite="backtrack")
    assert task.x_error(mended.x) < 1e-2  # type: ignore[operator]


def test_unstable_steps_are_refused() -> None:
    task = bilevel.problems.quadratic()
    with pytest.raises(InvalidProblem, match=r"lower_lr=1 is outside"):
        bilevel.solve(task.problem, BLOCC(lower_lr=1.0), task.x0, task.y0, steps=1)


@pytest.mark.parametrize(
    "options",
    [
        {"upper": LBFGS()},
        {"lower_steps": 0},
        {"multiplier_lr": 2.5},
        {"bound": 0.0},
        {"penalty": -1.0},
        {"lower_lr": 0},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidProblem, match=next(iter(options))):
        BLOCC(**options)
