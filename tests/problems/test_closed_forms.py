"""Problems whose answers are formulas: the formulas, and that the library finds them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.dry_run import open_oracles
from bilevel.problems import Task, imaml_quadratic, quadratic, ridge, scalar

EXACT = bilevel.Implicit(linear=bilevel.Dense())

SOLVED: list[Callable[[], Task]] = [scalar, quadratic, imaml_quadratic, ridge]
REFERENCED: list[Callable[[], Task]] = [scalar, quadratic, imaml_quadratic]


def solution_of(task: Task, x: Tensor) -> Tensor:
    assert task.problem.lower_solution is not None
    y = task.problem.lower_solution(x)
    assert isinstance(y, Tensor)
    return y


@pytest.mark.parametrize("make", SOLVED)
def test_lower_solution_is_stationary(make: Callable[[], Task], generator: torch.Generator) -> None:
    task = make()
    x = task.x0 + torch.randn(task.x0.shape, generator=generator, dtype=torch.float64)
    oracles, flat_x, flat_y = open_oracles(task.problem, x, solution_of(task, x))
    _, gradient = oracles.lower_gradient(flat_x, flat_y)
    assert gradient.norm() < 1e-12


@pytest.mark.parametrize("make", REFERENCED)
def test_hypergradient_vanishes_at_the_reference(make: Callable[[], Task]) -> None:
    task = make()
    x = task.problem.reference
    found = bilevel.hypergradient(task.problem, x, solution_of(task, x), estimator=EXACT)
    assert found.gradient.norm() < 1e-12
    assert task.x_error(x) == 0.0


@pytest.mark.parametrize("make", REFERENCED)
def test_default_solver_comes_near_the_reference(make: Callable[[], Task]) -> None:
    task = make()
    solution = bilevel.solve(task.problem, bilevel.implicit(), task.x0, task.y0, steps=100)
    assert task.x_error(solution.x) < 0.05


@pytest.mark.parametrize("p", [3, 12])
def test_quadratic_without_decay_reaches_its_target_if_it_can(p: int) -> None:
    task = quadratic(p=p, d=3, decay=0.0)
    value = task.problem.upper(task.problem.reference, solution_of(task, task.problem.reference), None)
    assert value.isfinite()
    if p == 3:
        assert value < 1e-20


@pytest.mark.parametrize("h", [0.5, 20.0])
def test_scalar_hypergradient_does_not_depend_on_the_lower_scale(h: float) -> None:
    task = scalar(h=h, a=-2.0, t=1.0)
    x = torch.tensor(0.7, dtype=torch.float64)
    found = bilevel.hypergradient(task.problem, x, -2.0 * x, estimator=EXACT)
    torch.testing.assert_close(found.gradient, -2.0 * (-2.0 * x - 1.0), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("seed", [0, 3])
def test_ridge_hypergradient_is_the_formula(seed: int, generator: torch.Generator) -> None:
    task = ridge(seed=seed)
    x = -1.0 + torch.randn(10, generator=generator, dtype=torch.float64)
    y = solution_of(task, x)
    train, _ = task.problem.lower_data.batch(0, 0)
    validation, wanted = task.problem.upper_data.batch(0, 0)
    hessian = train.T @ train / len(train) + x.exp().diag()
    w = torch.linalg.solve(hessian, validation.T @ (validation @ y - wanted) / len(wanted))
    found = bilevel.hypergradient(task.problem, x, y, estimator=EXACT)
    torch.testing.assert_close(found.gradient, -x.exp() * y * w, rtol=1e-10, atol=1e-14)


def test_ridge_hypergradient_is_the_slope_of_the_validation_loss(generator: torch.Generator) -> None:
    task = ridge()
    x, direction = (torch.randn(10, generator=generator, dtype=torch.float64) for _ in range(2))
    batch = task.problem.upper_data.batch(0, 0)

    def value(at: Tensor) -> Tensor:
        return task.problem.upper(at, solution_of(task, at), batch)

    found = bilevel.hypergradient(task.problem, x, solution_of(task, x), estimator=EXACT).gradient @ direction
    errors = []
    for h in (1e-3, 1e-4):
        errors.append(abs(float((value(x + h * direction) - value(x - h * direction)) / (2 * h) - found)))
    assert errors[0] < 1e-5
    assert errors[1] < 0.05 * errors[0]


@pytest.mark.parametrize("strength", [0.3, 10.0])
def test_imaml_hypergradient_is_the_formula(strength: float, generator: torch.Generator) -> None:
    task = imaml_quadratic(tasks=3, d=4, strength=strength)
    x = torch.randn(4, generator=generator, dtype=torch.float64)
    y = solution_of(task, x)
    q, _ = task.problem.lower_data.batch(0, 0)
    t = task.problem.upper_data.batch(0, 0)
    m = strength * torch.linalg.inv(q + strength * torch.eye(4, dtype=torch.float64))
    wanted = torch.einsum("tij,ti->j", m, y - t) / 3
    found = bilevel.hypergradient(task.problem, x, y, estimator=EXACT)
    torch.testing.assert_close(found.gradient, wanted, rtol=1e-10, atol=0.0)


def test_imaml_starts_every_task_at_x() -> None:
    task = imaml_quadratic(tasks=3, d=4)
    x = torch.arange(4.0, dtype=torch.float64)
    y = task.problem.lower_init(x)
    assert y.shape == (3, 4)
    assert bool((y == x).all())
    _, _, flat = open_oracles(task.problem, x)
    assert flat.shape == (3, 4)
    solution = bilevel.solve(task.problem, bilevel.imaml(restart_lower=True), task.x0, steps=100)
    assert task.x_error(solution.x) < 0.05


@pytest.mark.parametrize("make", [scalar, quadratic, imaml_quadratic, ridge])
def test_float32_is_kept(make: Callable[..., Task]) -> None:
    task = make(dtype=torch.float32)
    solution = bilevel.solve(task.problem, bilevel.implicit(), task.x0, task.y0, steps=2)
    assert solution.x.dtype == solution.y.dtype == torch.float32
