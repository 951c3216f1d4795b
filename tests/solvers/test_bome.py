"""BOME: its multiplier, where it converges and where it stops short, its cost and its refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import InvalidProblem, Problem, Shuffled, Status
from bilevel.dry_run import open_oracles
from bilevel.oracles import Counts
from bilevel.problems import toys
from bilevel.solvers.bome import BOME

TASK = bilevel.problems.quadratic()
F, G = TASK.problem.upper, TASK.problem.lower


def start() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(4, generator=generator, dtype=torch.float64),
        torch.randn(10, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("value_control", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_step_is_the_one_written_down(value_control: bool, sign: float) -> None:
    """With f = -g / 10 (sign -1) the upper gradient opposes the gap's; with +1 it already lowers the gap."""
    problem = Problem(upper=lambda x, y, b: sign * 0.1 * G(x, y, b) + 0.01 * F(x, y, b), lower=G)
    oracles, x, y = open_oracles(problem, *start(), needs_hvp=False)
    solver = BOME(lower_steps=3, lr=0.05, lower_lr=0.1, eta=0.25, value_control=value_control)
    after = solver.step(oracles, solver.init(oracles, x, y)._replace(step=3))
    z = y
    for _ in range(3):
        z = z - 0.1 * torch.func.grad(G, 1)(x, z, None)
    q_x, q_y = torch.func.grad(lambda x, y: G(x, y, None) - G(x, z, None), (0, 1))(x, y)
    q = G(x, y, None) - G(x, z, None)
    f_x, f_y = torch.func.grad(problem.upper, (0, 1))(x, y, None)
    squared = q_x.square().sum() + q_y.square().sum()
    wanted = 0.25 * (q if value_control else squared)
    multiplier = ((wanted - f_x @ q_x - f_y @ q_y) / squared).clamp_min(0)
    torch.testing.assert_close(after.multiplier, multiplier)
    xi = 0.05 / 2  # at the fourth step
    torch.testing.assert_close(after.x, x - xi * (f_x + multiplier * q_x))
    torch.testing.assert_close(after.y, y - xi * (f_y + multiplier * q_y))
    shorter = solver.backtracked(0.5).step(oracles, solver.init(oracles, x, y)._replace(step=3))
    torch.testing.assert_close(shorter.x - x, 0.5 * (after.x - x))
    if not value_control and float(multiplier) > 0:
        along = (x - after.x) @ q_x + (y - after.y) @ q_y
        torch.testing.assert_close(along / xi, 0.25 * squared)  # the gap closes as fast as asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "value_control"), [(torch.float64, False), (torch.float32, False), (torch.float64, True)]
)
def test_defaults_solve_the_quadratic(dtype: torch.dtype, value_control: bool) -> None:
    task = bilevel.problems.quadratic(dtype=dtype)
    solver = BOME(value_control=value_control)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=BOME.contract_steps)
    error = task.x_error(solution.x)
    assert error is not None
    assert error < (1.5e-2 if value_control else 1e-2)
    assert solution.x.dtype == dtype


@pytest.mark.slow
def test_steps_that_do_not_fall_leave_a_floor() -> None:
    errors = []
    for lr in (0.2, 0.05):
        solution = bilevel.solve(TASK.problem, BOME(lr=lr, decay=0.0), TASK.x0, TASK.y0, steps=400)
        error = TASK.x_error(solution.x)
        assert error is not None
        errors.append(error)
    assert 2.5 < errors[0] / errors[1] < 5
    assert errors[1] > 1e-2


def test_too_few_lower_steps_answer_wrongly() -> None:
    solution = bilevel.solve(TASK.problem, BOME(lower_steps=1), TASK.x0, TASK.y0, steps=800)
    error = TASK.x_error(solution.x)
    assert error is not None
    assert error > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "tolerance"), [(toys.sc(), 1e-3), (toys.mc(), 2e-3), (toys.sin(), 1e-2), (toys.shen(), 1e-2)],
    ids=["sc", "mc", "sin", "shen"],
)  # fmt: skip
def test_toys(task: bilevel.problems.Task, tolerance: float) -> None:
    solution = bilevel.solve(task.problem, BOME(), task.x0, task.y0, steps=500)
    error = task.x_error(solution.x)
    assert error is not None
    assert error < tolerance


def test_a_closed_gap_does_not_divide_by_zero() -> None:
    """At a lower minimizer dq = 0: the step is that of f alone, whatever lambda."""
    problem = Problem(
        upper=lambda x, y, b: 0 * y.sum() + 0 * x.sum(), lower=lambda x, y, b: 0.5 * (y - x).square().sum()
    )
    zero = torch.zeros(3, dtype=torch.float64)
    oracles, x, y = open_oracles(problem, zero, zero, needs_hvp=False)
    state = BOME().init(oracles, x, y)
    for _ in range(3):
        state = BOME().step(oracles, state)
    assert torch.equal(state.x, x)
    assert torch.equal(state.y, y)
    assert bool(state.multiplier.isfinite())


def test_counts_are_its_cost_line_and_batches_are_shared() -> None:
    seen: list[float] = []

    def lower(x: Tensor, y: Tensor, b: Any) -> Tensor:
        seen.append(float(b[0].sum()))
        return (y - x * b[0].mean()).square().sum()

    data = torch.arange(12, dtype=torch.float64).reshape(12, 1)
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square().sum(), lower=lower, lower_data=Shuffled((data,), batch_size=4)
    )
    one = torch.ones(1, dtype=torch.float64)
    oracles, x, y = open_oracles(problem, one, one, needs_hvp=False)
    solver = BOME(lower_steps=2, measure_every=2)
    before = oracles.counts
    state = solver.init(oracles, x, y)
    assert (oracles.counts - before).gradients <= 48
    for k in range(3):
        seen.clear()
        before = oracles.counts
        state = solver.step(oracles, state)
        spent = oracles.counts - before
        assert (spent == Counts(gradients=5)) != (k == 2)
        assert seen[-4:] == [float(oracles.batch("lower", 2 * k + j)[0].sum()) for j in (0, 1, 1, 1)]


def test_options_and_refusals() -> None:
    options: list[dict[str, Any]] = [
        {"lower_steps": 0}, {"lr": 0.0}, {"eta": 0.0}, {"lower_lr": -1.0}, {"upper_factor": 0.0}, {"decay": -0.1},
        {"measure_every": -1},
    ]  # fmt: skip
    for option in options:
        with pytest.raises(InvalidProblem, match=next(iter(option))):
            BOME(**option)
    for option in ({"lr": 0.5}, {"lower_lr": 0.7}):
        with pytest.raises(InvalidProblem, match=r"lr=.* is outside \(0, .*stable"):
            bilevel.solve(TASK.problem, BOME(**option), TASK.x0, TASK.y0, steps=1)
    with pytest.raises(bilevel.BilevelError):
        bilevel.solve(TASK.problem, BOME(upper_factor=30.0), TASK.x0, TASK.y0, steps=500, throw=True)
    for task in (toys.box(), toys.ineq(), toys.lasso1()):
        with pytest.raises(InvalidProblem, match="BOME does not handle"):
            bilevel.solve(task.problem, BOME(), task.x0, task.y0, steps=1)
    boxed = replace(TASK.problem, upper_set=bilevel.Box(-0.3, 0.3))
    solution = bilevel.solve(boxed, BOME(), TASK.x0, TASK.y0, steps=100)
    assert solution.status is Status.COMPLETED
    assert float(solution.x.abs().max()) <= 0.3
