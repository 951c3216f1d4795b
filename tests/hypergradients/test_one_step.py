"""DARTS: exact through one lower step, its differences agree to their order, and the first order is the direct part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, Adam, Cosine, Full, OneStep, Problem, Shuffled, Unrolled, darts, hypergradient
from bilevel.status import InvalidProblem, Status

X = torch.tensor([0.3, -0.7], dtype=torch.float64)
Y = torch.tensor([0.5, 1.5, -1.0], dtype=torch.float64)
A = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, 0.1]], dtype=torch.float64)


def curved(**fields: Any) -> Problem:
    """Nothing is quadratic here, and x enters both levels."""
    return Problem(
        upper=lambda x, y, b: (y - 1).square().sum() / 2 + (x * y[:2]).sin().sum(),
        lower=lambda x, y, b: (y - A @ x).pow(4).sum() / 4 + (A @ x * y).tanh().sum(),
        **fields,
    )


def quadratic() -> Problem:
    return Problem(
        upper=lambda x, y, b: (y - 1).square().sum() / 2 + 0.1 * x.square().sum(),
        lower=lambda x, y, b: (y - A @ x).square().sum() / 2,
    )


def found(estimator: Any, problem: Problem | None = None) -> Tensor:
    h = hypergradient(curved() if problem is None else problem, X, Y, estimator=estimator)
    assert h.certificate.status in {Status.APPROXIMATE, Status.CONVERGED}
    gradient: Tensor = h.gradient
    return gradient


@pytest.mark.parametrize("lr", [0.01, 0.3])
def test_second_order_is_the_gradient_through_one_step(lr: float) -> None:
    x = X.clone().requires_grad_()
    y = Y.clone().requires_grad_()
    problem = curved()
    (slope,) = torch.autograd.grad(problem.lower(x, y, None), y, create_graph=True)
    (expected,) = torch.autograd.grad(problem.upper(x, y - lr * slope, None), x)
    torch.testing.assert_close(found(OneStep(lr)), expected, rtol=1e-12, atol=1e-14)
    unrolled = Unrolled(lower=SGD(lr), steps=1, restart=True)
    torch.testing.assert_close(found(OneStep(lr)), found(unrolled), rtol=1e-12, atol=1e-14)


def test_second_order_has_its_closed_form() -> None:
    after = Y - 0.2 * (Y - A @ X)
    expected = 0.2 * X + 0.2 * A.T @ (after - 1)  # df/dx + lr A^T v
    torch.testing.assert_close(found(OneStep(0.2), quadratic()), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found(OneStep(0.2, differences=True), quadratic()), expected, rtol=1e-9, atol=1e-12)


def test_a_declared_regularizer_is_part_of_the_step() -> None:
    weighted = curved(regularizer=bilevel.L2(lambda x: x[0].exp()))
    unrolled = Unrolled(lower=SGD(0.2), steps=1, restart=True)
    torch.testing.assert_close(found(OneStep(0.2), weighted), found(unrolled, weighted), rtol=1e-12, atol=1e-14)
    close = found(OneStep(0.2, differences=True), weighted)
    torch.testing.assert_close(close, found(unrolled, weighted), rtol=1e-4, atol=1e-6)


def test_differences_agree_to_second_order(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = found(OneStep(0.2))
    errors = []
    for reach in (0.01, 0.005):
        monkeypatch.setattr("bilevel.hypergradients.one_step.REACH", reach)
        errors.append(float((found(OneStep(0.2, differences=True)) - exact).norm()))
    assert errors[0] < 1e-4 * float(exact.norm())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.02)


def test_first_order_is_the_direct_part() -> None:
    expected = Y[:2] * (X * Y[:2]).cos()
    torch.testing.assert_close(found(OneStep(0.0)), expected, rtol=1e-12, atol=1e-14)
    h = hypergradient(curved(), X, Y, estimator=OneStep(0.0))
    assert h.certificate.counts.hvps == h.certificate.counts.crosses == 0
    assert h.certificate.error_estimate is None


def test_a_vector_of_zero_gives_the_direct_part() -> None:
    flat = Problem(
        upper=lambda x, y, b: x.square().sum() + 0 * y.sum(), lower=lambda x, y, b: (y - A @ x).square().sum()
    )
    torch.testing.assert_close(found(OneStep(0.1, differences=True), flat), 2 * X)


def test_the_solver_is_algorithm_1() -> None:
    """Written out: x by the virtual step on the next training batch, then the weights on that batch, with momentum."""
    data = torch.linspace(-1, 1, 12, dtype=torch.float64).view(12, 1)
    problem = Problem(
        upper=lambda x, y, b: (y - 1 + b[0].mean()).square().sum() / 2 + (x * y[:2]).sin().sum(),
        lower=lambda x, y, b: (y - A @ x + b[0].mean()).pow(4).sum() / 4,
        upper_data=Shuffled((data,), 4), lower_data=Shuffled((data,), 3),
    )  # fmt: skip
    solver = darts(0.05, 0.9, upper=SGD(0.1))
    solution = bilevel.solve(problem, solver, X, Y, steps=4)
    oracles, x, y = bilevel.dry_run.open_oracles(problem, X, Y)
    buffer: Tensor | None = None
    for k in range(4):
        _, slope = oracles.lower_gradient(x, y, k)
        buffer = slope if buffer is None else 0.9 * buffer + slope
        y = y - 0.05 * buffer
        leaf, at = x.clone().requires_grad_(), y.clone().requires_grad_()
        train, check = oracles.batch("lower", k + 1), oracles.batch("upper", k)
        (along,) = torch.autograd.grad(problem.lower(leaf, at, train), at, create_graph=True)
        (h,) = torch.autograd.grad(problem.upper(leaf, at - 0.05 * along, check), leaf)
        x = x - 0.1 * h
    torch.testing.assert_close(solution.x, x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(solution.state.y, y, rtol=1e-12, atol=1e-14)


def test_it_is_biased_where_the_exact_hypergradient_is_not() -> None:
    # At the solution of the bilevel problem, of which one step sees a tenth of the response of y, and order 1 nothing.
    x = torch.linalg.solve(A.T @ A + 0.2 * torch.eye(2, dtype=torch.float64), A.T.sum(1))
    exact = hypergradient(quadratic(), x, A @ x).gradient
    torch.testing.assert_close(exact, torch.zeros_like(x), atol=1e-8, rtol=0)
    for lr, seen in ((0.1, 0.1), (0.0, 0.0)):
        h = hypergradient(quadratic(), x, A @ x, estimator=OneStep(lr)).gradient
        torch.testing.assert_close(h, (1 - seen) * 0.2 * x, rtol=1e-8, atol=1e-12)


def test_schedules_and_defaults() -> None:
    solver = darts(Cosine(0.025, 0.001, steps=50))
    assert isinstance(solver.upper, Adam)
    assert (solver.lower_steps, solver.upper.lr) == (1, 3e-4)
    assert bilevel.solve(curved(), solver, X, Y, steps=3).status.ok
    assert darts(order=1).estimator == OneStep(0.0)
    late = hypergradient(curved(), X, Y, estimator=OneStep(Cosine(0.2, 0.0, steps=10)), step=5).gradient
    torch.testing.assert_close(late, found(OneStep(0.1)), rtol=1e-12, atol=1e-14)


def test_blocks() -> None:
    targets = torch.tensor([1.0, 3.0], dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, t: (y - t).square() / 2, lower=lambda x, y, t: (y - x * t).square() / 2,
        upper_data=Full(targets), lower_data=Full(targets), blocks=2,
    )  # fmt: skip
    x, y = torch.tensor(0.5, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    after = y - 0.2 * (y - x * targets)
    expected = 0.2 * (targets * (after - targets)).mean()
    for estimator in (OneStep(0.2), OneStep(0.2, differences=True)):
        h = hypergradient(problem, x, y, estimator=estimator).gradient
        torch.testing.assert_close(h, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OneStep(-0.1), "outside"),
        (lambda: darts(order=3), "must be 1 or 2"),
        (lambda: found(OneStep(lambda x, step: x.sum())), "may not depend on x"),
        (lambda: found(OneStep(), curved(lower_set=bilevel.Box(0, 1))), "lower_set"),
        (lambda: found(OneStep(), curved(regularizer=bilevel.L1(0.1))), "regularizer"),
        (lambda: found(OneStep(), curved(constraint=lambda x, y, b: y[:1])), "constraint"),
    ],
)
def test_wrong_options_are_refused(call: Any, message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        call()


def test_a_certificate_without_a_linear_solve_claims_nothing_of_one() -> None:
    slope, error, growth = (torch.tensor(v, dtype=torch.float64) for v in (0.5, 1e-3, 2.0))
    counts = bilevel.Counts(gradients=3)
    found = bilevel.Certificate.unsolved(Status.APPROXIMATE, slope, counts, error_estimate=error, growth=growth)
    assert found.residual.isnan()
    assert found.residual.dtype == torch.float64
    assert found.curvature is found.lower_distance_bound is found.linear_distance_bound is found.margin is None
    assert (found.status, found.counts, found.growth) == (Status.APPROXIMATE, counts, growth)
    assert (found.lower_gradient_norm, found.error_estimate) == (slope, error)
    bare = bilevel.Certificate.unsolved(Status.CONVERGED, slope, counts)
    assert bare.error_estimate is bare.growth is None
