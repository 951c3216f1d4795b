"""Proximal gradients: scikit-learn's paths, optimality of every kind of prox, hard starts, and honest ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import enet_path
from torch import Tensor

from bilevel.layout import Layout
from bilevel.optimizers.coordinate_descent import CoordinateDescent
from bilevel.optimizers.lbfgs import LBFGS
from bilevel.optimizers.proximal import ProximalGradient
from bilevel.regularizers import L1, ElasticNet, GroupL1, Regularizer, SparseGroupL1
from bilevel.sets import Box, L1Ball, Simplex
from bilevel.status import InvalidProblem, Status


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diabetes() -> tuple[Tensor, Tensor]:
    inputs, targets = (torch.tensor(v) for v in load_diabetes(return_X_y=True))
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    return inputs, (targets - targets.mean()) / targets.std()


def least_squares(a: Tensor, t: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def fun(y: Tensor) -> tuple[Tensor, Tensor]:
        residual = a @ y - t
        return residual.square().sum() / (2 * len(t)), a.T @ residual / len(t)

    return fun


def soft(weight: float | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda v, step: torch.where(v.abs() < step * weight, torch.zeros_like(v), v - step * weight * v.sign())


def identity(v: Tensor, step: Tensor) -> Tensor:
    return v


def quadratic(scale: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda y: ((scale * y.square()).sum() / 2, scale * y)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
def test_paths_of_scikit_learn_are_reproduced(l1_ratio: float) -> None:
    a, t = diabetes()
    largest = float((a.T @ t).abs().max()) / len(t) / l1_ratio
    grid = torch.logspace(0, -3, 20, dtype=torch.float64).numpy() * largest
    alphas, path, _ = enet_path(a.numpy(), t.numpy(), l1_ratio=l1_ratio, alphas=grid, tol=1e-14, max_iter=10**6)
    fun, layout, y = least_squares(a, t), Layout.of(torch.zeros(10, dtype=torch.float64)), torch.zeros(10).double()
    supports = set()
    for alpha, expected in zip(alphas, torch.tensor(path.T), strict=True):
        net = ElasticNet(float(alpha) * l1_ratio, float(alpha) * (1 - l1_ratio))
        coefficients = net.coefficients(None, layout)
        solver = ProximalGradient(tol=1e-11, max_steps=5000)
        minimum = solver.minimize(fun, lambda v, step, net=net, c=coefficients: net.prox(c, v, step), y)
        y = minimum.y
        assert minimum.status is Status.CONVERGED
        assert float((y - expected).abs().max()) < 1e-8
        assert torch.equal(y == 0, expected == 0)
        supports.add(int((y != 0).sum()))
    assert len(supports) >= 6


REGULARIZERS: dict[str, Regularizer] = {
    "group": GroupL1(0.3, groups=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, -1, -1])),
    "sparse_group": SparseGroupL1(0.05, 0.2, groups=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, -1, -1])),
    "weighted": L1(lambda x: torch.arange(10) / 20),
}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_result_satisfies_the_optimality_conditions(name: str) -> None:
    a, t = diabetes()
    regularizer, y0 = REGULARIZERS[name], torch.zeros(10, dtype=torch.float64)
    coefficients = regularizer.coefficients(None, Layout.of(y0))
    fun = least_squares(a, t)
    solver = ProximalGradient(tol=1e-12, max_steps=5000)
    minimum = solver.minimize(fun, lambda v, step: regularizer.prox(coefficients, v, step), y0)
    gradient, held = fun(minimum.y)[1], regularizer.held(coefficients, minimum.y)
    assert minimum.status is Status.CONVERGED
    assert 0 < int(held.sum()) < 10
    assert float((gradient + regularizer.gradient(coefficients, minimum.y))[~held].norm()) < 1e-11
    assert float(regularizer.slack(coefficients, minimum.y, gradient).min()) > 0


@pytest.mark.parametrize("constraint", [Box(-0.1, 0.2), Simplex(), L1Ball(0.5)])
def test_projections_are_proxes(constraint: Any) -> None:
    a, t = diabetes()
    project = constraint.bind(Layout.of(torch.zeros(10, dtype=torch.float64)))
    fun = least_squares(a, t)
    minimum = ProximalGradient(tol=1e-12, max_steps=5000).minimize(fun, lambda v, step: project(v), a.new_zeros(10))
    y = minimum.y
    assert minimum.status is Status.CONVERGED
    assert torch.equal(project(y), y) or float((project(y) - y).norm()) < 1e-15
    for seed in range(200):
        other = project(y + 0.1 * draw(10, seed=seed))
        assert float(fun(y)[1] @ (other - y)) > -1e-10


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_without_a_prox_it_is_an_accelerated_gradient_method(condition: float) -> None:
    scale = torch.logspace(0, torch.log10(torch.tensor(condition)).item(), 30, dtype=torch.float64)
    minimum = ProximalGradient(tol=1e-9, max_steps=20_000).minimize(quadratic(scale), identity, draw(30))
    assert minimum.status is Status.CONVERGED
    assert float(minimum.y.norm()) < 1e-8
    assert minimum.steps < 60 * condition**0.5  # linear in the root of the condition number
    assert minimum.evaluations <= minimum.steps + 10


def softplus(y: Tensor) -> tuple[Tensor, Tensor]:
    """A convex function that is nearly linear far away and curved near 0."""
    return torch.nn.functional.softplus(y).sum() - 0.5 * y.sum(), torch.sigmoid(y) - 0.5


@pytest.mark.parametrize("start", [30.0, -200.0, 0.1])
def test_steps_shrink_where_more_curvature_shows_up(start: float) -> None:
    y0 = torch.tensor([start, 2 * start], dtype=torch.float64)
    minimum = ProximalGradient(tol=1e-10).minimize(softplus, identity, y0)
    assert minimum.status is Status.CONVERGED
    assert float(minimum.y.norm()) < 1e-8


def test_a_trial_that_overflows_is_taken_back() -> None:
    def fun(y: Tensor) -> tuple[Tensor, Tensor]:
        return (y.exp() - y).sum(), y.exp() - 1

    minimum = ProximalGradient(tol=1e-9).minimize(fun, identity, torch.tensor([-3000.0, -40.0], dtype=torch.float64))
    assert minimum.status is Status.CONVERGED
    assert float(minimum.y.norm()) < 1e-8


@pytest.mark.parametrize("step", [1e-3, 0.5, 1e6])
def test_a_given_first_step_of_any_length(step: float) -> None:
    scale = torch.tensor([1.0, 4.0, 10.0], dtype=torch.float64)
    counted = [0]

    def fun(y: Tensor) -> tuple[Tensor, Tensor]:
        counted[0] += 1
        return quadratic(scale)(y)

    minimum = ProximalGradient(tol=1e-9, step=step, max_steps=5000).minimize(fun, identity, draw(3))
    assert minimum.status is Status.CONVERGED
    assert float(minimum.y.norm()) < 1e-7
    assert minimum.evaluations == counted[0] <= minimum.steps + 2


def test_a_warm_start_at_the_solution_ends_at_once() -> None:
    a, t = diabetes()
    solver = ProximalGradient(tol=1e-9, max_steps=5000)
    first = solver.minimize(least_squares(a, t), soft(0.05), a.new_zeros(10))
    again = solver.minimize(least_squares(a, t), soft(0.05), first.y)
    assert again.status is Status.CONVERGED
    assert again.steps <= 2
    assert torch.equal(again.y == 0, first.y == 0)


def test_rows_are_one_point() -> None:
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    target = draw(2, 3)
    minimum = ProximalGradient(tol=1e-11).minimize(
        lambda y: ((scale * (y - target).square()).sum(-1) / 2, scale * (y - target)),
        soft(0.7),
        torch.zeros_like(target),
    )
    expected = soft(0.7)(target, 1 / scale)
    assert minimum.status is Status.CONVERGED
    assert float((minimum.y - expected).norm()) < 1e-10


def test_float32_ends_where_rounding_does() -> None:
    a, t = (v.float() for v in diabetes())
    minimum = ProximalGradient(max_steps=5000).minimize(least_squares(a, t), soft(0.02), a.new_zeros(10))
    exact = ProximalGradient(tol=1e-12, max_steps=5000).minimize(
        least_squares(*diabetes()), soft(0.02), torch.zeros(10).double()
    )
    assert minimum.y.dtype == torch.float32
    assert minimum.status in {Status.STALLED, Status.CONVERGED}
    assert minimum.steps < 2000
    assert float((minimum.y - exact.y).norm()) < 1e-5
    assert torch.equal(minimum.y == 0, exact.y == 0)


def test_limits_give_the_best_point_seen() -> None:
    a, t = diabetes()
    residuals = []
    for max_steps in (0, 1, 5, 25, 60):
        minimum = ProximalGradient(tol=1e-12).minimize(
            least_squares(a, t), soft(0.01), a.new_zeros(10), max_steps=max_steps
        )
        assert minimum.status is Status.STEP_LIMIT
        assert minimum.steps == max_steps
        residuals.append(float(minimum.gradient_norm))
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 0.05 * residuals[0]
    loose = ProximalGradient(tol=1e-12).minimize(least_squares(a, t), soft(0.01), a.new_zeros(10), tol=1e-2)
    assert loose.status is Status.CONVERGED
    assert float(loose.gradient_norm) <= 1e-2


def test_what_falls_without_end_has_diverged() -> None:
    minimum = ProximalGradient(max_steps=10_000).minimize(
        lambda y: (-y.square().sum(), -2 * y), identity, torch.ones(2, dtype=torch.float64)
    )
    assert minimum.status is Status.DIVERGED


def test_a_run_without_progress_stalls() -> None:
    def noise(y: Tensor) -> tuple[Tensor, Tensor]:
        return y.sum() * 0, torch.randn(
            y.shape, generator=torch.Generator().manual_seed(int(1e6 * y[0])), dtype=y.dtype
        )

    minimum = ProximalGradient(patience=7, step=1e-3).minimize(noise, identity, torch.ones(3, dtype=torch.float64))
    assert minimum.status is Status.STALLED
    assert minimum.steps < 200


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_start_that_is_not_finite_says_so(bad: float) -> None:
    def fun(y: Tensor) -> tuple[Tensor, Tensor]:
        return y.sum() * bad, y * bad

    assert ProximalGradient().minimize(fun, identity, torch.ones(2)).status is Status.NON_FINITE


def test_a_linear_function_on_a_box() -> None:
    minimum = ProximalGradient().minimize(
        lambda y: (-y.sum(), -torch.ones_like(y)), lambda v, step: v.clamp(0, 3), torch.zeros(2)
    )
    assert minimum.y.tolist() == [3.0, 3.0]
    assert minimum.status is Status.CONVERGED


def test_inputs_are_untouched_and_buffers_may_be_reused() -> None:
    buffer = torch.zeros(3, dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)

    def fun(y: Tensor) -> tuple[Tensor, Tensor]:
        assert not y.requires_grad
        buffer.copy_(scale * y)
        return (scale * y.square()).sum() / 2, buffer

    y0 = draw(3).requires_grad_()
    kept = y0.detach().clone()
    minimum = ProximalGradient(tol=1e-9).minimize(fun, identity, y0)
    assert torch.equal(y0.detach(), kept)
    assert not minimum.y.requires_grad
    assert float(minimum.y.norm()) < 1e-8


def test_runs_are_deterministic_and_leave_the_random_state() -> None:
    a, t = diabetes()
    state = torch.get_rng_state()
    one, other = (ProximalGradient().minimize(least_squares(a, t), soft(0.01), a.new_zeros(10)) for _ in range(2))
    assert torch.equal(one.y, other.y)
    assert torch.equal(state, torch.get_rng_state())


def test_it_agrees_with_lbfgs_on_a_smooth_problem() -> None:
    a, t = draw(40, 6), draw(40, seed=1).sign()

    def fun(y: Tensor) -> tuple[Tensor, Tensor]:
        leaf = y.detach().requires_grad_()
        with torch.enable_grad():
            value = torch.nn.functional.softplus(-t * (a @ leaf)).mean() + 0.05 * leaf.square().sum()
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    one = ProximalGradient(tol=1e-10).minimize(fun, identity, a.new_zeros(6))
    other = LBFGS(tol=1e-10).minimize(fun, a.new_zeros(6))
    torch.testing.assert_close(one.y, other.y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"max_steps": -1}, {"max_steps": 1.5}, {"tol": 0}, {"tol": "1"}, {"step": 0.0}, {"step": -1.0}, {"patience": 0}],
)
def test_unusable_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidProblem, match=next(iter(options))):
        ProximalGradient(**options)


def test_unusable_calls_are_refused() -> None:
    y = torch.zeros(2)
    with pytest.raises(InvalidProblem, match="tol"):
        ProximalGradient().minimize(quadratic(torch.ones(2)), identity, y, tol=-1.0)
    with pytest.raises(InvalidProblem, match="max_steps"):
        ProximalGradient().minimize(quadratic(torch.ones(2)), identity, y, max_steps=-1)
    for gradient in (torch.zeros(3), torch.zeros(2).double()):
        with pytest.raises(InvalidProblem, match="returned a gradient of shape"):
            ProximalGradient().minimize(lambda y, g=gradient: (y.sum(), g), identity, y)


# -- coordinate descent ------------------------------------------------------------------------------------------------


def test_coordinate_descent_is_proximal_gradients_with_any_weights() -> None:
    a, t = draw(50, 20), draw(50, seed=1)
    l1, l2 = 0.02 + 0.2 * draw(20, seed=2).abs(), draw(20, seed=3).abs() * (draw(20, seed=4) > 0)

    def fun(y: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = least_squares(a, t)(y)
        return value + (l2 * y.square()).sum() / 2, gradient + l2 * y

    one = CoordinateDescent(a, t, tol=1e-14).minimize(l1, l2, a.new_zeros(20))
    other = ProximalGradient(tol=1e-12).minimize(fun, soft(l1), a.new_zeros(20))
    assert one.status is Status.CONVERGED
    assert float(one.gradient_norm) < 1e-10
    torch.testing.assert_close(one.y, other.y, rtol=1e-9, atol=1e-10)
    assert torch.equal(one.y == 0, other.y == 0)
    torch.testing.assert_close(one.value, least_squares(a, t)(one.y)[0])


def test_coordinate_descent_keeps_types_and_says_when_it_stops_short() -> None:
    a, t = draw(50, 20).float(), draw(50, seed=1).float()
    descent = CoordinateDescent(a, t)
    found = descent.minimize(torch.tensor(0.05), torch.tensor(0.0), torch.zeros(20))
    assert found.y.dtype == torch.float32
    short = descent.minimize(torch.tensor(1e-4), torch.tensor(0.0), torch.zeros(20), max_steps=1)
    assert short.status is Status.STEP_LIMIT
    assert float(short.gradient_norm) > 1e-6


def test_coordinate_descent_refuses_what_it_cannot_solve() -> None:
    a, t, zero = draw(5, 3), draw(5, seed=1), torch.zeros((), dtype=torch.float64)
    with pytest.raises(InvalidProblem, match="needs inputs"):
        CoordinateDescent(a, t[:4])
    with pytest.raises(InvalidProblem, match="tol > 0"):
        CoordinateDescent(a, t, tol=0.0)
    with pytest.raises(InvalidProblem, match="l1 weights > 0"):
        CoordinateDescent(a, t).minimize(zero, zero, a.new_zeros(3))
    with pytest.raises(InvalidProblem, match="3 columns, but y has shape"):
        CoordinateDescent(a, t).minimize(zero + 1, zero, a.new_zeros(4))
