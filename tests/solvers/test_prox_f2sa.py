"""ProxF2SA: lower sets, lower objectives that are not convex, many lower solutions; its costs and options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import bilevel
from bilevel import SGD, Box, InvalidProblem, Problem
from bilevel.dry_run import open_oracles
from bilevel.optimizers import Power
from bilevel.problems import Task, toys
from bilevel.solvers.prox_f2sa import ProxF2SA


def judged(task: Task, solver: ProxF2SA, steps: int) -> dict[str, Any]:
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps)
    assert task.evaluate is not None
    return task.evaluate(solution.x, solution.y)


# -- a lower set -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"prox": 1.0, "averaging": 0.5, "lower_steps": 1}, {"prox": 10.0, "averaging": 0.5}, {"prox": math.inf}],
    ids=str,
)
def test_box(options: dict[str, Any]) -> None:
    task = toys.box()
    solver = ProxF2SA(upper=SGD(0.3), penalty=1000.0, **options)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=150)
    assert task.evaluate is not None
    found = task.evaluate(solution.x, solution.y)
    assert found["x_error"] <= 1e-3
    assert found["y_error"] <= 1e-3
    # The first coordinate of y is at its bound, where x has no influence: no bias there.
    assert abs(float(solution.x[0]) - 3.0) < 1e-12
    assert float(solution.y[0]) == 1.0


def test_box_with_defaults_and_in_single_precision() -> None:
    for dtype in (torch.float64, torch.float32):
        found = judged(toys.box(dtype=dtype), ProxF2SA(), 200)
        assert found["x_error"] <= 1e-2


def test_error_falls_like_one_over_the_penalty() -> None:
    coarse, fine = (judged(toys.box(), ProxF2SA(upper=SGD(0.5), penalty=p), 150)["x_error"] for p in (50.0, 500.0))
    assert 9 <= coarse / fine <= 11


def test_iterates_stay_in_both_sets() -> None:
    task = toys.box()
    problem = Problem(
        upper=task.problem.upper, lower=task.problem.lower, lower_set=Box(-1, 1), upper_set=Box(-0.5, 2.0)
    )
    oracles, x, y = open_oracles(problem, task.x0 + 9, task.y0 - 9, needs_hvp=False)
    solver = ProxF2SA(averaging=0.7, lower_steps=2)
    state = solver.init(oracles, x, y)
    for _ in range(30):
        for point in (state.y, state.value, state.near_y, state.near_value):
            assert bool((point.abs() <= 1).all())
        assert bool(((state.x >= -0.5) & (state.x <= 2.0)).all())
        state = solver.step(oracles, state)
    assert bool((state.x == 2.0).any())


def test_the_solution_of_the_penalized_problem_does_not_move() -> None:
    task = toys.box()
    solver = ProxF2SA(upper=SGD(0.5), penalty=50.0, averaging=0.5)
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False)
    state = solver.init(oracles, x, y)
    for _ in range(400):
        state = solver.step(oracles, state)
    after = solver.step(oracles, state)
    assert after.metrics is not None
    assert float(after.metrics.stationarity) < 1e-12
    for name in ("x", "y", "value", "near_y", "near_value"):
        torch.testing.assert_close(getattr(after, name), getattr(state, name), rtol=0, atol=1e-12)


# -- neither strongly convex nor convex --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.0, 3.0, 6.0])
@pytest.mark.parametrize("prox", [0.5, math.inf])
def test_sine_finds_the_right_valley(start: float, prox: float) -> None:
    """A small penalty lets f choose the valley first, a large one makes the answer accurate."""
    solver = ProxF2SA(upper=SGD(0.1), penalty=Power(1.0, 0.5, limit=300.0), prox=prox, lower_steps=5)
    found = judged(toys.sin(start=start), solver, 400)
    assert found["x_error"] <= 1e-2
    assert found["y_error"] <= 1e-2


def test_many_lower_solutions_and_the_upper_level_chooses() -> None:
    """g does not see half of y; the value function's iterate never moves there, the answer's y does."""
    task = toys.mc()
    solver = ProxF2SA(upper=SGD(0.3), penalty=2.0, prox=math.inf)
    found = judged(task, solver, 200)
    assert found["x_error"] <= 1e-3
    assert found["y_error"] <= 1e-3


@pytest.mark.parametrize("start", [0.4, 1.0, 2.8])
def test_shen_from_three_valleys(start: float) -> None:
    assert judged(toys.shen(start), ProxF2SA(penalty=100.0), 150)["x_error"] <= 1e-2


# -- costs and options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower_lr", [None, 0.3])
def test_counts(lower_lr: float | None) -> None:
    task = toys.box()
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False)
    solver = ProxF2SA(lower_steps=4, lower_lr=lower_lr)
    state = solver.init(oracles, x, y)
    before = oracles.counts
    solver.step(oracles, state)
    assert oracles.counts - before == (0, 3 * 5 + 1, 0, 0)


def test_independent_batches_are_others() -> None:
    data = torch.arange(12, dtype=torch.float64).reshape(6, 2) / 10
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - 1).square().sum(),
        lower=lambda x, y, b: 0.5 * (y - x - b[0].mean(0)).square().sum(),
        lower_data=bilevel.Shuffled((data,), batch_size=1),
    )
    zero = torch.zeros(2, dtype=torch.float64)
    oracles, x, y = open_oracles(problem, zero, zero, needs_hvp=False)
    one, other = (
        solver.step(oracles, solver.init(oracles, x, y)) for solver in (ProxF2SA(), ProxF2SA(shared_batches=False))
    )
    assert not torch.equal(one.value, other.value)


def test_steps_respect_the_proximal_term() -> None:
    """A short prox stiffens the subproblem: a step that is stable without it is refused, or cut when measured."""
    task = toys.box()
    with pytest.raises(InvalidProblem, match="outside"):
        bilevel.solve(task.problem, ProxF2SA(lower_lr=1.0, prox=0.1), task.x0, task.y0, steps=1)
    assert judged(task, ProxF2SA(upper=SGD(0.1), penalty=1000.0, prox=0.1), 300)["x_error"] <= 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prox": 0.0}, "prox must be"),
        ({"averaging": 0.0}, "averaging must be"),
        ({"averaging": 1.1}, "averaging must be"),
        ({"penalty": math.inf}, "penalty must be"),
        ({"lower_lr": -1.0}, "lower_lr must be"),
        ({"lower_steps": 0}, "lower_steps must be"),
        ({"upper": 0.1}, "upper must be an Optimizer"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        ProxF2SA(**options)
