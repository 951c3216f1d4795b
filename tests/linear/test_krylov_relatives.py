"""MINRES, GMRES and NormalCG: the smallest residual over their spaces, and what each is for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from bilevel.linear import CG, GMRES, MINRES, NormalCG, Operator
from bilevel.status import Status

from .systems import exact, normal, operator, symmetric, times

INDEFINITE = symmetric([-4.0, -2, -1, 1, 2, 3, 5, 7])


def general(d: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.eye(d, dtype=torch.float64) + 0.6 * normal(d, d, seed=seed) / d**0.5


def least_residual(A, start, b, k):
    """Return the minimizer of ‖b - A w‖ over span{start, A start, ...} of dimension k."""
    vectors = [start]
    for _ in range(k - 1):
        vectors.append(times(A, vectors[-1]))
    V = torch.linalg.qr(torch.stack(vectors, -1))[0]
    return V @ torch.linalg.lstsq(A @ V, b.unsqueeze(-1)).solution.squeeze(-1)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_minres_has_the_least_residual(k):
    b = normal(8)
    solution = MINRES(max_steps=k, tol=0).solve(operator(INDEFINITE), b)
    torch.testing.assert_close(solution.value, least_residual(INDEFINITE, b, b, k), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_gmres_has_the_least_residual(k):
    A, b = general(), normal(12)
    solution = GMRES(max_steps=k, tol=0).solve(operator(A, symmetric=False), b)
    torch.testing.assert_close(solution.value, least_residual(A, b, b, k), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_normal_cg_is_cg_on_the_normal_equations(k):
    A, b = general(), normal(12)
    solution = NormalCG(max_steps=k, tol=0).solve(operator(A, symmetric=False), b)
    normal_equations = CG(max_steps=k, tol=0).solve(operator(A.T @ A), A.T @ b)
    torch.testing.assert_close(solution.value, normal_equations.value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", [GMRES(tol=1e-12, max_steps=None), NormalCG(tol=1e-12, max_steps=200)])
@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_maps_that_are_not_symmetric(solver, damping):
    A = torch.stack([general(seed=i) for i in range(3)])
    b = normal(3, 12)
    solver = type(solver)(tol=1e-12, max_steps=200, damping=damping)
    solution = solver.solve(operator(A, symmetric=False), b)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.value, exact(A, b, damping), rtol=1e-9, atol=1e-11)


def test_gmres_needs_no_transpose_and_normal_cg_does():
    A, b = general(), normal(12)
    plain = Operator(lambda v: times(A, v))
    assert GMRES(tol=1e-10).solve(plain, b).status is Status.CONVERGED
    assert NormalCG(tol=1e-10, max_steps=100).solve(plain, b).status is not Status.CONVERGED


def test_gmres_restarts():
    A, b = general(30), normal(30)
    short = GMRES(tol=1e-10, max_steps=200, restart=4).solve(operator(A, symmetric=False), b)
    long = GMRES(tol=1e-10, max_steps=200, restart=30).solve(operator(A, symmetric=False), b)
    assert short.status is long.status is Status.CONVERGED
    assert short.steps > long.steps
    torch.testing.assert_close(short.value, exact(A, b), rtol=1e-7, atol=1e-8)
    # Each cycle costs one product more than its steps.
    assert short.products - short.steps > long.products - long.steps == 1


def test_gmres_that_stalls_does_not_run_on():
    """A cyclic shift makes no progress at all before the last of d steps."""
    d = 10
    b = torch.zeros(d, dtype=torch.float64)
    b[0] = 1
    shift = Operator(lambda v: v.roll(1, -1))
    stalled = GMRES(max_steps=1000, restart=5).solve(shift, b)
    assert stalled.status is Status.STEP_LIMIT
    assert stalled.steps == 5
    assert stalled.residual == pytest.approx(1)
    assert GMRES(max_steps=1000, restart=10).solve(shift, b).status is Status.CONVERGED


def test_minres_residual_falls_monotonically():
    A = symmetric([*torch.linspace(-3, -0.1, 10).tolist(), *torch.linspace(0.1, 5, 20).tolist()])
    b = normal(30)
    residuals = [float(MINRES(max_steps=k, tol=0).solve(operator(A), b).residual) for k in range(1, 31, 3)]
    assert all(after <= before + 1e-12 for before, after in pairwise(residuals))


@pytest.mark.parametrize("kind", [MINRES, GMRES, NormalCG])
def test_indefinite_systems_are_solved_and_reported(kind):
    b = normal(8)
    solution = kind(tol=1e-11, max_steps=100).solve(operator(INDEFINITE), b)
    assert solution.status is Status.CONVERGED
    assert -4 - 1e-9 <= solution.curvature[0] < 0 < solution.curvature[1] <= 7 + 1e-9
    torch.testing.assert_close(solution.value, exact(INDEFINITE, b), rtol=1e-8, atol=1e-10)


def test_damping_can_make_an_indefinite_system_singular():
    b = normal(8)
    solution = MINRES(damping=2.0, max_steps=None).solve(operator(INDEFINITE), b)
    assert solution.status is Status.SINGULAR
    assert solution.curvature[0] == pytest.approx(-4, abs=1e-6)


@pytest.mark.parametrize("kind", [MINRES, NormalCG])
def test_flat_sets_what_counts_as_singular(kind):
    A, b = symmetric([1e-3, 1.0, 2.0]), normal(3)
    assert kind(tol=1e-9, max_steps=None).solve(operator(A), b).status is Status.CONVERGED
    assert kind(tol=1e-9, max_steps=None, flat=0.1).solve(operator(A), b).status is Status.SINGULAR


def test_normal_cg_finds_the_least_squares_solution_of_least_norm():
    A, b = symmetric([0.0, 0, 1, 2, 3, 4, 5, 6]), normal(8)
    solution = NormalCG(max_steps=100).solve(operator(A), b)
    assert solution.status is Status.SINGULAR
    torch.testing.assert_close(solution.value, torch.linalg.pinv(A, rtol=1e-9) @ b, rtol=1e-8, atol=1e-9)


def test_minres_stops_at_a_least_squares_solution():
    A, b = symmetric([0.0] * 20 + torch.logspace(-1, 1, 40).tolist()), normal(60)
    solution = MINRES(max_steps=None).solve(operator(A), b)
    best = torch.linalg.pinv(A, rtol=1e-9) @ b
    assert solution.status is Status.SINGULAR
    assert solution.residual == pytest.approx(float((b - A @ best).norm() / b.norm()), rel=1e-6)
    assert solution.value.norm() < 1e3


def test_cg_does_not_claim_to_solve_what_is_not_symmetric():
    A, b = general(), normal(12)
    solution = CG(tol=1e-10, max_steps=200).solve(operator(A, symmetric=False), b)
    assert solution.status is not Status.CONVERGED or solution.residual <= 1e-10
    assert not solution.status.ok
