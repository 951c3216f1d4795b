"""The Neumann series: its scale, its equivalence with gradient descent, and what it does when it diverges."""

from __future__ import annotations

import pytest
import torch

from bilevel.linear import Neumann, Operator
from bilevel.status import Status

from .systems import exact, normal, operator, spd, spd_rows, symmetric, times


@pytest.mark.parametrize("terms", [0, 1, 2, 7])
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_is_so_many_gradient_steps(terms, alpha):
    A, b = spd(), normal(8)
    w = torch.zeros(8, dtype=torch.float64)
    for _ in range(terms + 1):
        w = w - alpha * (times(A, w) - b)
    solution = Neumann(terms=terms, alpha=alpha, tol=0).solve(operator(A), b)
    torch.testing.assert_close(solution.value, w, rtol=1e-12, atol=1e-14)
    left = torch.linalg.matrix_power(torch.eye(8, dtype=torch.float64) - alpha * A, terms + 1) @ b
    assert solution.residual == pytest.approx(float(left.norm() / b.norm()), rel=1e-10)
    assert solution.products == terms + 1


def test_no_term_is_a_multiple_of_b():
    b = normal(8)
    torch.testing.assert_close(Neumann(terms=0, alpha=0.25).solve(operator(spd()), b).value, 0.25 * b)


def test_unchecked_it_saves_a_product_and_knows_no_residual():
    A, b = spd(high=40), normal(8)
    checked = Neumann(terms=3, alpha=0.02).solve(operator(A), b)
    unchecked = Neumann(terms=3, alpha=0.02, check=False).solve(operator(A), b)
    assert torch.equal(checked.value, unchecked.value)
    assert unchecked.products == checked.products - 1 == 3
    assert unchecked.residual.isnan()
    assert unchecked.status is Status.APPROXIMATE


def test_a_warm_start_continues_the_series():
    A, b = spd(), normal(8)
    half = Neumann(terms=4, alpha=0.1, tol=0).solve(operator(A), b)
    rest = Neumann(terms=4, alpha=0.1, tol=0).solve(operator(A), b, half.value)
    whole = Neumann(terms=9, alpha=0.1, tol=0).solve(operator(A), b)
    torch.testing.assert_close(rest.value, whole.value, rtol=1e-12, atol=1e-14)


def test_the_automatic_step_is_safe_and_not_timid():
    A, b = spd(d=40, low=0.5, high=20), normal(40)
    solution = Neumann(terms=3, estimate_steps=10, tol=0).solve(operator(A), b)
    alpha = 1 / (1.05 * 20)
    expected = Neumann(terms=3, alpha=alpha, tol=0).solve(operator(A), b)
    torch.testing.assert_close(solution.value, expected.value, rtol=0.05, atol=0.05 * float(expected.value.norm()))
    assert solution.products == expected.products + 10
    assert solution.curvature[1] == pytest.approx(20, rel=0.05)


def test_the_estimate_has_a_seed_and_a_length():
    A, b = spd(d=40, low=0.5, high=20), normal(40)
    one, other = (Neumann(seed=s, estimate_steps=3).solve(operator(A), b) for s in (0, 1))
    assert not torch.equal(one.value, other.value)
    assert one.products == 11 + 3


def test_each_row_has_its_own_step():
    A = torch.stack([spd(), 100 * spd()])
    b = normal(2, 8)
    solution = Neumann(terms=300, tol=1e-10).solve(operator(A), b)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.value, exact(A, b), rtol=1e-8, atol=1e-10)


def test_a_step_somewhat_too_long_is_halved():
    A, b = spd(low=1, high=4), normal(8)
    solution = Neumann(terms=300, alpha=0.8, tol=1e-10).solve(operator(A), b)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.value, exact(A, b), rtol=1e-8, atol=1e-9)


def test_divergence_is_said_with_the_step_that_would_do():
    A, b = spd_rows(), normal(3, 8)
    solution = Neumann(terms=300, alpha=5.0).solve(operator(A), b)
    largest = torch.linalg.eigvalsh(A).max()
    assert solution.status is Status.DIVERGED
    assert not solution.status.ok
    assert solution.value.isfinite().all()
    assert solution.steps < 12
    assert solution.curvature[1] == pytest.approx(float(largest), rel=0.02)
    cured = Neumann(terms=300, alpha=float(0.9 / solution.curvature[1]), tol=1e-8).solve(operator(A), b)
    assert cured.status is Status.CONVERGED


@pytest.mark.parametrize("alpha", [None, 0.05])
def test_negative_curvature_is_told_from_a_step_too_long(alpha):
    A, b = symmetric([-1.0, 1, 2, 3, 4, 5, 6, 7]), normal(8)
    solution = Neumann(terms=200, alpha=alpha).solve(operator(A), b)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert -1 - 1e-9 <= solution.curvature[0] < 0
    assert solution.value.isfinite().all()


def test_a_negative_definite_operator_does_not_give_zeros():
    solution = Neumann().solve(Operator(lambda v: -v), normal(4))
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.value.norm() > 0


def test_the_series_is_a_regularizer_on_a_singular_system():
    A, b = symmetric([0.0, 1, 2, 3, 4, 5, 6, 7]), normal(8)
    solution = Neumann(terms=20).solve(operator(A), b)
    assert solution.status is Status.STEP_LIMIT
    assert solution.value.norm() < 21 * b.norm()


def test_damping_enters_the_series():
    A, b = spd(), normal(8)
    torch.testing.assert_close(
        Neumann(terms=5, alpha=0.1, damping=0.5, tol=0).solve(operator(A), b).value,
        Neumann(terms=5, alpha=0.1, tol=0).solve(operator(A + 0.5 * torch.eye(8).double()), b).value,
    )


def test_a_zero_row_costs_nothing_and_stays_zero():
    A, b = spd_rows(2), normal(2, 8)
    b[0] = 0
    solution = Neumann(terms=500, tol=1e-10).solve(operator(A), b)
    assert solution.status is Status.CONVERGED
    assert (solution.value[0] == 0).all()
