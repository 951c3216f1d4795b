"""G-PBGD: its gradient, its bias law, the trap of singular Hessians, its cost and its refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import InvalidProblem, Problem, Status
from bilevel.dry_run import open_oracles
from bilevel.oracles import Counts
from bilevel.problems import toys
from bilevel.solvers.g_pbgd import GPBGD

TASK = bilevel.problems.quadratic()
F, G = TASK.problem.upper, TASK.problem.lower


def point() -> Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def penalized(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    value: Tensor = F(x, y, None) + 0.5 * penalty * torch.func.grad(G, 1)(x, y, None).square().sum()
    return value


def test_steps_along_the_gradient_of_the_penalized_function() -> None:
    x, y = point(), torch.linspace(-1, 1, 10, dtype=torch.float64)
    oracles, x, y = open_oracles(TASK.problem, x, y)
    solver = GPBGD(penalty=3.0, lr=0.04)
    after = solver.step(oracles, solver.init(oracles, x, y))
    d_x, d_y = torch.func.grad(penalized, (0, 1))(x, y, 3.0)
    torch.testing.assert_close(after.x, x - 0.01 * d_x)
    torch.testing.assert_close(after.y, y - 0.01 * d_y)
    assert after.metrics is not None
    assert float(after.metrics.stationarity) == pytest.approx(float(torch.cat([d_x, d_y]).norm()))
    longer = replace(solver, upper_lr=0.4).step(oracles, solver.init(oracles, x, y))
    torch.testing.assert_close(longer.x - x, 10 * (after.x - x))
    assert torch.equal(longer.y, after.y)
    shorter = solver.backtracked(0.5).step(oracles, solver.init(oracles, x, y))
    torch.testing.assert_close(shorter.x - x, 0.5 * (after.x - x))
    scheduled = replace(solver, penalty=lambda x, k: 3.0 + k).step(oracles, solver.init(oracles, x, y))
    assert torch.equal(scheduled.x, after.x)


def test_bias_is_inversely_proportional_to_the_penalty() -> None:
    x = point()
    zero = torch.zeros(10, dtype=torch.float64)

    def lower(x: Tensor) -> Tensor:
        gradient = torch.func.grad(G, 1)
        found: Tensor = torch.linalg.solve(torch.func.hessian(G, 1)(x, zero, None), -gradient(x, zero, None))
        return found

    exact = torch.func.grad(lambda x: F(x, lower(x), None))(x)
    errors = []
    for penalty in (100.0, 1000.0, 1e4):
        gradient, hessian = (of(penalized, 1)(x, zero, penalty) for of in (torch.func.grad, torch.func.hessian))
        y = torch.linalg.solve(hessian, -gradient)
        oracles, flat, y = open_oracles(TASK.problem, x, y)
        solver = GPBGD(penalty=penalty, upper_lr=1 + penalty)
        after = solver.step(oracles, solver.init(oracles, flat, y))
        assert float((after.y - y).norm()) < 1e-8
        errors.append(float((flat - after.x - exact).norm()))
    assert 9 < errors[0] / errors[1] < 11
    assert 9.9 < errors[1] / errors[2] < 10.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_defaults_solve_the_quadratic(dtype: torch.dtype) -> None:
    task = bilevel.problems.quadratic(dtype=dtype)
    solution = bilevel.solve(task.problem, GPBGD(), task.x0, task.y0, steps=GPBGD.contract_steps)
    error = task.x_error(solution.x)
    assert error is not None
    assert error < 1e-2
    assert solution.x.dtype == dtype
    assert solution.history["lower_gradient_norm"][-1] < 1.0


@pytest.mark.slow
def test_toys_with_a_regular_lower_level() -> None:
    for task, steps in ((toys.mc(), 1500), (toys.shen(), 1500)):
        solution = bilevel.solve(task.problem, GPBGD(), task.x0, task.y0, steps=steps)
        error = task.x_error(solution.x)
        assert error is not None
        assert error < 1e-2


def test_a_singular_hessian_is_a_trap_that_the_history_tells() -> None:
    """g = y^3 / 3 + y on the line has no minimizer, yet at y = 0, where g'' = 0, the penalty is stationary."""
    zero = torch.zeros((), dtype=torch.float64)
    problem = Problem(upper=lambda x, y, b: 0.5 * (x - 1).square(), lower=lambda x, y, b: y**3 / 3 + y + 0 * x)
    oracles, x, y = open_oracles(problem, zero + 1, zero)
    solver = GPBGD(penalty=10.0, lr=0.01)
    after = solver.step(oracles, solver.init(oracles, x, y))
    assert after.metrics is not None
    assert torch.equal(after.x, x)
    assert torch.equal(after.y, y)
    assert float(after.metrics.stationarity) == 0.0
    assert float(after.metrics.lower_gradient_norm) == 1.0


def test_nothing_moves_from_a_lower_minimizer_without_an_upper_objective() -> None:
    problem = Problem(upper=lambda x, y, b: 0 * y.sum() + 0 * x.sum(), lower=G)
    assert TASK.problem.lower_solution is not None
    oracles, x, y = open_oracles(problem, point(), TASK.problem.lower_solution(point()))
    state = GPBGD().init(oracles, x, y)
    for _ in range(3):
        state = GPBGD().step(oracles, state)
    assert float((state.x - x).abs().max()) < 1e-12
    assert float((state.y - y).abs().max()) < 1e-12


def test_counts_are_its_cost_line() -> None:
    oracles, x, y = open_oracles(TASK.problem, TASK.x0, TASK.y0)
    solver = GPBGD(measure_every=2)
    before = oracles.counts
    state = solver.init(oracles, x, y)
    assert max(oracles.counts - before) <= 32
    for measures in (False, False, True):
        before = oracles.counts
        state = solver.step(oracles, state)
        spent = oracles.counts - before
        assert (spent == Counts(gradients=2, hvps=1, crosses=1)) != measures


def test_options_and_refusals() -> None:
    options: list[dict[str, Any]] = [
        {"penalty": 0.0}, {"lr": 0.0}, {"upper_lr": -1.0}, {"upper_factor": 0.0}, {"measure_every": -1},
    ]  # fmt: skip
    for option in options:
        with pytest.raises(InvalidProblem, match=next(iter(option))):
            GPBGD(**option)
    with pytest.raises(InvalidProblem, match=r"lr=.* is outside \(0, .*stable"):
        bilevel.solve(TASK.problem, GPBGD(lr=0.2), TASK.x0, TASK.y0, steps=1)
    diverged = bilevel.solve(TASK.problem, GPBGD(upper_lr=5.0), TASK.x0, TASK.y0, steps=500)
    assert diverged.status is Status.DIVERGED
    for task in (toys.box(), toys.ineq(), toys.lasso1()):
        with pytest.raises(InvalidProblem, match="GPBGD does not handle"):
            bilevel.solve(task.problem, GPBGD(), task.x0, task.y0, steps=1)
