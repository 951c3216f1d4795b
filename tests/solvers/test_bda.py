"""BDA: its gradient against autograd through the same steps, and what it answers on the merely convex toy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, InvalidProblem, Problem
from bilevel.dry_run import open_oracles
from bilevel.oracles import Counts
from bilevel.problems import toys
from bilevel.solvers.bda import BDA

TASK = bilevel.problems.quadratic()
PLAIN = SGD(lr=1.0)


def point() -> Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(("mu", "decay"), [(0.0, 0.0), (0.5, 1.0), (0.9, 0.3), (1.0, 0.5)])
def test_gradient_is_that_of_the_unrolled_steps(mu: float, decay: float) -> None:
    x, y0, lr, steps = point(), torch.ones(10, dtype=torch.float64), 0.2, 6

    def nonlinear(x: Tensor, y: Tensor, b: Any) -> Tensor:
        value: Tensor = TASK.problem.lower(x, y, b) + (x.sum() * y).sin().sum()
        return value

    def unrolled(x: Tensor) -> Tensor:
        y = y0
        for t in range(steps):
            m = mu * (t + 1) ** -decay
            psi = lambda y, m=m: m * TASK.problem.upper(x, y, None) + (1 - m) * nonlinear(x, y, None)  # noqa: E731
            y = y - lr * torch.func.grad(psi)(y)
        return TASK.problem.upper(x, y, None)

    oracles, x, y = open_oracles(replace(TASK.problem, lower=nonlinear), x, y0)
    solver = BDA(upper=PLAIN, lower_steps=steps, mu=mu, decay=decay, lr=lr)
    after = solver.step(oracles, solver.init(oracles, x, y))
    torch.testing.assert_close(x - after.x, torch.func.grad(unrolled)(x), rtol=1e-10, atol=1e-10)
    assert after.metrics is not None
    torch.testing.assert_close(after.metrics.upper_value, unrolled(x))
    torch.testing.assert_close(after.metrics.lower_value, nonlinear(x, after.y, None))


@pytest.mark.parametrize(
    ("steps", "mu", "decay", "answer"),
    [(10, 0.5, 0.0, 0.909), (10, 0.9, 1.0, 0.823), pytest.param(100, 0.5, 0.0, 1.0, marks=pytest.mark.slow)],
)
def test_known_answers_on_the_merely_convex_toy(steps: int, mu: float, decay: float, answer: float) -> None:
    """From y = 0, restarted: the fewer the steps, the less of y2's way to x is unrolled."""
    task = toys.mc(start=0.0)
    solver = BDA(upper=SGD(lr=1.0), lower_steps=steps, mu=mu, decay=decay, lr=0.3, restart=True)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=60)
    torch.testing.assert_close(solution.x, torch.full_like(solution.x, answer), rtol=0, atol=2e-3)


def test_plain_unrolling_answers_one_half() -> None:
    task = toys.mc(start=0.0)
    solution = bilevel.solve(task.problem, BDA(mu=0.0), task.x0, task.y0, steps=200)
    torch.testing.assert_close(solution.x, torch.full_like(solution.x, 0.5), rtol=0, atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_defaults_solve_the_quadratic_and_the_merely_convex_toy(dtype: torch.dtype) -> None:
    for task, steps, tolerance in (
        (bilevel.problems.quadratic(dtype=dtype), 150, 1e-2),
        (toys.mc(dtype=dtype), 200, 1e-3),
    ):
        solution = bilevel.solve(task.problem, BDA(), task.x0, task.y0, steps=steps)
        error = task.x_error(solution.x)
        assert error is not None
        assert error < tolerance
        assert solution.x.dtype == dtype


def test_counts_are_its_cost_line() -> None:
    oracles, x, y = open_oracles(TASK.problem, TASK.x0, TASK.y0)
    solver = BDA(lower_steps=7, measure_every=2)
    before = oracles.counts
    state = solver.init(oracles, x, y)
    assert (oracles.counts - before).gradients <= 32
    cost = Counts(gradients=7 * 2 + 2, hvps=7, crosses=7)
    for measures in (False, False, True):
        before = oracles.counts
        state = solver.step(oracles, state)
        spent = oracles.counts - before
        assert spent._replace(gradients=0) == cost._replace(gradients=0)
        assert (spent.gradients > cost.gradients) == measures
        assert measures or spent == cost


def test_each_unrolled_step_sees_a_batch_of_its_own() -> None:
    seen: list[float] = []

    def lower(x: Tensor, y: Tensor, b: Any) -> Tensor:
        seen.append(float(b[0].sum()))
        return (y - x * b[0].mean()).square().sum()

    data = torch.arange(12, dtype=torch.float64).reshape(12, 1)
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square().sum(),
        lower=lower,
        lower_data=bilevel.Shuffled((data,), batch_size=4),
    )
    one = torch.ones(1, dtype=torch.float64)
    oracles, x, y = open_oracles(problem, one, one)
    solver = BDA(lower_steps=3, lr=0.1)
    state = solver.init(oracles, x, y)
    for k in range(2):
        seen.clear()
        state = solver.step(oracles, state)
        assert seen[:3] == [float(oracles.batch("lower", 3 * k + t)[0].sum()) for t in range(3)]


def test_options_and_refusals() -> None:
    for options in (
        {"lower_steps": 0},
        {"upper": bilevel.LBFGS()},
        {"mu": 1.1},
        {"decay": -1.0},
        {"lr": 0.0},
        {"measure_every": -1},
    ):
        with pytest.raises(InvalidProblem, match=next(iter(options))):
            BDA(**options)  # type: ignore[arg-type]
    with pytest.raises(InvalidProblem, match=r"lr=1 is outside \(0, .*stable"):
        bilevel.solve(TASK.problem, BDA(lr=1.0), TASK.x0, TASK.y0, steps=1)
    for task in (toys.box(), toys.wl(), toys.mci()):
        with pytest.raises(InvalidProblem, match="BDA does not handle"):
            bilevel.solve(task.problem, BDA(), task.x0, task.y0, steps=1)
    oracles, x, y = open_oracles(TASK.problem, point(), TASK.y0)
    moves = []
    for solver in (BDA(upper=PLAIN), BDA(upper=PLAIN).backtracked(0.5)):
        moves.append(solver.step(oracles, solver.init(oracles, x, y)).x - x)
    torch.testing.assert_close(moves[1], 0.5 * moves[0])
