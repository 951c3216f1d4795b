"""MEHA: its direction, its bias, its fixed point, its price, what it solves, and the traps around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import L2, Box, ElasticNet, InvalidProblem, NonNegative, Problem, Simplex, Status
from bilevel.dry_run import open_oracles
from bilevel.optimizers import Power
from bilevel.problems import Task, toys
from bilevel.solvers.lv_hba import LVHBA
from bilevel.solvers.meha import MEHA

STEPS = 900


def run(task: Task, solver: MEHA, steps: int = STEPS) -> dict[str, Any]:
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps)
    assert solution.status is Status.COMPLETED
    assert task.evaluate is not None
    return task.evaluate(solution.x, solution.y)


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# -- what a step is ----------------------------------------------------------------------------------------------------


def kinked() -> Problem:
    """A lower level with curvature, a kink and coupling, all in closed reach of Newton."""
    return Problem(
        upper=lambda x, y, b: (x * y).sum() + y.square().sum(),
        lower=lambda x, y, b: 0.5 * (y - x.sin()).square().sum() + 0.1 * (x * y).sum(),
        regularizer=ElasticNet(l1=lambda x: 0.3 * x.exp(), l2=0.5),
    )


def envelope(problem: Problem, x: Tensor, y: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return v(x, y) and its minimizer, by many prox steps on the whole of it."""
    oracles, *_ = open_oracles(problem, x, y, needs_hvp=False)
    theta = y.clone()
    for _ in range(300):
        slope = oracles.lower_gradient(x, theta, declared=False)[1] + (theta - y) / gamma
        theta = oracles.declared(x).prox(theta - 0.3 * slope, 0.3)
    return oracles.lower_value(x, theta) + (theta - y).square().sum() / (2 * gamma), theta


def test_direction_is_the_gradient_of_the_penalized_envelope() -> None:
    problem, gamma, penalty = kinked(), 0.7, 3.0
    x, y = doubles(0.4, -0.2, 0.1), doubles(0.8, -0.5, 0.05)
    oracles, *_ = open_oracles(problem, x, y, needs_hvp=False)
    theta = envelope(problem, x, y, gamma)[1]
    assert bool((theta == 0).any())
    assert bool((theta != 0).any())
    small = 1e-6  # a short step of x, so that y sees the same x
    solver = MEHA(gamma=gamma, penalty=penalty, lr=0.3, y_lr=1e-7, upper_lr=small)
    state = solver.init(oracles, x, y)._replace(theta=theta)
    after = solver.step(oracles, state)

    def penalized(x: Tensor, y: Tensor) -> Tensor:
        return oracles.upper_value(x, y) / penalty + oracles.lower_value(x, y) - envelope(problem, x, y, gamma)[0]

    for name, moved, step in (("x", (x - after.x) / small, 1e-5), ("y", (y - after.y) / 1e-7, 1e-5)):
        for i in range(3):
            e = torch.zeros_like(x)
            e[i] = step
            ends = [penalized(x + s * e, y) if name == "x" else penalized(x, y + s * e) for s in (1, -1)]
            assert float(moved[i]) == pytest.approx(float((ends[0] - ends[1]) / (2 * step)), abs=2e-5)


def test_nothing_moves_at_a_solution_without_the_upper_term() -> None:
    problem = kinked()
    x = doubles(0.4, -0.2, 0.9)
    y = envelope(problem, x, torch.zeros(3, dtype=torch.float64), 1e6)[1]
    oracles, *_ = open_oracles(problem, x, y, needs_hvp=False)
    solver = MEHA(gamma=1.0, penalty=1e14)
    state = solver.init(oracles, x, y)
    for _ in range(5):
        state = solver.step(oracles, state)
    torch.testing.assert_close(state.x, x, rtol=0, atol=1e-11)
    torch.testing.assert_close(state.y, y, rtol=0, atol=1e-11)
    torch.testing.assert_close(state.theta, y, rtol=0, atol=1e-11)


def test_cost_is_as_stated() -> None:
    task = bilevel.problems.quadratic()
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False)
    solver = MEHA()
    state = solver.init(oracles, x, y)
    assert oracles.counts.gradients == 80
    before = oracles.counts
    solver.step(oracles, state)
    spent = oracles.counts - before
    assert (spent.gradients, spent.hvps, spent.crosses, spent.values) == (6, 0, 0, 0)


def test_without_kinks_it_is_lv_hba_without_constraints() -> None:
    """One step gives the same x and θ; y differs by the order of updates, which vanishes with the steps."""
    task = bilevel.problems.quadratic()
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False)
    options: dict[str, Any] = {"gamma": 1.0, "penalty": 2.0, "lr": 0.1, "upper_lr": 0.05}
    states = [
        solver.step(oracles, solver.init(oracles, x, y + 1))
        for solver in (MEHA(**options, y_lr=0.05), LVHBA(**options))
    ]
    assert torch.equal(states[0].x, states[1].x)
    torch.testing.assert_close(states[0].theta, states[1].theta)
    ends = [
        bilevel.solve(task.problem, solver, task.x0, task.y0, steps=600).x
        for solver in (MEHA(**options, y_lr=0.05), LVHBA(**options))
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=5e-3, atol=5e-3)


@pytest.mark.slow
def test_bias_falls_like_one_over_the_penalty() -> None:
    task = toys.sc(1)
    errors = []
    for penalty in (5.0, 50.0):
        solution = bilevel.solve(task.problem, MEHA(penalty=penalty), task.x0, task.y0, steps=1500)
        errors.append(float((solution.x - task.problem.reference).abs()))
    assert 8.0 < errors[0] / errors[1] < 12.0


# -- what it solves ----------------------------------------------------------------------------------------------------

FAST = Power(1.0, 0.75)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "solver", "x_error", "y_error"),
    [
        (toys.lasso1(), MEHA(), 1e-9, 2e-2),
        (toys.mc(), MEHA(), 1e-3, 1e-3),
        pytest.param(toys.mc(100), MEHA(), 1e-3, 1e-3, marks=pytest.mark.slow),
        pytest.param(toys.sin(), MEHA(), 1e-2, 1e-2, marks=pytest.mark.slow),
        (toys.sin(start=3.0), MEHA(), 1e-2, 1e-2),
        pytest.param(toys.sin(start=6.0), MEHA(penalty=FAST), 1e-2, 1e-2, marks=pytest.mark.slow),
        (toys.sin(10, start=3.0), MEHA(penalty=FAST), 1e-2, 1e-2),
        (toys.wl(), MEHA(penalty=FAST), 1e-9, 1e-2),
        pytest.param(toys.shen(), MEHA(), 1e-2, 2e-2, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_toys(task: Task, solver: MEHA, x_error: float, y_error: float) -> None:
    errors = run(task, solver)
    assert errors["x_error"] <= x_error
    assert errors["y_error"] <= y_error


@pytest.mark.slow
def test_bounds_to_three_digits_within_the_exponents_of_the_paper() -> None:
    errors = run(toys.box(), MEHA(penalty=Power(5.0, 0.49)), 4000)
    assert errors["x_error"] <= 1e-3
    assert errors["y_error"] <= 1.5e-3


@pytest.mark.slow
def test_toys_to_more_digits() -> None:
    for task, x_error, y_error, steps in (
        (toys.lasso1(), 1e-9, 1e-3, 5000),
        (toys.wl(), 1e-9, 4e-3, 5000),
        (toys.box(), 1e-3, 1e-3, 2500),
    ):
        errors = run(task, MEHA(penalty=FAST), steps)
        assert errors["x_error"] <= x_error
        assert errors["y_error"] <= y_error


def test_the_relaxation_stays_below_the_optimum() -> None:
    for task in (toys.lasso1(), toys.box(), toys.sin(start=3.0)):
        assert run(task, MEHA(), 400)["gap"] <= 1e-9


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.9])
def test_the_solution_does_not_depend_on_the_steps(scale: float) -> None:
    """The prox is scaled by the step of its own gradient step, once, whatever that step is."""
    task = toys.lasso1()
    solver = MEHA(gamma=2.0, lr=0.4 * scale, y_lr=0.3 * scale, upper_lr=0.2 * scale)
    errors = run(task, solver, 800)
    assert errors["x_error"] < 1e-3
    assert errors["y_error"] < 2e-2


def test_a_threshold_scaled_twice_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    prox = ElasticNet.prox
    monkeypatch.setattr(ElasticNet, "prox", lambda self, c, v, step: prox(self, (step * c[0], c[1]), v, step))
    task = toys.lasso1()
    solver = MEHA(gamma=1.0, lr=0.2, y_lr=0.2, upper_lr=0.2)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=1000)
    assert float(solution.x) > 4.9  # driven to its bound of 5; the solution is 1


def test_float32() -> None:
    task = toys.lasso1(dtype=torch.float32)
    solution = bilevel.solve(task.problem, MEHA(), task.x0, task.y0, steps=STEPS)
    assert solution.x.dtype == torch.float32
    assert float(solution.x) == pytest.approx(1.0, abs=1e-4)
    assert solution.y[2] == 0


def test_lower_sets_and_iterates_stay_inside() -> None:
    task = toys.box()
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False)
    solver = MEHA()
    state = solver.init(oracles, x, y)
    for _ in range(200):
        state = solver.step(oracles, state)
        assert bool((state.y.abs() <= 1).all())
        assert bool((state.theta.abs() <= 1).all())
    assert float(state.y[0]) == 1.0


def test_kinks_beside_bounds() -> None:
    """Clamping the prox of an entry is the prox of both: y* = min(max(b - x, 0), 0.8)."""
    b = doubles(3.0, 1.2, 0.5)
    problem = Problem(
        upper=lambda x, y, _: 0.5 * (y - doubles(0.8, 0.2, 0.0)).square().sum(),
        lower=lambda x, y, _: 0.5 * (y - b).square().sum(),
        regularizer=ElasticNet(l1=lambda x: x),
        lower_set=Box(0, 0.8),
        upper_set=NonNegative(),
    )
    solution = bilevel.solve(problem, MEHA(penalty=FAST), doubles(0.5).sum(), 0 * b, steps=STEPS)
    torch.testing.assert_close(solution.y, doubles(0.8, 0.2, 0.0), rtol=0, atol=5e-3)
    assert float(solution.x) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("regularizer", [L2(lambda x: x.exp()), ElasticNet(l1=0.0, l2=lambda x: x.exp())])
def test_smooth_terms_are_declared_too(regularizer: Any) -> None:
    """g = ‖y - 2‖²/2 + e^x ‖y‖²/2, y* = 2 / (1 + e^x), target 1: x* = 0."""
    problem = Problem(
        upper=lambda x, y, _: (y - 1).square().sum(),
        lower=lambda x, y, _: 0.5 * (y - 2).square().sum(),
        regularizer=regularizer,
        upper_set=Box(-3, 3),
    )
    solution = bilevel.solve(problem, MEHA(), doubles(1.0).sum(), doubles(0.0), steps=STEPS)
    assert float(solution.x) == pytest.approx(0.0, abs=1e-2)


def test_blocks_share_x() -> None:
    """y_b* = x t_b, F = mean (y_b - 2 t_b)² / 2: x* = 2."""
    t = doubles(1.0, -2.0, 0.5)[:, None]
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - 2 * b).square().sum(),
        lower=lambda x, y, b: 0.5 * (y - x * b).square().sum(),
        upper_data=bilevel.Full(t),
        lower_data=bilevel.Full(t),
        blocks=3,
    )
    solution = bilevel.solve(problem, MEHA(), doubles(0.5).sum(), 0 * t, steps=500)
    assert float(solution.x) == pytest.approx(2.0, abs=2e-2)


def test_mini_batches_move_y_and_theta_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, 3, generator=generator, dtype=torch.float64) + 1.0
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - 2).square().sum(),
        lower=lambda x, y, b: 0.5 * (y - x - 0.3 * b[0].mean(0)).square().sum(),
        lower_data=bilevel.Shuffled((data,), batch_size=8),
    )
    zero = torch.zeros(3, dtype=torch.float64)
    oracles, x, y = open_oracles(problem, zero, zero, needs_hvp=False)
    solver = MEHA()
    state = solver.init(oracles, x, y)
    path = []
    for _ in range(600):
        state = solver.step(oracles, state)
        path.append(state.x)
    late = torch.stack(path[200:])
    # 0.3 / sqrt(8) = 0.1 is the noise of y*; the mean of x has none of it, and no bias.
    torch.testing.assert_close(late.mean(0), 2 - 0.3 * data.mean(0), rtol=0, atol=3e-3)
    assert float(late.std(0).max()) < 0.05


def test_stationarity_vanishes_where_it_converges() -> None:
    task = toys.mc()
    solution = bilevel.solve(task.problem, MEHA(), task.x0, task.y0, steps=3000, tol=1e-6)
    assert solution.status is Status.CONVERGED
    assert task.evaluate is not None
    assert task.evaluate(solution.x, solution.y)["x_error"] < 1e-5


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_gamma_beyond_the_nonconvexity_is_refused() -> None:
    task = toys.sin(start=3.0)
    y = task.y0 - 2.5  # sin is concave here
    with pytest.raises(InvalidProblem, match=r"gamma=10 must be below .*not smooth beyond"):
        bilevel.solve(task.problem, MEHA(gamma=10.0), task.x0, y, steps=1)


def test_the_measured_gamma_shrinks_where_nonconvexity_is_met() -> None:
    task = toys.sin()
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False)
    solver = MEHA()
    state = solver.init(oracles, x, y)
    first = float(state.curvature.gamma())
    for _ in range(300):
        state = solver.step(oracles, state)
    assert first > 5
    assert float(state.curvature.gamma()) * float(state.curvature.concave) <= 0.5 + 1e-9


@pytest.mark.parametrize("name", ["lr", "y_lr"])
def test_unstable_steps_are_refused(name: str) -> None:
    task = bilevel.problems.quadratic()
    with pytest.raises(InvalidProblem, match=rf"{name}=1 is outside \(0, "):
        bilevel.solve(task.problem, MEHA(**{name: 1.0}), task.x0, task.y0, steps=1)


def test_a_run_that_diverges_says_so_before_it_overflows() -> None:
    task = bilevel.problems.quadratic()
    solution = bilevel.solve(task.problem, MEHA(upper_lr=10.0), task.x0, task.y0, steps=500)
    assert solution.status is Status.DIVERGED
    assert "upper_lr" in solution.message
    assert bool(solution.x.isfinite().all())


def test_backtracking_mends_an_upper_step_that_diverges() -> None:
    task = bilevel.problems.quadratic()
    solver = MEHA(upper_lr=10.0)
    assert bilevel.solve(task.problem, solver, task.x0, task.y0, steps=500).status is Status.DIVERGED
    mended = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=800, on_nonfinite="backtrack")
    assert task.x_error(mended.x) < 0.1  # type: ignore[operator]


def test_curvature_that_grows_on_the_way_is_followed() -> None:
    """g = y^4 / 4 - x y from y = 0, where it is flat; at y = 3 its curvature is 27."""
    problem = Problem(
        upper=lambda x, y, _: 0.5 * (y - 3).square(),
        lower=lambda x, y, _: 0.25 * y**4 - x * y,
    )
    solution = bilevel.solve(problem, MEHA(), doubles(30.0).sum(), doubles(0.5).sum(), steps=STEPS)
    assert solution.status is Status.COMPLETED
    assert float(solution.y) == pytest.approx(float(solution.x) ** (1 / 3), abs=1e-3)
    assert abs(float(solution.y) - 3) < 0.7 * abs(30 ** (1 / 3) - 3)
    assert float(solution.state.curvature.lower) > 10


def test_sets_and_terms_without_a_joint_prox_are_refused() -> None:
    task = toys.lasso1()
    problem = Problem(
        upper=task.problem.upper,
        lower=task.problem.lower,
        regularizer=task.problem.regularizer,
        lower_set=Simplex(),
    )
    with pytest.raises(InvalidProblem, match="no joint prox of ElasticNet and Simplex"):
        bilevel.solve(problem, MEHA(), task.x0, task.y0, steps=1)


@pytest.mark.parametrize(
    "options", [{"gamma": 0.0}, {"lr": -1.0}, {"penalty": 0.0}, {"upper_factor": 0.0}, {"y_lr": float("inf")}]
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(InvalidProblem, match=next(iter(options))):
        MEHA(**options)  # type: ignore[arg-type]
