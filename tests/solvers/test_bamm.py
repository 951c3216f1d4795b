"""sl-BAMM: its direction, bias, fixed point and cost, and the problems that it alone, or it wrongly, solves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import InvalidProblem, Problem, Status
from bilevel.dry_run import open_oracles
from bilevel.oracles import Counts
from bilevel.problems import Task, toys
from bilevel.solvers.bamm import BAMM, S1, S2, S3, Powers

TASK = bilevel.problems.quadratic()
F, G = TASK.problem.upper, TASK.problem.lower


def root(gradient: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Return where an affine gradient is zero."""
    zero = torch.zeros(size, dtype=torch.float64)
    found: Tensor = torch.linalg.solve(torch.func.jacrev(gradient)(zero), -gradient(zero))
    return found


def averaged(x: Tensor, mu: float) -> Tensor:
    """Return the minimizer in y of mu f + (1 - mu) g, differentiable in x."""
    return root(torch.func.grad(lambda y: mu * F(x, y, None) + (1 - mu) * G(x, y, None)), 10)


def point() -> Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def direction(x: Tensor, mu: float) -> Tensor:
    """Return -(the step of x) / alpha where y and the multiplier are exact for mu."""
    y = averaged(x, mu)
    hessian = torch.func.hessian(lambda y: mu * F(x, y, None) + (1 - mu) * G(x, y, None))(y)
    multiplier = torch.linalg.solve(hessian, torch.func.grad(lambda y: F(x, y, None))(y))
    oracles, x, y = open_oracles(TASK.problem, x, y)
    solver = BAMM(mu=mu, decay=0.0, upper_lr=1.0)
    state = solver.init(oracles, x, y)._replace(multiplier=multiplier)
    after = solver.step(oracles, state)
    torch.testing.assert_close(after.y, y, rtol=0, atol=1e-10)
    torch.testing.assert_close(after.multiplier, multiplier, rtol=0, atol=1e-10)
    assert after.metrics is not None
    assert float(after.metrics.residual) < 1e-10
    assert float(after.metrics.stationarity) == pytest.approx(float((x - after.x).norm()), rel=1e-8)
    return x - after.x


@pytest.mark.parametrize("mu", [0.0, 0.1, 0.7])
def test_direction_is_the_gradient_through_the_averaged_minimizer(mu: float) -> None:
    x = point()
    expected = torch.func.grad(lambda x: F(x, averaged(x, mu), None))(x)
    torch.testing.assert_close(direction(x, mu), expected, rtol=1e-9, atol=1e-9)


def test_bias_is_proportional_to_mu() -> None:
    x = point()
    exact = torch.func.grad(lambda x: F(x, averaged(x, 0.0), None))(x)
    errors = [float((direction(x, mu) - exact).norm()) for mu in (1e-2, 1e-3, 1e-4)]
    assert errors[0] / errors[1] == pytest.approx(10, abs=1)
    assert errors[1] / errors[2] == pytest.approx(10, abs=0.2)


def test_without_weight_it_is_unbiased() -> None:
    solution = bilevel.solve(TASK.problem, BAMM(mu=0.0), TASK.x0, TASK.y0, steps=1000)
    error = TASK.x_error(solution.x)
    assert error is not None
    assert error < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_defaults_solve_the_quadratic_and_the_merely_convex_toy(dtype: torch.dtype) -> None:
    for task, steps, tolerance in (
        (bilevel.problems.quadratic(dtype=dtype), 300, 1e-2),
        (toys.mc(n=100, dtype=dtype), 700, 1e-3),
    ):
        solution = bilevel.solve(task.problem, BAMM(), task.x0, task.y0, steps=steps)
        error = task.x_error(solution.x)
        assert error is not None
        assert error < tolerance
    assert solution.x.dtype == dtype


def test_merely_convex_needs_the_upper_curvature() -> None:
    """Without it x stops halfway while the multiplier grows along the null space of the Hessian."""
    task = toys.mc()
    solution = bilevel.solve(task.problem, BAMM(mu=0.0, lr=0.1), task.x0, task.y0, steps=800)
    torch.testing.assert_close(solution.x, torch.full_like(solution.x, 0.505), rtol=0, atol=1e-3)
    assert float(solution.state.multiplier.norm()) > 20
    assert solution.history["residual"][-1] > 0.5


@pytest.mark.slow
def test_third_strategy_of_the_authors_on_their_toy() -> None:
    task = toys.mc(n=100)
    solver = BAMM(mu=0.9, decay=0.1, powers=S3, lr=0.1, upper_lr=0.1)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=6000)
    error = task.x_error(solution.x)
    assert error is not None
    assert error < 2e-5


def test_strategies_shrink_the_steps() -> None:
    assert S3.factors(1, 0.9) == pytest.approx((1.0, 0.9**3))
    assert S2.factors(16, 0.5) == pytest.approx((16 ** (-1 / 80) * 0.5, 16 ** (-3 / 80) * 0.5**5))
    assert S1.factors(16, 0.5) == pytest.approx((16 ** (-1 / 80) * 0.25, 16 ** (-3 / 80) * 0.5**7))
    assert Powers().factors(99, 0.1) == (1.0, 1.0)
    assert S1.factors(1, 0.0) == (1.0, 1.0)  # mu = 0 for good: powers of it would stop everything
    moves = []
    oracles, x, y = open_oracles(TASK.problem, point(), TASK.y0)
    for powers in (Powers(), S3, S2, S1):
        solver = BAMM(mu=0.5, powers=powers, upper_lr=0.01)
        moves.append(float((solver.step(oracles, solver.init(oracles, x, y)).x - x).norm()))
    assert [move / moves[0] for move in moves] == pytest.approx([1, 0.5**3, 0.5**5, 0.5**7])


def test_weight_falls_with_the_steps() -> None:
    """The steps of y show the weight: psi' = mu f' + (1 - mu) g'."""
    oracles, x, y = open_oracles(TASK.problem, point(), TASK.y0)
    solver = BAMM(mu=0.8, decay=0.5, lr=0.1)
    state = solver.init(oracles, x, y)
    for k in (0, 3, 15):
        after = solver.step(oracles, state._replace(step=k))
        mu = 0.8 / (k + 1) ** 0.5
        expected = mu * oracles.upper_gradient(x, y).y + (1 - mu) * oracles.lower_gradient(x, y)[1]
        torch.testing.assert_close((y - after.y) / 0.1, expected)
        assert after.metrics is not None
        torch.testing.assert_close(after.metrics.lower_value, oracles.lower_value(x, y))
        torch.testing.assert_close(after.metrics.lower_gradient_norm, oracles.lower_gradient(x, y)[1].norm())


def test_weight_falls_faster_where_g_is_strongly_convex() -> None:
    for task, decay in ((TASK, 1.0), (toys.mc(), 0.5)):
        oracles, x, y = open_oracles(task.problem, task.x0, task.y0)
        state = BAMM().init(oracles, x, y)
        assert state.decay == decay
        assert BAMM().step(oracles, state).decay == decay
        assert BAMM(decay=0.2).init(oracles, x, y).decay == 0.2


def test_nothing_moves_from_a_solution_without_an_upper_objective() -> None:
    problem = Problem(upper=lambda x, y, b: 0 * y.sum() + 0 * x.sum(), lower=G)
    x = point()
    oracles, x, y = open_oracles(problem, x, averaged(x, 0.0))
    solver = BAMM(mu=0.0)
    state = solver.init(oracles, x, y)
    for _ in range(3):
        state = solver.step(oracles, state)
    assert float((state.x - x).abs().max()) < 1e-12
    assert float((state.y - y).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("mu", "cost"),
    [(0.0, Counts(gradients=2, hvps=1, crosses=1)), (0.5, Counts(gradients=3, hvps=1, crosses=1))],
)
def test_counts_are_its_cost_line(mu: float, cost: Counts) -> None:
    oracles, x, y = open_oracles(TASK.problem, TASK.x0, TASK.y0)
    before = oracles.counts
    solver = BAMM(mu=mu, measure_every=2)
    state = solver.init(oracles, x, y)
    assert oracles.counts.gradients - before.gradients <= 64
    for measures in (0, 0, 1, 0, 1):
        before = oracles.counts
        state = solver.step(oracles, state)
        spent = oracles.counts - before
        assert spent.hvps == cost.hvps
        assert spent.crosses == cost.crosses
        assert (spent.gradients > cost.gradients) == bool(measures)
    before = oracles.counts
    replace(solver, measure_every=0).step(oracles, state)
    assert oracles.counts - before == cost


def test_measured_steps_follow_the_problem() -> None:
    """A lower objective whose curvature grows with x, from 2 to about 150, would overtake steps measured once."""
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (x - 5).square() + 0.5 * y.square().sum(),
        lower=lambda x, y, b: 0.5 * (x.exp() + 1) * y.square().sum() - y.sum(),
    )
    x0, y0 = torch.zeros((), dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    solution = bilevel.solve(problem, BAMM(measure_every=10), x0, y0, steps=300)
    assert solution.status is Status.COMPLETED
    assert abs(float(solution.x) - 5) < 0.2
    with pytest.raises(bilevel.SolveFailed, match="ran away"):
        bilevel.solve(problem, BAMM(measure_every=0), x0, y0, steps=300, throw=True)


def test_badly_conditioned_lower_levels_stay_stable() -> None:
    for seed in range(3):
        task = bilevel.problems.quadratic(seed=seed, condition=30.0)
        for mu in (0.0, 0.5):
            solution = bilevel.solve(task.problem, BAMM(mu=mu), task.x0, task.y0, steps=200)
            error = task.x_error(solution.x)
            assert error is not None
            assert error < 1.0


def test_upper_steps_that_are_too_long_end_as_diverged() -> None:
    solution = bilevel.solve(TASK.problem, BAMM(upper_lr=1.0), TASK.x0, TASK.y0, steps=300)
    assert solution.status is Status.DIVERGED
    assert "ran away" in solution.message
    again = bilevel.solve(TASK.problem, BAMM(upper_lr=1.0), TASK.x0, TASK.y0, steps=300, on_nonfinite="backtrack")
    assert torch.isfinite(again.x).all()


def test_long_lower_steps_are_refused_at_the_door() -> None:
    with pytest.raises(InvalidProblem, match=r"lr=1 is outside \(0, .*stable"):
        bilevel.solve(TASK.problem, BAMM(lr=1.0), TASK.x0, TASK.y0, steps=1)


@pytest.mark.parametrize(
    "options",
    [{"mu": 1.0}, {"mu": -0.1}, {"decay": -1.0}, {"lr": 0.0}, {"upper_lr": -1.0}, {"upper_factor": 0.0},
     {"measure_every": -1}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidProblem, match=next(iter(options))):
        BAMM(**options)


@pytest.mark.parametrize("task", [toys.box(), toys.ineq(), toys.lasso1()], ids=lambda task: task.name)
def test_lower_levels_it_cannot_treat_are_refused(task: Task) -> None:
    with pytest.raises(InvalidProblem, match="BAMM does not handle"):
        bilevel.solve(task.problem, BAMM(), task.x0, task.y0, steps=1)


def test_upper_set_and_factor() -> None:
    problem = replace(TASK.problem, upper_set=bilevel.Box(-0.3, 0.3))
    solution = bilevel.solve(problem, BAMM(), TASK.x0, TASK.y0, steps=300)
    assert float(solution.x.abs().max()) == pytest.approx(0.3)
    oracles, x, y = open_oracles(TASK.problem, point(), TASK.y0)
    whole, half = (BAMM().backtracked(factor) for factor in (1.0, 0.5))
    moved = [s.step(oracles, s.init(oracles, x, y)).x - x for s in (whole, half)]
    torch.testing.assert_close(moved[1], 0.5 * moved[0])


def test_a_declared_regularizer_counts_as_part_of_g() -> None:
    """Ridge, once traced and once declared, gives the same steps."""
    data = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = data.sum(1)

    def fit(x: Tensor, y: Tensor, b: Any) -> Tensor:
        return 0.5 * (data @ y - target).square().mean()

    x0, y0 = torch.zeros(1, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    traced = Problem(upper=fit, lower=lambda x, y, b: fit(x, y, b) + 0.5 * (x.exp() * y.square()).sum())
    declared = Problem(upper=fit, lower=fit, regularizer=bilevel.L2(lambda x: x.exp()))
    one, other = (bilevel.solve(p, BAMM(), x0, y0, steps=50) for p in (traced, declared))
    torch.testing.assert_close(one.x, other.x, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(one.y, other.y, rtol=1e-6, atol=1e-8)
