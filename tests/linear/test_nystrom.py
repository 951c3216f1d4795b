"""Nyström as a solver and as a preconditioner: exact on low rank, honest elsewhere."""

from __future__ import annotations

import pytest
import torch

from bilevel.linear import CG, Nystrom, NystromPreconditioner, Operator
from bilevel.status import InvalidProblem, Status

from .systems import exact, normal, operator, spd, symmetric, times


def low_rank(d: int = 30, rank: int = 4, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return symmetric([0.0] * (d - rank) + [2.0 * (i + 1) for i in range(rank)], dtype=dtype)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rank", [4, 7])
def test_exact_on_low_rank(columns, rank):
    A, b = torch.stack([low_rank(), low_rank(rank=3)]), normal(2, 30)
    solution = Nystrom(rank=rank, damping=0.3, columns=columns).solve(operator(A), b)
    torch.testing.assert_close(solution.value, exact(A, b, 0.3), rtol=1e-8, atol=1e-9)
    assert solution.status is Status.CONVERGED
    assert solution.products == rank + 1


@pytest.mark.parametrize("columns", [False, True])
def test_is_the_inverse_of_a_low_rank_matrix_plus_damping(columns):
    """On a full-rank A it inverts the textbook approximation A Ω (Ω^T A Ω)^+ Ω^T A, not A."""
    A, b, rho = spd(d=12, high=50), normal(12), 0.7
    images = []

    def apply(v):
        images.append(v)
        return times(A, v)

    solution = Nystrom(rank=5, damping=rho, columns=columns, check=False).solve(Operator(apply), b)
    omega = torch.stack(images, -1)
    approximate = A @ omega @ torch.linalg.pinv(omega.T @ A @ omega) @ omega.T @ A
    torch.testing.assert_close(solution.value, exact(approximate, b, rho), rtol=1e-8, atol=1e-9)
    assert solution.status is Status.APPROXIMATE
    assert solution.residual.isnan()


def test_what_is_left_out_is_divided_by_the_damping():
    A, b = spd(d=20, low=1, high=2), normal(20)
    solution = Nystrom(rank=2, damping=1e-3).solve(operator(A), b)
    assert solution.status is Status.APPROXIMATE
    assert solution.residual > 1


def test_float32_keeps_its_digits_with_little_damping():
    A, b = low_rank(60, 6, torch.float32), normal(60, dtype=torch.float32)
    b = times(A, b)
    for damping, bound in ((1e-1, 1e-3), (1e-2, 1e-2), (1e-3, 1e-1)):
        truth = exact(A.double(), b.double(), damping)
        sketched, chosen = (
            (Nystrom(rank=10, damping=damping, columns=c).solve(operator(A), b).value - truth).norm() / truth.norm()
            for c in (False, True)
        )
        assert sketched < bound
    assert sketched < chosen / 3


def test_rank_beyond_the_dimension_is_refused():
    for solver in (Nystrom(rank=9), Nystrom(rank=9, columns=True), CG(preconditioner=NystromPreconditioner(rank=9))):
        with pytest.raises(InvalidProblem, match="rank 9 exceeds the dimension 8"):
            solver.solve(operator(spd()), normal(8))


@pytest.mark.parametrize("columns", [False, True])
def test_negative_curvature_is_flagged(columns):
    # Seven of eight directions see one of two negative eigenvalues, whichever they are (interlacing).
    A, b = symmetric([-3.0, -2, 2, 3, 4, 5, 6, 7]), normal(8)
    solution = Nystrom(rank=7, columns=columns).solve(operator(A), b)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert -3 - 1e-9 <= solution.curvature[0] < 0
    assert solution.value.isfinite().all()


def test_negative_curvature_is_left_out_of_the_gaussian_sketch():
    A, b = symmetric([-3.0, -1, 2, 3, 4, 5, 6, 7]), normal(8)
    eigenvalues, U = torch.linalg.eigh(A)
    positive = (U * eigenvalues.clamp_min(0)) @ U.T
    solution = Nystrom(rank=8, damping=0.5).solve(operator(A), b)
    torch.testing.assert_close(solution.value, exact(positive, b, 0.5), rtol=1e-7, atol=1e-8)


def test_only_the_row_with_negative_curvature_is_flagged():
    A = torch.stack([symmetric([-3.0, 1, 2, 3, 4, 5, 6, 7]), spd()])
    assert Nystrom(rank=8, damping=0.1).solve(operator(A), normal(2, 8)).status is Status.NEGATIVE_CURVATURE
    assert Nystrom(rank=8, damping=0.1).solve(operator(A[1:]), normal(1, 8)).status is Status.CONVERGED


@pytest.mark.parametrize("columns", [False, True])
def test_seed(columns):
    A, b = spd(d=20), normal(20)
    zero, again, one = (Nystrom(rank=3, columns=columns, seed=s).solve(operator(A), b).value for s in (0, 0, 1))
    assert torch.equal(zero, again)
    assert not torch.equal(zero, one)


def test_the_sketch_is_asked_for_at_once():
    A, calls = spd(), []

    def many(V):
        calls.append(len(V))
        return times(A, V)

    Nystrom(rank=5).solve(Operator(lambda v: times(A, v), apply_many=many), normal(8))
    assert calls == [5]


def test_preconditioning_a_decaying_spectrum():
    """Thirty large curvatures over a floor: the sketch removes them, and CG is left with a small condition number."""
    eigenvalues = torch.cat([torch.full((270,), 1e-3), torch.logspace(-1, 2, 30)]).double()
    A, b = symmetric(eigenvalues), normal(300)
    plain = CG(tol=1e-6, max_steps=None).solve(operator(A), b)
    solver = CG(tol=1e-6, max_steps=None, preconditioner=NystromPreconditioner(rank=40))
    helped = solver.solve(operator(A), b)
    assert plain.status is helped.status is Status.CONVERGED
    assert helped.steps <= plain.steps / 3
    torch.testing.assert_close(helped.value, exact(A, b), rtol=1e-3, atol=1e-2)
    assert helped.products == 40 + helped.steps + 1


def test_the_preconditioner_is_symmetric_positive_definite():
    A = torch.stack([spd(), symmetric([-3.0, 0, 0, 3, 4, 5, 6, 7])])
    b = normal(2, 8)
    for damping in (0.0, 0.5):
        apply = NystromPreconditioner(rank=4).prepare(operator(A), b, damping).apply
        P = torch.stack([apply(e.expand(2, 8)) for e in torch.eye(8).double()], -1)
        torch.testing.assert_close(P, P.mT, rtol=1e-10, atol=1e-12)
        assert (torch.linalg.eigvalsh(P) > 0).all()


def test_the_preconditioner_inverts_what_it_sketched():
    A = spd(d=6, low=2, high=30)
    prepared = NystromPreconditioner(rank=6).prepare(operator(A), normal(6), 0.5)
    v = normal(6)
    smallest = 2 + 0.5
    torch.testing.assert_close(prepared.apply(v), smallest * exact(A, v, 0.5), rtol=1e-9, atol=1e-10)
    assert prepared.products == 6


def test_preconditioner_seed():
    A, b = spd(d=20, high=100), normal(20)
    one, other = (NystromPreconditioner(rank=3, seed=s).prepare(operator(A), b, 0.0).apply(b) for s in (0, 1))
    assert not torch.equal(one, other)
