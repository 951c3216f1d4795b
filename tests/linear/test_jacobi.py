"""The diagonal preconditioner: what it must do for declared decays."""

from __future__ import annotations

import pytest
import torch

from bilevel.linear import CG, Jacobi, Operator
from bilevel.status import InvalidProblem, Status

from .systems import exact, normal, times


def logistic(seed: int, n: int = 500, d: int = 100):
    """Return a logistic-regression Hessian B, decays D from 1e-6 to 1e2, and b."""
    X, y = normal(n, d, seed=seed), normal(d, seed=seed + 100) / d**0.5
    s = torch.sigmoid(X @ y)
    B = X.T @ ((s * (1 - s) / n).unsqueeze(-1) * X)
    D = 10 ** (8 * torch.rand(d, generator=torch.Generator().manual_seed(seed)).double() - 6)
    return B, D, normal(d, seed=seed + 200)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("jacobi", [Jacobi(), Jacobi(probes=3, seed=5), Jacobi(rest=0.2)])
def test_cuts_the_error_of_twenty_steps(seed, jacobi):
    B, D, b = logistic(seed)
    A = B + torch.diag(D)
    op = Operator(lambda v: times(A, v), diagonal=D)
    truth = exact(A, b)
    plain, helped = (
        (CG(tol=0, max_steps=20, preconditioner=p).solve(op, b).value - truth).norm() / truth.norm()
        for p in (None, jacobi)
    )
    assert helped < plain / 3
    assert helped < 1e-3


def test_pure_diagonal_takes_one_step():
    D = torch.logspace(-6, 2, 50).double()
    b = normal(50)
    solution = CG(tol=1e-10, preconditioner=Jacobi()).solve(Operator(lambda v: D * v, diagonal=D), b)
    assert solution.steps == 1
    torch.testing.assert_close(solution.value, b / D, rtol=1e-10, atol=0)


def test_the_estimate_is_the_mean_curvature_of_the_rest():
    B, D, b = logistic(0)
    op = Operator(lambda v: times(B, v) + D * v, diagonal=D)
    prepared = Jacobi(probes=20).prepare(op, b, 0.25)
    scale = 1 / prepared.apply(torch.ones_like(b))
    rest = scale - D - 0.25
    assert rest.std() < 1e-10
    assert float(rest.mean()) == pytest.approx(float(B.diagonal().mean()), rel=0.1)
    assert prepared.products == 20


def test_a_given_rest_costs_no_product():
    D, b = torch.rand(5).double(), normal(5)
    prepared = Jacobi(rest=2.0).prepare(Operator(lambda v: D * v, diagonal=D), b, 0.5)
    torch.testing.assert_close(prepared.apply(b), b / (D + 2.5))
    assert prepared.products == 0


def test_each_row_is_estimated_alone():
    b = normal(2, 5)
    D = torch.ones(2, 5).double()
    rest = torch.tensor([[1.0], [100.0]]).double()
    prepared = Jacobi().prepare(Operator(lambda v: (D + rest) * v, diagonal=D), b, 0.0)
    torch.testing.assert_close(prepared.apply(b), b / (1 + rest))


def test_without_any_known_curvature_it_is_harmless():
    b = normal(5)
    solver = CG(preconditioner=Jacobi(rest=0.0))
    solution = solver.solve(Operator(lambda v: 2 * v, diagonal=torch.zeros(5).double()), b)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.value, b / 2)


def test_negative_rest_is_clipped():
    D, b = torch.ones(5).double(), normal(5)
    prepared = Jacobi().prepare(Operator(lambda v: -3 * v, diagonal=D), b, 0.0)
    torch.testing.assert_close(prepared.apply(b), b)


def test_needs_a_declared_diagonal():
    with pytest.raises(InvalidProblem, match="declares no exact diagonal; declare a regularizer"):
        CG(preconditioner=Jacobi()).solve(Operator(lambda v: v), normal(3))
