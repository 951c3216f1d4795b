"""F2BA: its accuracy, its costs, its options. That it is F2SA at one penalty is in test_first_order.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel
from bilevel import SGD, InvalidProblem
from bilevel.dry_run import open_oracles
from bilevel.optimizers import Power
from bilevel.problems import toys
from bilevel.solvers.f2ba import F2BA


def error(task: bilevel.problems.Task, solver: F2BA, steps: int) -> float:
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps)
    found = task.x_error(solution.x)
    assert found is not None
    return found


@pytest.mark.slow
def test_error_falls_like_one_over_the_penalty() -> None:
    task = bilevel.problems.quadratic()
    coarse, fine = (error(task, F2BA(upper=SGD(0.15), penalty=p, lower_steps=30), 100) for p in (30.0, 300.0))
    assert 9 <= coarse / fine <= 11


@pytest.mark.slow
def test_warm_loops_need_few_steps() -> None:
    """Ten steps from the last y and z are as good as fifty; restarted from a common point ten would be biased."""
    task = bilevel.problems.quadratic()
    few, many = (error(task, F2BA(upper=SGD(0.1), lower_steps=k), 150) for k in (10, 50))
    assert few == pytest.approx(many, rel=1e-2)


@pytest.mark.parametrize("start", [0.4, 1.0, 2.8])
def test_shen_from_three_valleys(start: float) -> None:
    task = toys.shen(start)
    solution = bilevel.solve(task.problem, F2BA(), task.x0, task.y0, steps=100)
    assert task.evaluate is not None
    assert task.evaluate(solution.x, solution.y)["x_error"] <= 1e-2


def test_simple_quadratic_in_single_precision() -> None:
    task = toys.sc(dtype=torch.float32)
    assert error(task, F2BA(lower_steps=10), 150) < 5e-3


@pytest.mark.parametrize("lower_lr", [None, 0.2])
def test_counts(lower_lr: float | None) -> None:
    task = bilevel.problems.quadratic()
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False)
    solver = F2BA(lower_steps=7, lower_lr=lower_lr)
    state = solver.init(oracles, x, y)
    assert oracles.counts.gradients == 16 + 17
    before = oracles.counts
    solver.step(oracles, state)
    assert oracles.counts - before == (1, 3 * 8 + 2, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": Power(1.0, 0.5)}, "penalty is one number"),
        ({"penalty": 0.0}, "penalty must be"),
        ({"lower_lr": Power(1.0, 0.5)}, "lower_lr is one number"),
        ({"lower_lr": 0.0}, "lower_lr must be"),
        ({"lower_steps": 0}, "lower_steps must be"),
        ({"upper": "adam"}, "upper must be an Optimizer"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        F2BA(**options)


def test_unstable_lower_steps_are_refused() -> None:
    task = bilevel.problems.quadratic()
    with pytest.raises(InvalidProblem, match="outside"):
        bilevel.solve(task.problem, F2BA(lower_lr=0.7), task.x0, task.y0, steps=1)
