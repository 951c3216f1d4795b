"""Defects found in other libraries' linear algebra: each test fails on the defect it names."""

from __future__ import annotations

import pytest
import torch

from bilevel.linear import CG, GMRES, MINRES, Dense, Neumann, NormalCG, Operator
from bilevel.status import Status

from .systems import exact, normal, operator, residual, spd, symmetric, times

ITERATIVE = [CG(max_steps=None), MINRES(max_steps=None), NormalCG(max_steps=None), GMRES(max_steps=None)]


@pytest.mark.parametrize("solver", ITERATIVE, ids=lambda s: type(s).__name__)
def test_the_converged_iterate_is_committed(solver):
    """Leaving the loop at the tolerance before the update loses the last iterate: in one dimension all of it."""
    b = torch.tensor([3.0]).double()
    solution = solver.solve(Operator(lambda v: 2 * v), b)
    assert float(solution.value) == pytest.approx(1.5)
    A, c = spd(), normal(8)
    for tol in (1e-2, 1e-5):
        assert residual(A, c, solver.solve(operator(A), c, tol=tol).value) <= tol


@pytest.mark.parametrize("scale", [0.5, 1e-4, 1e4])
def test_a_scale_reaches_every_part_of_the_recurrence(scale):
    """A scale in the step length but not in the residual update is right at 1 only."""
    A, b = spd(high=30), normal(8)
    for k in (1, 2, 4):
        plain = CG(max_steps=k, tol=0).solve(operator(A), b)
        scaled = CG(max_steps=k, tol=0).solve(operator(scale * A), b)
        torch.testing.assert_close(scaled.value * scale, plain.value, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(scaled.residual, plain.residual, rtol=1e-8, atol=1e-12)


def test_the_direction_is_built_from_the_new_residual():
    """Directions from the residual before are wrong from the second step on: residuals lose orthogonality."""
    A, b = spd(high=100), normal(8)
    residuals = [b] + [b - times(A, CG(max_steps=k, tol=0).solve(operator(A), b).value) for k in range(1, 6)]
    R = torch.stack([r / r.norm() for r in residuals])
    torch.testing.assert_close(R @ R.T, torch.eye(6).double(), rtol=0, atol=1e-9)
    ten = CG(max_steps=10, tol=0).solve(operator(A), b)
    torch.testing.assert_close(ten.value, exact(A, b), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", [*ITERATIVE, CG(), MINRES(), Dense(), Neumann(terms=100)], ids=str)
def test_a_scalar_variable_is_no_special_case(solver):
    """A step limit derived from the dimension by integer arithmetic can be 0 for a scalar, and the answer 0."""
    solution = solver.solve(Operator(lambda v: 4 * v), torch.tensor([2.0]))
    assert float(solution.value) == pytest.approx(0.5, rel=1e-3)
    assert solution.status is Status.CONVERGED


def test_dense_couples_all_entries():
    """Keeping only the diagonal blocks between weights and bias gives 30 % error; the coupling must count."""
    X = torch.cat([normal(20, 3) + 2, torch.ones(20, 1).double()], -1)
    A, b = X.T @ X / 20, normal(4)
    blocks = A.clone()
    blocks[:3, 3] = blocks[3, :3] = 0
    solution = Dense().solve(operator(A), b)
    torch.testing.assert_close(solution.value, exact(A, b), rtol=1e-10, atol=1e-12)
    assert (exact(blocks, b) - exact(A, b)).norm() > 0.3 * exact(A, b).norm()


def test_a_diverging_series_says_so_and_stays_finite():
    """A Neumann series with too long a step reached 1e11 without a word."""
    solution = Neumann(terms=1000, alpha=1.0).solve(operator(spd(high=40)), normal(8))
    assert solution.status is Status.DIVERGED
    assert solution.value.norm() < 1e6
    assert solution.curvature[1] == pytest.approx(40, rel=0.02)


def test_the_sum_is_scaled_by_alpha():
    """Several published listings return the sum of terms without its factor alpha."""
    b = normal(8)
    solution = Neumann(terms=2000, alpha=0.01, tol=1e-12).solve(operator(spd()), b)
    torch.testing.assert_close(solution.value, exact(spd(), b), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", [CG(tol=1e-12, max_steps=2), MINRES(tol=1e-12, max_steps=2),
                                    NormalCG(tol=1e-12, max_steps=2), GMRES(tol=1e-12, max_steps=2)],
                         ids=lambda s: type(s).__name__)  # fmt: skip
@pytest.mark.parametrize("eigenvalues", [[1.0, 10, 100, 1000], [0.0, 0, 1, 2], [-3.0, -2, 1, 5]], ids=str)
def test_a_failed_solve_is_not_answered_by_zeros(solver, eigenvalues):
    """A backward solve that failed was answered by zeros, and the implicit term vanished silently."""
    solution = solver.solve(operator(symmetric(eigenvalues)), normal(4))
    assert not solution.status.ok
    assert solution.value.norm() > 0
    assert solution.value.isfinite().all()
    assert solution.residual > 1e-12


def test_nonsymmetric_maps_have_their_own_solvers():
    """CG was offered for maps that are not symmetric (I minus the derivative of a fixed-point map)."""
    A = torch.eye(10).double() - 0.9 * torch.diag(torch.ones(9).double(), 1)
    b = normal(10)
    op = operator(A, symmetric=False)
    for solver in (GMRES(tol=1e-10, max_steps=None), NormalCG(tol=1e-10, max_steps=200)):
        solution = solver.solve(op, b)
        assert solution.status is Status.CONVERGED
        torch.testing.assert_close(solution.value, exact(A, b), rtol=1e-7, atol=1e-8)
    assert CG(tol=1e-10, max_steps=10).solve(op, b).status is not Status.CONVERGED
