"""F2SA: its bias law, its fixed point, its stability, and the traps of the published code."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, Adam, InvalidProblem, Problem
from bilevel.data import DataSource
from bilevel.dry_run import open_oracles
from bilevel.optimizers import Power
from bilevel.penalty import Gap
from bilevel.problems import toys
from bilevel.solvers.f2sa import F2SA, F2SAState


class Quadratic(NamedTuple):
    """g = y^T A y / 2 - x^T B y + c^T y, f = ‖y - t‖^2 / 2 + ‖x - s‖^2 / 4, and what follows in closed form."""

    a: Tensor
    b: Tensor
    c: Tensor
    t: Tensor
    s: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Quadratic:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        q, _ = torch.linalg.qr(normal(6, 6))
        b = normal(4, 6)
        a = q @ torch.diag(torch.linspace(1, 4, 6, dtype=torch.float64)) @ q.T
        parts = (a, b / torch.linalg.matrix_norm(b, 2), normal(6), normal(6), normal(4))
        return cls(*(part.to(dtype) for part in parts))

    def problem(self, scale: float = 1.0, **parts: Any) -> Problem:
        def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
            return scale * (0.5 * (y - self.t).square().sum() + 0.25 * (x - self.s).square().sum())

        def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
            noise = 0.0 if batch is None else batch[0] @ y
            return 0.5 * y @ (self.a @ y) - x @ (self.b @ y) + self.c @ y + noise

        return Problem(upper=upper, lower=lower, **parts)

    def lower_solution(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.a, self.b.T @ x - self.c)

    def relaxed(self, x: Tensor, penalty: float) -> Tensor:
        eye = torch.eye(6, dtype=self.a.dtype)
        return torch.linalg.solve(self.a + eye / penalty, self.b.T @ x - self.c + self.t / penalty)

    def hypergradient(self, x: Tensor) -> Tensor:
        return 0.5 * (x - self.s) + self.b @ torch.linalg.solve(self.a, self.lower_solution(x) - self.t)

    def penalized(self, x: Tensor, penalty: float) -> Tensor:
        """Return min_y (f + penalty g) - penalty min_y g, traced in x."""
        problem = self.problem()
        y, z = self.relaxed(x, penalty), self.lower_solution(x)
        gap = problem.lower(x, y, None) - problem.lower(x, z, None)
        return problem.upper(x, y, None) + penalty * gap

    @property
    def solution(self) -> Tensor:
        # The hypergradient is affine in x.
        zero = torch.zeros(4, dtype=self.a.dtype)
        columns = [self.hypergradient(e) - self.hypergradient(zero) for e in torch.eye(4, dtype=self.a.dtype)]
        return torch.linalg.solve(torch.stack(columns, dim=1), -self.hypergradient(zero))


class Noise(DataSource):
    """A fresh noise vector at every step."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    @property
    def deterministic(self) -> bool:
        return False

    def batch(self, step: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(hash((step, seed)) & (2**62 - 1))
        return (self.scale * torch.randn(6, generator=generator, dtype=torch.float64),)


@pytest.fixture
def quadratic(generator: torch.Generator) -> Quadratic:
    return Quadratic.draw(generator)


def run(problem: Problem, solver: F2SA, steps: int, x: Tensor | None = None, y: Tensor | None = None) -> F2SAState:
    x0 = torch.zeros(4, dtype=torch.float64) if x is None else x
    oracles, x0, y0 = open_oracles(problem, x0, x0.new_zeros(6) if y is None else y, needs_hvp=False)
    state = solver.init(oracles, x0, y0)
    for _ in range(steps):
        state = solver.step(oracles, state)
    return state


def direction(quadratic: Quadratic, x: Tensor, penalty: float) -> Tensor:
    oracles, x, _ = open_oracles(quadratic.problem(), x, x.new_zeros(6), needs_hvp=False)
    y, z = quadratic.relaxed(x, penalty), quadratic.lower_solution(x)
    return Gap.at(oracles, x, y, z, 0, 0, 0).direction(penalty)


# -- the formulas ------------------------------------------------------------------------------------------------------


def test_bias_falls_like_one_over_the_penalty(quadratic: Quadratic) -> None:
    x = torch.ones(4, dtype=torch.float64)
    errors = [float((direction(quadratic, x, p) - quadratic.hypergradient(x)).norm()) for p in (1e1, 1e2, 1e3, 1e4)]
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(9 <= ratio <= 11 for ratio in ratios)


def test_direction_is_the_derivative_of_the_penalized_problem(quadratic: Quadratic) -> None:
    x = torch.full((4,), 0.3, dtype=torch.float64)
    h = direction(quadratic, x, 10.0)
    step = 1e-4
    for i, e in enumerate(torch.eye(4, dtype=torch.float64)):
        ahead, behind = (quadratic.penalized(x + sign * step * e, 10.0) for sign in (1, -1))
        assert float(h[i]) == pytest.approx(float(ahead - behind) / (2 * step), abs=1e-8)


def test_one_step_is_the_formula(quadratic: Quadratic) -> None:
    x, y = torch.ones(4, dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64)
    solver = F2SA(upper=SGD(0.3), penalty=5.0, lower_lr=0.1, lower_steps=1, momentum=0.0)
    state = run(quadratic.problem(), solver, 1, x, y)

    def in_y(y: Tensor) -> Tensor:
        return quadratic.a @ y - quadratic.b.T @ x + quadratic.c

    z = y - 0.1 * in_y(y)
    relaxed = y - 0.1 * (in_y(y) + (y - quadratic.t) / 5.0)
    h = 0.5 * (x - quadratic.s) + 5.0 * (-quadratic.b @ relaxed + quadratic.b @ z)
    torch.testing.assert_close(state.y, z, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(state.relaxed, relaxed, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(state.x, x - 0.3 * h, rtol=1e-12, atol=1e-14)
    assert state.metrics is not None
    residuals = torch.cat([h, in_y(z), in_y(relaxed) + (relaxed - quadratic.t) / 5.0])
    torch.testing.assert_close(state.metrics.stationarity, residuals.norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(state.metrics.lower_gradient_norm, in_y(z).norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(state.metrics.upper_value, quadratic.problem().upper(x, z, None), rtol=1e-12, atol=0)


def test_momentum_is_nesterovs_and_outlives_a_step(quadratic: Quadratic) -> None:
    y = torch.full((6,), 0.5, dtype=torch.float64)
    x = torch.ones(4, dtype=torch.float64)
    z = torch.nn.Parameter(y.clone())
    optimizer = torch.optim.SGD([z], lr=0.1, momentum=0.7, nesterov=True)
    for _ in range(6):
        z.grad = quadratic.a @ z.detach() - quadratic.b.T @ x + quadratic.c
        optimizer.step()
    solver = F2SA(upper=SGD(1e-300), penalty=5.0, lower_lr=0.1, lower_steps=3, momentum=0.7)
    torch.testing.assert_close(run(quadratic.problem(), solver, 2, x, y).y, z.detach(), rtol=1e-12, atol=1e-14)


def test_momentum_follows_an_ill_conditioned_lower_problem() -> None:
    task = bilevel.problems.quadratic(condition=300.0)
    plain, faster = (
        bilevel.solve(task.problem, F2SA(momentum=momentum), task.x0, task.y0, steps=100) for momentum in (0.0, 0.9)
    )
    ratio = faster.history["lower_gradient_norm"][-1] / plain.history["lower_gradient_norm"][-1]
    assert ratio < 0.5


def test_the_solution_of_the_penalized_problem_does_not_move(quadratic: Quadratic) -> None:
    penalty, x = 20.0, torch.zeros(4, dtype=torch.float64)
    zero = direction(quadratic, x, penalty)
    slope = torch.stack([direction(quadratic, e, penalty) - zero for e in torch.eye(4, dtype=torch.float64)], dim=1)
    x = torch.linalg.solve(slope, -zero)
    solver = F2SA(upper=SGD(0.3), penalty=penalty)
    oracles, x, y = open_oracles(quadratic.problem(), x, quadratic.lower_solution(x), needs_hvp=False)
    relaxed = quadratic.relaxed(x, penalty)
    state = solver.init(oracles, x, y)._replace(relaxed=relaxed, landed=(y, relaxed))
    for _ in range(5):
        state = solver.step(oracles, state)
    assert float((state.x - x).abs().max()) < 1e-12
    assert float((state.y - y).abs().max()) < 1e-12
    assert state.metrics is not None
    assert float(state.metrics.stationarity) < 1e-12


# -- how it converges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.1, 0.6])
def test_single_loop_at_a_large_penalty_ends_at_its_bias(quadratic: Quadratic, tau: float) -> None:
    """Equal steps of y and z: their errors cancel, so one lower step for each upper one is enough."""
    solver = F2SA(upper=SGD(tau), penalty=1000.0, lower_lr=0.2, lower_steps=1)
    x = run(quadratic.problem(), solver, 700).x
    bias = (direction(quadratic, x, 1000.0) - quadratic.hypergradient(x)).norm()
    assert float(quadratic.hypergradient(x).norm()) == pytest.approx(float(bias), rel=2e-2)
    assert float(bias) < 1e-3


def test_growing_penalty_follows_its_bias(quadratic: Quadratic) -> None:
    solver = F2SA(upper=SGD(0.2), penalty=Power(2.0, 1 / 3), lower_lr=0.2, lower_steps=1)
    x = run(quadratic.problem(), solver, 1000).x
    bias = (direction(quadratic, x, 20.0) - quadratic.hypergradient(x)).norm()
    assert float(quadratic.hypergradient(x).norm()) == pytest.approx(float(bias), rel=0.05)


def test_an_adversary_below_leaves_no_bias() -> None:
    """With g = -f in y the penalized derivative is exact at any penalty: y and z agree at the solution."""
    m = torch.tensor([[1.0, -2.0], [0.5, 1.0]], dtype=torch.float64)

    def play(x: Tensor, y: Tensor, b: Any) -> Tensor:
        return 0.5 * y.square().sum() - y @ (m @ x)

    problem = Problem(upper=lambda x, y, b: (x - 1).square().sum() - play(x, y, b), lower=play)
    solver = F2SA(upper=SGD(0.1), penalty=4.0)
    solution = bilevel.solve(problem, solver, torch.zeros(2).double(), torch.zeros(2).double(), steps=300)
    expected = torch.linalg.solve(2 * torch.eye(2).double() + m.T @ m, 2 * torch.ones(2).double())
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("start", [0.4, 1.0, 2.8])
def test_shen_from_three_valleys(start: float) -> None:
    task = toys.shen(start)
    solution = bilevel.solve(task.problem, F2SA(), task.x0, task.y0, steps=200)
    assert task.evaluate is not None
    assert task.evaluate(solution.x, solution.y)["x_error"] <= 1e-2


def test_declared_regularizer_has_its_part_in_x() -> None:
    """y* = 1 / (1 + e^x) and f = (y - 1/2)^2 / 2, so x* = 0."""
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - 0.5).square().sum(),
        lower=lambda x, y, b: 0.5 * (y - 1).square().sum(),
        regularizer=bilevel.L2(weight=lambda x: x.exp()),
    )
    one = torch.ones(1, dtype=torch.float64)
    solution = bilevel.solve(problem, F2SA(upper=SGD(5.0), penalty=100.0), one, 0 * one, steps=200)
    assert abs(float(solution.x)) < 1e-2


def test_blocks() -> None:
    targets = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - b[0]).square().sum(),
        lower=lambda x, y, b: (y - x).square().sum(),
        upper_data=bilevel.Full((targets,)),
        blocks=2,
    )
    x, y = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    solution = bilevel.solve(problem, F2SA(upper=SGD(0.5), penalty=1e3), x, y, steps=100)
    torch.testing.assert_close(solution.x, targets.mean(0), rtol=1e-3, atol=1e-3)
    assert solution.y.shape == (2, 2)


# -- stability ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 1e3])
def test_scaling_the_upper_objective_and_the_penalty_together_changes_no_path(
    quadratic: Quadratic, factor: float
) -> None:
    plain = run(quadratic.problem(), F2SA(upper=SGD(0.1), penalty=10.0), 20)
    scaled = run(quadratic.problem(factor), F2SA(upper=SGD(0.1 / factor), penalty=10.0 * factor), 20)
    for name in ("x", "y", "relaxed"):
        torch.testing.assert_close(getattr(scaled, name), getattr(plain, name), rtol=1e-6, atol=1e-6)


def test_rounding_at_the_largest_penalty(generator: torch.Generator) -> None:
    exact = Quadratic.draw(generator)
    x = torch.ones(4, dtype=torch.float64)
    rounded = Quadratic(*(part.float() for part in exact))
    h, h32 = direction(exact, x, 1e3), direction(rounded, x.float(), 1e3)
    assert float((h32 - h).norm() / h.norm()) < 1e-3


def test_unstable_lower_steps_are_refused(quadratic: Quadratic) -> None:
    solver = F2SA(lower_lr=0.55, momentum=0.0)  # the largest curvature is 4
    with pytest.raises(InvalidProblem, match=r"lower_lr=0\.55 is outside \(0, 0\.4\d"):
        run(quadratic.problem(), solver, 0)
    assert run(quadratic.problem(), F2SA(lower_lr=0.45, momentum=0.0), 1).step == 1
    with pytest.raises(InvalidProblem, match=r"lower_lr=0\.45 is outside \(0, 0\.3\d"):
        run(quadratic.problem(), F2SA(lower_lr=0.45), 0)


def test_a_start_without_curvature_is_refused() -> None:
    problem = Problem(upper=lambda x, y, b: (x * y).square().sum(), lower=lambda x, y, b: (y - x).abs().sum())
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(InvalidProblem, match="no curvature in y"):
        bilevel.solve(problem, F2SA(), one, 3 * one, steps=1)


@pytest.mark.parametrize("lower_lr", [None, 0.8])
def test_growing_curvature_is_followed(lower_lr: float | None) -> None:
    """The lower curvature grows from 1 to 1000 while x moves: steps measured at the start alone threw x to -858."""
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (x - 7).square().sum() + 0.1 * y.square().sum(),
        lower=lambda x, y, b: 0.5 * (x.exp() * (y - 1).square()).sum(),
    )
    zero = torch.zeros(2, dtype=torch.float64)
    solver = F2SA(upper=SGD(0.05), lower_lr=lower_lr, lower_steps=3)
    solution = bilevel.solve(problem, solver, zero, zero, steps=150)
    torch.testing.assert_close(solution.x, torch.full_like(zero, 7.0), rtol=1e-2, atol=1e-2)
    curvature = solution.state.curvature.lower
    assert float(curvature) == pytest.approx(float(solution.x.max().exp()), rel=0.1)


def test_curvature_is_forgotten_slowly() -> None:
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (x + 3).square().sum(), lower=lambda x, y, b: 0.5 * (x.exp() * y.square()).sum()
    )
    one = torch.ones(1, dtype=torch.float64)
    oracles, x, y = open_oracles(problem, 3 * one, one, needs_hvp=False)
    solver = F2SA(upper=SGD(0.5))
    state = solver.init(oracles, x, y)
    before = float(state.curvature.lower)
    state = solver.step(oracles, solver.step(oracles, state))
    assert 0.98 * before < float(state.curvature.lower) < before


def test_shared_batches_cancel_their_noise(quadratic: Quadratic) -> None:
    """The penalty multiplies the difference of two lower gradients: on independent batches, also their noise."""
    errors = {}
    for shared in (True, False):
        solver = F2SA(upper=SGD(0.02), penalty=100.0, lower_lr=0.2, lower_steps=1, shared_batches=shared)
        state, total = None, 0.0
        oracles, x, y = open_oracles(
            quadratic.problem(lower_data=Noise(0.1)), quadratic.solution, torch.zeros(6).double(), needs_hvp=False
        )
        state = solver.init(oracles, x, y)
        for k in range(300):
            state = solver.step(oracles, state)
            total += float(quadratic.hypergradient(state.x).square().sum()) if k >= 200 else 0.0
        errors[shared] = total / 100
    assert errors[True] < 1e-3 * errors[False]


# -- costs and options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower_lr", [None, 0.2])
@pytest.mark.parametrize("lower_steps", [1, 3])
def test_counts(quadratic: Quadratic, lower_steps: int, lower_lr: float | None) -> None:
    solver = F2SA(lower_steps=lower_steps, lower_lr=lower_lr)
    oracles, x, y = open_oracles(quadratic.problem(), torch.zeros(4).double(), torch.zeros(6).double())
    state = solver.init(oracles, x, y)
    assert oracles.counts.gradients == 25  # two for each of 6 Lanczos steps and of 2 levels, and one
    before = oracles.counts
    solver.step(oracles, state)
    assert oracles.counts - before == (1, 3 * (lower_steps + 1) + 1, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": 0.0}, "penalty must be"),
        ({"penalty": float("nan")}, "penalty must be"),
        ({"penalty": "large"}, "penalty must be"),
        ({"lower_lr": -0.1}, "lower_lr must be"),
        ({"lower_steps": 0}, "lower_steps must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"upper": 0.1}, "upper must be an Optimizer"),
        ({"upper": bilevel.LBFGS()}, "upper must be an Optimizer"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        F2SA(**options)


def test_schedules_of_both_steps(quadratic: Quadratic) -> None:
    solver = F2SA(upper=SGD(Power(0.3, -0.2)), penalty=50.0, lower_lr=Power(0.3, -0.3, limit=0.1))
    x = run(quadratic.problem(), solver, 300).x
    assert float(quadratic.hypergradient(x).norm()) < 1e-2


@pytest.mark.slow
def test_adam_at_a_constant_length_outruns_the_lower_level() -> None:
    """Why the default's steps shrink."""
    task = bilevel.problems.quadratic(condition=30.0, d=20)
    errors = []
    for solver in (F2SA(), F2SA(upper=Adam(0.1))):
        error = task.x_error(bilevel.solve(task.problem, solver, task.x0, task.y0, steps=300).x)
        assert error is not None
        errors.append(error)
    assert errors[0] < 0.03
    assert errors[1] > 0.2


def test_iterates_stay_in_the_upper_set(quadratic: Quadratic) -> None:
    problem = quadratic.problem(upper_set=bilevel.Box(-0.1, 0.1))
    seen = []
    bilevel.solve(
        problem, F2SA(), torch.ones(4).double(), torch.zeros(6).double(), steps=50,
        callbacks=[lambda event: seen.append(event.x)],
    )  # fmt: skip
    assert all(bool((x.abs() <= 0.1).all()) for x in seen)
    assert bool((seen[-1].abs() == 0.1).any())
