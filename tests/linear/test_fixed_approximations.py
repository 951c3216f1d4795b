"""M-FAC, Identity, Sama and Dense: closed forms, and when they refuse."""

from __future__ import annotations

import pytest
import torch

from bilevel.linear import MFAC, Dense, Identity, Operator, Sama
from bilevel.status import InvalidProblem, Status

from .systems import exact, normal, operator, spd, spd_rows, symmetric, times


def recursion(G, damping, u):
    """The published static recursion over gradients, kept as an oracle: v_i and q_i, then F^-1 u."""
    m = len(G)
    directions, scales = [], []

    def inverse(x):
        y = x / damping
        for v, q in zip(directions, scales, strict=True):
            y = y - (v @ x) / q * v
        return y

    for g in G:
        v = inverse(g)
        directions.append(v)
        scales.append(m + g @ v)
    return inverse(u)


@pytest.mark.parametrize("count", [1, 4, 20])
@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_mfac_is_the_damped_empirical_fisher_inverse(count, damping):
    G, b = normal(20, 10), normal(10, seed=1)
    op = Operator(lambda v: v, gradients=lambda k: G[:k])
    solution = MFAC(gradients=count, damping=damping, check=False).solve(op, b)
    fisher = G[:count].T @ G[:count] / count
    torch.testing.assert_close(solution.value, exact(fisher, b, damping), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(solution.value, recursion(G[:count], damping, b), rtol=1e-7, atol=1e-8)
    assert solution.status is Status.APPROXIMATE
    assert solution.products == 0
    assert solution.residual.isnan()


def test_mfac_row_by_row():
    G, b = normal(6, 3, 10), normal(3, 10, seed=1)
    solution = MFAC(gradients=6, damping=0.1).solve(Operator(lambda v: v, gradients=lambda k: G[:k]), b)
    for i in range(3):
        fisher = G[:, i].T @ G[:, i] / 6
        torch.testing.assert_close(solution.value[i], exact(fisher, b[i], 0.1), rtol=1e-9, atol=1e-10)


def test_mfac_converges_where_the_fisher_matrix_is_the_hessian():
    A, b = spd(), normal(8)
    solution = MFAC(gradients=8, damping=0.1).solve(operator(A), b)
    assert solution.status is Status.CONVERGED
    assert MFAC(gradients=8, damping=0.1, tol=0.0).solve(operator(A), b).status is Status.APPROXIMATE


def test_mfac_over_many_columns_equals_one_block():
    d = 150_000
    G, b = normal(2, d), normal(d, seed=1)
    solution = MFAC(gradients=2, damping=0.2).solve(Operator(lambda v: G.T @ (G @ v) / 2, gradients=lambda k: G), b)
    assert solution.residual < 1e-10


def test_mfac_says_what_is_missing():
    with pytest.raises(InvalidProblem, match="gives no sampled gradients"):
        MFAC().solve(Operator(lambda v: v), normal(3))
    with pytest.raises(InvalidProblem, match=r"shape \[2, 4\]; expected \[2, 3\]"):
        MFAC(gradients=2).solve(Operator(lambda v: v, gradients=lambda k: normal(k, 4)), normal(3))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_identity(scale):
    b = normal(2, 8)
    solution = Identity(scale=scale).solve(operator(spd_rows(2)), b)
    assert torch.equal(solution.value, scale * b)
    assert solution.status is Status.APPROXIMATE
    assert not solution.status.ok
    assert solution.products == 1
    blind = Identity(scale=scale, check=False).solve(operator(spd_rows(2)), b)
    assert blind.residual.isnan().all()
    assert blind.products == 0
    assert blind.status is Status.APPROXIMATE


def test_an_approximation_that_happens_to_be_right_has_converged():
    b = normal(8)
    assert Identity(scale=0.5).solve(Operator(lambda v: 2 * v), b).status is Status.CONVERGED
    off = Identity(scale=0.5).solve(Operator(lambda v: 2.1 * v), b)
    assert off.status is Status.APPROXIMATE
    assert Identity(scale=0.5, tol=0.1).solve(Operator(lambda v: 2.1 * v), b).status is Status.CONVERGED
    assert Identity(scale=0.5).solve(Operator(lambda v: 2.1 * v), b, tol=0.1).status is Status.CONVERGED


def test_sama_is_the_clamped_step_diagonal():
    D, b = torch.tensor([0.5, -0.2, 0.0, 2.0]).double(), normal(4)
    solution = Sama().solve(Operator(lambda v: v, step_diagonal=lambda: D), b)
    torch.testing.assert_close(solution.value, D.clamp_min(0) * b)
    assert solution.status is Status.APPROXIMATE
    blind = Sama(check=False).solve(Operator(lambda v: v, step_diagonal=lambda: D), b)
    assert torch.equal(blind.value, solution.value)
    assert blind.products == 0
    assert Sama(tol=10.0).solve(Operator(lambda v: v, step_diagonal=lambda: D), b).status is Status.CONVERGED


def test_sama_needs_a_step_diagonal():
    with pytest.raises(InvalidProblem, match="no step_diagonal"):
        Sama().solve(Operator(lambda v: v), normal(3))


def test_dense_refuses_what_does_not_fit():
    with pytest.raises(InvalidProblem, match=r"d = 10001 > 10000 would need a matrix of 0\.8 GB; use CG"):
        Dense().solve(Operator(lambda v: v), torch.ones(10_001))


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_dense_asks_for_columns_in_chunks(chunk):
    A, sizes = spd_rows(), []

    def many(V):
        sizes.append(len(V))
        return times(A, V)

    b = normal(3, 8)
    solution = Dense(chunk=chunk).solve(Operator(lambda v: times(A, v), apply_many=many), b)
    torch.testing.assert_close(solution.value, exact(A, b), rtol=1e-11, atol=1e-12)
    assert max(sizes) == min(chunk, 8)
    assert solution.products == sum(sizes) == 8


def test_dense_curvature_is_exact():
    A = torch.stack([symmetric([-0.5, 1, 2]), symmetric([1.0, 3, 9])])
    solution = Dense().solve(operator(A), normal(2, 3))
    assert [float(c) for c in solution.curvature] == pytest.approx([-0.5, 9], rel=1e-12)


def test_dense_float32_is_not_fooled_by_rounding():
    eigenvalues = torch.logspace(-3, 0, 50).double()
    A, b = symmetric(eigenvalues, dtype=torch.float32), normal(50, dtype=torch.float32)
    assert Dense().solve(operator(A), b).status is Status.CONVERGED
    eigenvalues[0] = 0
    assert Dense().solve(operator(symmetric(eigenvalues, dtype=torch.float32)), b).status is Status.SINGULAR


def test_dense_detects_an_operator_that_is_not_symmetric():
    A = spd() + torch.triu(normal(8, 8), 1)
    assert Dense().solve(Operator(lambda v: times(A, v)), normal(8)).status is Status.BREAKDOWN


def test_dense_ignores_tolerance_and_warm_start():
    A, b = spd(), normal(8)
    assert torch.equal(Dense().solve(operator(A), b, 9 * b, tol=0.5).value, Dense().solve(operator(A), b).value)
