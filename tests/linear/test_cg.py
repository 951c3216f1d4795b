"""Conjugate gradients: against the Krylov space written out, and where A is not what it should be."""

from __future__ import annotations

import pytest
import torch

from bilevel.linear import CG, Dense, NystromPreconditioner, Operator, Preconditioner, Prepared
from bilevel.status import InvalidProblem, Status

from .systems import exact, normal, operator, spd, spd_rows, symmetric, times


def krylov_optimum(A, b, k):
    """Return the minimizer of the quadratic over span{b, A b, ..., A^(k-1) b}."""
    vectors = [b]
    for _ in range(k - 1):
        vectors.append(times(A, vectors[-1]))
    V = torch.linalg.qr(torch.stack(vectors, -1))[0]
    return V @ torch.linalg.solve(V.T @ A @ V, V.T @ b)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_each_step_is_optimal_over_the_krylov_space(k):
    A, b = spd(high=30), normal(8)
    solution = CG(max_steps=k, tol=0).solve(operator(A), b)
    assert solution.steps == k
    torch.testing.assert_close(solution.value, krylov_optimum(A, b, k), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_a_warm_start_moves_the_krylov_space(k):
    A, b = spd(high=30), normal(8)
    x0 = 0.1 * exact(A, b)
    solution = CG(max_steps=k, tol=0).solve(operator(A), b, x0)
    torch.testing.assert_close(solution.value, x0 + krylov_optimum(A, b - times(A, x0), k), rtol=1e-10, atol=1e-12)


def test_curvature_is_the_range_of_the_ritz_values():
    A, b = spd(d=30, low=0.01, high=10), normal(30)
    A_range = torch.linalg.eigvalsh(A)
    previous = None
    for k in (2, 5, 10, 20):
        low, high = CG(max_steps=k, tol=0).solve(operator(A), b).curvature
        assert A_range[0] - 1e-10 <= low <= high <= A_range[-1] + 1e-10
        V = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(A, j) @ b for j in range(2)], -1))[0]
        if k == 2:
            ritz = torch.linalg.eigvalsh(V.T @ A @ V)
            torch.testing.assert_close(torch.stack([low, high]), ritz, rtol=1e-10, atol=0)
        if previous is not None:
            assert low <= previous[0] + 1e-10
            assert high >= previous[1] - 1e-10
        previous = (low, high)
    assert previous[1] == pytest.approx(10, rel=1e-3)


def test_negative_curvature_is_bounded_by_its_rayleigh_quotient_and_not_hidden_by_the_residual():
    A = symmetric(torch.cat([torch.tensor([-0.05]), torch.linspace(0.1, 10, 11)]))
    b = normal(12)
    solution = CG(tol=1e-12, max_steps=None).solve(operator(A), b)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert torch.linalg.eigvalsh(A)[0] - 1e-10 <= solution.curvature[0] < 0
    assert solution.value.norm() > 0
    # The iterate is that of the step before: run only so far, CG has nothing to complain of.
    before = CG(tol=1e-12, max_steps=solution.steps - 1).solve(operator(A), b)
    if before.residual <= 1:
        torch.testing.assert_close(solution.value, before.value)
    assert before.status is Status.STEP_LIMIT


def test_negative_curvature_in_the_first_step_does_not_give_zeros():
    b = normal(4)
    solution = CG().solve(Operator(lambda v: -2 * v), b)
    assert solution.status is Status.NEGATIVE_CURVATURE
    torch.testing.assert_close(solution.value, b / 2)
    assert solution.residual == pytest.approx(2)


def test_flat_sets_what_counts_as_no_curvature():
    A, b = symmetric([1e-3, 1.0, 2.0]), normal(3)
    assert CG(tol=1e-9).solve(operator(A), b).status is Status.CONVERGED
    assert CG(tol=1e-9, flat=1e-2).solve(operator(A), b).status is Status.SINGULAR


def test_an_inconsistent_system_does_not_blow_up():
    A, b = symmetric([0.0] * 20 + torch.logspace(-2, 1, 60).tolist()), normal(80)
    least_squares = torch.linalg.pinv(A, rtol=1e-8) @ b
    for steps in (20, None):
        solution = CG(max_steps=steps).solve(operator(A), b)
        assert solution.status in {Status.SINGULAR, Status.STEP_LIMIT}
        assert solution.value.norm() <= 10 * least_squares.norm()
        assert solution.residual < 3


def test_unreachable_tolerance_ends_early_and_says_so():
    A, b = symmetric(torch.logspace(-2, 1, 100).double(), dtype=torch.float32), normal(100, dtype=torch.float32)
    solution = CG(tol=1e-9, max_steps=2000).solve(operator(A), b)
    assert solution.status is Status.STEP_LIMIT
    assert solution.steps < 500
    assert solution.residual < 1e-4
    assert solution.curvature[1] < 10.01


@pytest.mark.parametrize("seed", range(3))
def test_float32_reaches_what_rounding_allows(seed):
    """Exchanging the residual for a recomputed one in the middle of the run loses two digits here."""
    A = symmetric(torch.logspace(-2, 1, 400).double(), seed, torch.float32)
    b = normal(400, seed=seed, dtype=torch.float32)
    solution = CG(tol=0, max_steps=5000).solve(operator(A), b)
    assert solution.residual < 1e-4
    assert solution.steps < 400
    assert solution.curvature[1] < 10.01


def test_steps_without_limit_are_two_for_each_dimension():
    A, b = spd(d=6, high=1e6), normal(6)
    assert CG(tol=0, max_steps=None).solve(operator(A), b).steps <= 12
    assert CG(tol=1e-9, max_steps=None).solve(operator(A), b).status is Status.CONVERGED


class Negative(Preconditioner):
    def prepare(self, operator, b, damping):
        return Prepared(lambda v: -v)


class Broken(Preconditioner):
    def prepare(self, operator, b, damping):
        return Prepared(lambda v: v * torch.nan)


@pytest.mark.parametrize("preconditioner", [Negative(), Broken()])
def test_a_preconditioner_that_is_not_definite_is_a_breakdown(preconditioner):
    solution = CG(preconditioner=preconditioner).solve(operator(spd()), normal(8))
    assert solution.status is Status.BREAKDOWN
    assert solution.value.isfinite().all()
    assert solution.value.norm() > 0


def test_negative_curvature_is_seen_through_a_preconditioner():
    A, b = symmetric([-1.0, 1, 2, 3, 50, 60, 70, 80]), normal(8)
    solution = CG(max_steps=None, preconditioner=NystromPreconditioner(rank=3)).solve(operator(A), b)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert -1 - 1e-10 <= solution.curvature[0] < 0


def test_rows_that_are_done_are_frozen():
    A, b = spd_rows(2, 20), normal(2, 20)
    x0 = torch.stack([exact(A, b)[0], torch.zeros(20).double()])
    solution = CG(tol=1e-12, max_steps=None).solve(operator(A), b, x0)
    assert torch.equal(solution.value[0], x0[0])
    torch.testing.assert_close(solution.value[1], exact(A, b)[1])


def test_agrees_with_dense_about_the_curvature():
    A, b = spd_rows(), normal(3, 8)
    mine = CG(tol=1e-13, max_steps=None).solve(operator(A), b).curvature
    true = Dense().solve(operator(A), b).curvature
    torch.testing.assert_close(torch.stack(mine), torch.stack(true), rtol=1e-8, atol=0)


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        CG().tol = 1.0
    with pytest.raises(InvalidProblem, match="max_steps must be a whole number"):
        CG(max_steps=2.5)
