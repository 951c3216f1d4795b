"""The known answers of the toys: lower minimizers, stationary, feasible, and best among their neighbors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.dry_run import open_oracles
from bilevel.problems import Task, toys

NAMES = ("sc", "mc", "sin", "wl", "lasso1", "llc", "ineq", "mci", "box", "shen")
SOLVED = ("sc", "lasso1", "ineq", "box", "shen")


def make(name: str, **options: Any) -> Task:
    task: Task = getattr(toys, name)(**options)
    return task


def reference_of(task: Task) -> Tensor:
    assert isinstance(task.problem.reference, Tensor)
    return task.problem.reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_opens_in_both_precisions_and_judges_its_start(name: str, dtype: torch.dtype) -> None:
    task = make(name, dtype=dtype)
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False)
    assert x.dtype == y.dtype == dtype
    assert oracles.lower_gradients(x, y).x.shape == x.shape
    assert task.evaluate is not None
    judged = task.evaluate(task.x0, task.y0)
    assert set(judged) == {"x_error", "y_error", "gap"}
    assert judged["x_error"] > 1e-2
    assert all(math.isfinite(value) for value in judged.values())


@pytest.mark.parametrize("name", SOLVED)
def test_reference_is_a_minimizer_of_the_whole(name: str) -> None:
    task = make(name)
    x_star = reference_of(task)
    follow = task.problem.lower_solution
    assert follow is not None

    def whole(x: Tensor) -> float:
        return float(task.problem.upper(x, follow(x), None))

    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = torch.randn(x_star.shape, generator=generator, dtype=torch.float64)
        ahead, here, behind = (whole(x_star + h * direction) for h in (1e-4, 0.0, -1e-4))
        assert abs(ahead - behind) / 2e-4 < 1e-6
        assert ahead + behind > 2 * here
    assert task.evaluate is not None
    judged = task.evaluate(x_star, follow(x_star))
    assert max(abs(value) for value in judged.values()) < 1e-12


@pytest.mark.parametrize("name", [*SOLVED, "wl"])
def test_lower_solution_is_best_among_feasible_neighbors(name: str) -> None:
    task = make(name)
    problem = task.problem
    assert problem.lower_solution is not None
    generator = torch.Generator().manual_seed(1)
    for x in (task.x0, 0.4 * torch.ones_like(task.x0), 0.9 * torch.ones_like(task.x0)):
        oracles, flat_x, _ = open_oracles(problem, x, task.y0, needs_hvp=False)
        y = problem.lower_solution(x).reshape(-1)
        best = oracles.lower_value(flat_x, y)
        for _ in range(20):
            near = oracles.project_y(y + 0.1 * torch.randn(y.shape, generator=generator, dtype=torch.float64))
            if problem.constraint is not None and bool((problem.constraint(x, near, None) > 0).any()):
                continue
            assert oracles.lower_value(flat_x, near) > best


def test_box_is_stationary_where_its_bound_is_active() -> None:
    task = make("box")
    x_star = reference_of(task)
    y_star = x_star.clamp(-1, 1)
    assert y_star[0] == 1.0
    assert x_star[0] > 1.5


@pytest.mark.parametrize("start", [0.0, 3.0])
def test_sin_lies_in_the_right_valley(start: float) -> None:
    task = make("sin", n=3, a=1.0, c=-1.0, start=start)
    x_star = reference_of(task)
    valleys = [-math.pi / 2 + 2 * k * math.pi for k in range(-4, 5)]

    def value(x: float) -> float:
        """Return f where each y_i lies in the best valley for x: `x + y_i - c = C`."""
        return (x - 1.0) ** 2 + 3 * min((valley - 1.0 - x) ** 2 for valley in valleys)

    grid = [-6 + 0.001 * i for i in range(12001)]
    assert abs(min(grid, key=value) - float(x_star)) < 2e-3
    assert float(task.x0) == start


def test_merely_convex_answers_are_lower_minimizers_and_best() -> None:
    for n in (1, 3):
        task = make("mc", n=n)
        one = torch.ones(n, dtype=torch.float64)
        assert float(task.problem.upper(one, {"y1": one, "y2": one}, None)) == 0.0
        x = one.clone().requires_grad_()
        y1 = one.clone().requires_grad_()
        value = task.problem.lower(x, {"y1": y1, "y2": one}, None)
        assert not torch.autograd.grad(value, y1)[0].any()


def test_linear_equality_has_the_multiplier_and_is_normalized() -> None:
    for n in (1, 4):
        task = make("llc", n=n)
        one = torch.ones(n, dtype=torch.float64)
        y1, y2 = (0.7 * one).requires_grad_(), (-0.4 * one).requires_grad_()
        x = reference_of(task)
        equality = task.problem.equality
        assert equality is not None
        h = equality(x, {"y1": y1, "y2": y2}, None)
        assert abs(float(h.detach())) < 1e-12
        lagrangian = task.problem.lower(x, {"y1": y1, "y2": y2}, None) - math.sqrt(3 * n) * h.sum()
        for gradient in torch.autograd.grad(lagrangian, [y1, y2], retain_graph=True):
            assert float(gradient.abs().max()) < 1e-12
        row = torch.autograd.grad(h.sum(), [y1, y2])
        assert float(sum(g.square().sum() for g in row)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["llc", "ineq", "mci"])
def test_joint_projection_is_feasible_idempotent_and_nearest(name: str) -> None:
    task = make(name)
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False)
    generator = torch.Generator().manual_seed(2)

    def violation(x: Tensor, y: Tensor) -> float:
        if task.problem.equality is not None:
            return float(oracles.constraint(x, y, name="equality").value.abs().max())
        return float(oracles.constraint(x, y).value.clamp_min(0).max())

    for _ in range(10):
        a, b = (3 * torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in (x, y))
        near = oracles.project_jointly(a, b)
        assert violation(*near) < 1e-12
        for once, again in zip(near, oracles.project_jointly(*near), strict=True):
            torch.testing.assert_close(once, again, rtol=0, atol=1e-12)
        other = oracles.project_jointly(a + 0.3, b - 0.5)
        # The obtuse angle that characterizes a projection on a convex set.
        inner = ((a - near[0]) * (other[0] - near[0])).sum() + ((b - near[1]) * (other[1] - near[1])).sum()
        if name != "mci":  # its x does not enter the constraint, and is not moved
            assert float(inner) < 1e-9


def test_mci_is_the_best_of_its_lower_minimizers() -> None:
    task = make("mci")
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    values = [
        float(task.problem.upper(x.reshape(1), torch.stack([x, torch.minimum(x, 1 - x)]), None)) for x in grid.unbind()
    ]
    assert abs(float(grid[values.index(min(values))]) - 0.6) < 1e-3
    assert min(values) == pytest.approx(0.1, abs=1e-5)


def test_sc_with_matrices() -> None:
    a, b, d = (torch.diag(torch.tensor(v, dtype=torch.float64)) for v in ([1.0, 2.0], [2.0, 1.0], [1.0, 3.0]))
    b[0, 1] = 0.5
    task = make("sc", n=2, a=a, b=b, d=d)
    x_star = reference_of(task).clone().requires_grad_()
    follow = task.problem.lower_solution
    assert follow is not None
    gradient = torch.autograd.grad(task.problem.upper(x_star, follow(x_star), None), x_star)[0]
    assert float(gradient.abs().max()) < 1e-12
    assert torch.equal(reference_of(make("sc")), torch.full((4,), 0.5, dtype=torch.float64))


def test_wl_is_judged_by_the_set_of_its_solutions() -> None:
    task = make("wl", n=4)
    assert task.evaluate is not None
    for first in (0.25, 0.6, 1.0):
        x = torch.tensor([first, 1.0, 0.0, 0.0], dtype=torch.float64)
        y = torch.tensor([0.0, 0.0, -0.25, -0.25], dtype=torch.float64)
        assert task.evaluate(x, y) == {"x_error": 0.0, "y_error": 0.0, "gap": 0.0}
    assert task.evaluate(torch.full((4,), 0.1, dtype=torch.float64), y)["x_error"] > 0.1


def test_shen_minima_are_stationary_and_ranked() -> None:
    task = make("shen", start=2.5)
    assert float(task.x0) == 2.5 == -float(task.y0)
    assert task.evaluate is not None
    for minimum, value in toys.SHEN_MINIMA:
        x = torch.tensor(minimum, dtype=torch.float64, requires_grad=True)
        whole = task.problem.upper(x, -x, None)
        assert float(whole.detach()) == pytest.approx(value, abs=1e-12)
        assert abs(float(torch.autograd.grad(whole, x)[0])) < 1e-10
        judged = task.evaluate(x.detach(), -x.detach())
        assert judged["x_error"] < 1e-12
        assert judged["gap"] == pytest.approx(value - toys.SHEN_MINIMA[1][1], abs=1e-12)
