"""V-PBGD: its direction and bias law, its minima on the toys by start, its cost and its refusals."""

from __future__ import annotations

from collections.abc import Callable
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
from bilevel.solvers.v_pbgd import VPBGD

TASK = bilevel.problems.quadratic()
F, G = TASK.problem.upper, TASK.problem.lower


def root(gradient: Callable[[Tensor], Tensor], size: int = 10) -> Tensor:
    """Return where an affine gradient is zero."""
    zero = torch.zeros(size, dtype=torch.float64)
    found: Tensor = torch.linalg.solve(torch.func.jacrev(gradient)(zero), -gradient(zero))
    return found


def penalized(x: Tensor, penalty: float) -> Tensor:
    """Return the minimizer in y of f + penalty g."""
    return root(torch.func.grad(lambda y: F(x, y, None) + penalty * G(x, y, None)))


def lower(x: Tensor) -> Tensor:
    return root(torch.func.grad(lambda y: G(x, y, None)))


def point() -> Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def moved(solver: VPBGD, problem: Problem, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return by how much one step moves x and y, with steps of 1 / penalty."""
    oracles, x, y = open_oracles(problem, x, y, needs_hvp=False)
    state = solver.init(oracles, x, y)._replace(z=z)
    after = solver.step(oracles, state)
    return x - after.x, y - after.y


@pytest.mark.parametrize("penalty", [1.0, 10.0])
def test_direction_is_the_gradient_of_the_penalized_value(penalty: float) -> None:
    """At exact y and z: that of min_y (f + penalty g) - penalty min_z g, by central differences."""
    x = point()

    def whole(x: Tensor) -> Tensor:
        y, z = penalized(x, penalty), lower(x)
        value: Tensor = F(x, y, None) + penalty * (G(x, y, None) - G(x, z, None))
        return value

    solver = VPBGD(penalty=penalty, upper_lr=1 + penalty)
    d_x, d_y = moved(solver, TASK.problem, x, penalized(x, penalty), lower(x))
    steps = 1e-4 * torch.eye(4, dtype=torch.float64)
    expected = torch.stack([(whole(x + h) - whole(x - h)) / 2e-4 for h in steps])
    torch.testing.assert_close(d_x, expected, rtol=1e-7, atol=1e-8)
    assert float(d_y.norm()) < 1e-10


def test_bias_is_inversely_proportional_to_the_penalty() -> None:
    x = point()
    exact = torch.func.grad(lambda x: F(x, lower(x), None))(x)
    errors = []
    for penalty in (100.0, 1000.0, 1e4):
        solver = VPBGD(penalty=penalty, upper_lr=1 + penalty)
        d_x, _ = moved(solver, TASK.problem, x, penalized(x, penalty), lower(x))
        errors.append(float((d_x - exact).norm()))
    assert 9 < errors[0] / errors[1] < 11
    assert 9.9 < errors[1] / errors[2] < 10.1


def test_no_bias_where_the_levels_oppose_each_other() -> None:
    """f = -g: for every penalty above 1 the direction is that of the minimax problem."""
    x = point()
    problem = Problem(upper=lambda x, y, b: -G(x, y, b), lower=G)
    exact = torch.func.grad(lambda x: -G(x, lower(x), None))(x)
    for penalty in (1.5, 30.0):
        d_x, d_y = moved(VPBGD(penalty=penalty, upper_lr=1 + penalty), problem, x, lower(x), lower(x))
        torch.testing.assert_close(d_x, exact, rtol=1e-10, atol=1e-10)
        assert float(d_y.norm()) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_defaults_solve_the_quadratic(dtype: torch.dtype) -> None:
    task = bilevel.problems.quadratic(dtype=dtype)
    solution = bilevel.solve(task.problem, VPBGD(), task.x0, task.y0, steps=VPBGD.contract_steps)
    error = task.x_error(solution.x)
    assert error is not None
    assert error < 1e-2
    assert solution.x.dtype == dtype


@pytest.mark.parametrize(("start", "minimum"), [(0.0, 0.367), (0.3, 0.367), (1.0, 1.188), (1.5, 1.188), (2.5, 2.824)])
def test_start_decides_the_minimum_of_shen(start: float, minimum: float) -> None:
    task = toys.shen(start)
    solution = bilevel.solve(task.problem, VPBGD(penalty=10.0), task.x0, task.y0, steps=800)
    assert float(solution.x) == pytest.approx(minimum, abs=1e-3)


@pytest.mark.slow
def test_minima_of_shen_to_a_hundredth() -> None:
    for start, minimum in ((0.3, 0), (1.0, 1), (2.5, 2)):
        task = toys.shen(start)
        solution = bilevel.solve(task.problem, VPBGD(penalty=50.0), task.x0, task.y0, steps=8000)
        assert float(solution.x) == pytest.approx(toys.SHEN_MINIMA[minimum][0], abs=1e-2)


def test_merely_convex_lower_level() -> None:
    task = toys.mc()
    solution = bilevel.solve(task.problem, VPBGD(), task.x0, task.y0, steps=1500)
    error = task.x_error(solution.x)
    assert error is not None
    assert error < 1e-3


@pytest.mark.slow
def test_bounds_of_the_lower_level() -> None:
    """The bound of y's first entry is active: no bias there, elsewhere it is about 1 / (4 penalty)."""
    task = toys.box()
    errors = []
    for penalty in (10.0, 40.0):
        solution = bilevel.solve(task.problem, VPBGD(penalty=penalty), task.x0, task.y0, steps=3000)
        assert isinstance(task.problem.reference, Tensor)
        gaps = (solution.x - task.problem.reference).abs()
        assert float(gaps[0]) < 1e-8
        assert float(solution.y[0]) == 1.0
        assert bool((solution.y.abs() <= 1).all())
        assert bool((solution.state.z.abs() <= 1).all())
        errors.append(float(gaps.max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_a_start_outside_the_lower_set_is_projected() -> None:
    task = toys.box()
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False)
    state = VPBGD().init(oracles, x, y + 5)
    assert torch.equal(state.y, torch.ones_like(y))
    assert torch.equal(state.z, torch.ones_like(y))


def test_nothing_moves_from_a_lower_minimizer_without_an_upper_objective() -> None:
    problem = Problem(upper=lambda x, y, b: 0 * y.sum() + 0 * x.sum(), lower=G)
    x = point()
    oracles, x, y = open_oracles(problem, x, lower(x), needs_hvp=False)
    state = VPBGD().init(oracles, x, y)
    for _ in range(3):
        state = VPBGD().step(oracles, state)
    for now, then in ((state.x, x), (state.y, y), (state.z, y)):
        assert float((now - then).abs().max()) < 1e-12


def test_counts_are_its_cost_line() -> None:
    oracles, x, y = open_oracles(TASK.problem, TASK.x0, TASK.y0, needs_hvp=False)
    solver = VPBGD(lower_steps=5, measure_every=2)
    before = oracles.counts
    state = solver.init(oracles, x, y)
    assert (oracles.counts - before).gradients <= 240
    for measures in (False, False, True):
        before = oracles.counts
        state = solver.step(oracles, state)
        spent = oracles.counts - before
        assert spent._replace(gradients=0) == Counts()
        assert (spent.gradients > 8) == measures
        assert measures or spent.gradients == 8


@pytest.mark.parametrize("factor", [1e-2, 1e2])
def test_default_steps_do_not_depend_on_the_units_of_x(factor: float) -> None:
    task = bilevel.problems.quadratic()
    problem = Problem(
        upper=lambda x, y, b: task.problem.upper(factor * x, y, b),
        lower=lambda x, y, b: task.problem.lower(factor * x, y, b),
    )
    plain = bilevel.solve(task.problem, VPBGD(), task.x0, task.y0, steps=50)
    scaled = bilevel.solve(problem, VPBGD(), task.x0 / factor, task.y0, steps=50)
    torch.testing.assert_close(factor * scaled.x, plain.x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scaled.y, plain.y, rtol=1e-3, atol=1e-3)


def test_lower_batches_are_shared_by_y_and_z() -> None:
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
    solver = VPBGD(lower_steps=2)
    state = solver.init(oracles, x, y)
    for k in range(3):
        seen.clear()
        state = solver.step(oracles, state)
        batches = [float(oracles.batch("lower", 2 * k + j)[0].sum()) for j in (0, 1, 1, 1)]
        assert seen == batches


def test_schedules_and_lengths() -> None:
    x = point()
    constant = moved(VPBGD(penalty=3.0, lr=0.05, lower_lr=0.1), TASK.problem, x, TASK.y0, TASK.y0)
    scheduled = moved(VPBGD(penalty=lambda x, k: 3.0 + k, lr=0.05, lower_lr=0.1), TASK.problem, x, TASK.y0, TASK.y0)
    for one, other in zip(constant, scheduled, strict=True):
        assert torch.equal(one, other)
    oracles, x, y = open_oracles(TASK.problem, x, TASK.y0, needs_hvp=False)
    solver = VPBGD(penalty=3.0, lr=0.05, lower_lr=0.1, lower_steps=2)
    after = solver.step(oracles, solver.init(oracles, x, y))
    z = y
    for _ in range(2):
        z = z - 0.1 * oracles.lower_gradient(x, z)[1]
    torch.testing.assert_close(after.z, z)
    f, at_y, at_z = oracles.upper_gradient(x, y), oracles.lower_gradients(x, y), oracles.lower_gradients(x, z)
    torch.testing.assert_close(after.y, y - 0.05 / 4 * (f.y + 3 * at_y.y))
    torch.testing.assert_close(after.x, x - 0.05 / 4 * (f.x + 3 * (at_y.x - at_z.x)))
    longer = replace(solver, upper_lr=0.5).step(oracles, solver.init(oracles, x, y))
    torch.testing.assert_close(longer.x - x, 10 * (after.x - x))
    assert torch.equal(longer.y, after.y)
    shorter = solver.backtracked(0.5).step(oracles, solver.init(oracles, x, y))
    torch.testing.assert_close(shorter.x - x, 0.5 * (after.x - x))


def test_steps_that_are_too_long_are_refused_or_end_as_diverged() -> None:
    for options in ({"lr": 0.5}, {"lower_lr": 0.7}):
        with pytest.raises(InvalidProblem, match=r"lr=.* is outside \(0, .*stable"):
            bilevel.solve(TASK.problem, VPBGD(**options), TASK.x0, TASK.y0, steps=1)
    solution = bilevel.solve(TASK.problem, VPBGD(upper_lr=5.0), TASK.x0, TASK.y0, steps=500)
    assert solution.status is Status.DIVERGED


@pytest.mark.parametrize(
    "options",
    [{"penalty": 0.0}, {"penalty": -1.0}, {"lower_steps": 0}, {"lr": 0.0}, {"upper_lr": -1.0}, {"lower_lr": 0.0},
     {"upper_factor": 0.0}, {"measure_every": -1}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidProblem, match=next(iter(options))):
        VPBGD(**options)


def test_lower_levels_it_cannot_treat_are_refused() -> None:
    for task in (toys.ineq(), toys.llc(), toys.lasso1()):
        with pytest.raises(InvalidProblem, match="VPBGD does not handle"):
            bilevel.solve(task.problem, VPBGD(), task.x0, task.y0, steps=1)
