"""Solvers made differentiable: closed forms, differences, prox maps of any step, nested variables, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import CG, GMRES, InvalidProblem, LinearSolveFailed, NormalCG, Problem, hypergradient
from bilevel.hypergradients.active_set import ActiveSet
from bilevel.hypergradients.implicit_function import implicit_function
from bilevel.layout import Layout
from bilevel.optimizers.proximal import ProximalGradient
from bilevel.regularizers import L1, GroupL1, Regularizer, SparseGroupL1
from bilevel.sets import Set, Simplex
from bilevel.status import SolveFailed


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, T = draw(30, 6), draw(30, seed=1)
GRAM, MOMENT = A.T @ A / 30, A.T @ T / 30


def ridge(x: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.solve(GRAM + x.exp().diag(), MOMENT)
    return solution


def ridge_gradient(x: Tensor, y: Tensor) -> Tensor:
    return GRAM @ y - MOMENT + x.exp() * y


@pytest.mark.parametrize(
    "linear",
    [None, CG(tol=1e-13, max_steps=50), NormalCG(tol=1e-12, max_steps=200), GMRES(tol=1e-12), bilevel.Dense()],
    ids=["default", "cg", "normal_cg", "gmres", "dense"],
)
def test_ridge_is_differentiated_like_its_closed_form(linear: Any) -> None:
    x, b = draw(6, seed=2).requires_grad_(), draw(6, seed=3)
    (exact,) = torch.autograd.grad(ridge(x) @ b, x)
    solve = implicit_function(lambda x: ridge(x).detach(), optimality=ridge_gradient, linear=linear)
    y = solve(x)
    assert torch.equal(y.detach(), ridge(x).detach())
    (found,) = torch.autograd.grad(y @ b, x)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-12)


def test_gradcheck_of_a_root_whose_jacobian_is_not_symmetric() -> None:
    w = draw(4, 4, seed=5) / 4

    def solver(x: Tensor) -> Tensor:
        y = torch.zeros(4, dtype=torch.float64)
        for _ in range(200):
            y = torch.tanh(w @ y + x)
        return y.detach()

    x = draw(4, seed=6).requires_grad_()
    for solve in (
        implicit_function(solver, fixed_point=lambda x, y: torch.tanh(w @ y + x)),
        implicit_function(solver, optimality=lambda x, y: torch.tanh(w @ y + x) - y),
        implicit_function(solver, optimality=lambda x, y: y - torch.tanh(w @ y + x), linear=NormalCG(1e-12, 50)),
    ):
        assert torch.autograd.gradcheck(solve, x)


REGULARIZERS = {
    "lasso": L1(lambda x: x.exp()),
    "group": GroupL1(lambda x: x.exp(), groups=torch.tensor([0, 0, 1, 1, 2, 2])),
    "sparse_group": SparseGroupL1(lambda x: 0.3 * x.exp(), lambda x: x.exp(), groups=torch.tensor([0, 0, 1, 1, 2, 2])),
}


LOGS = {"lasso": -1.8, "group": -1.4, "sparse_group": -1.5}


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("step", [0.1, 0.5, 1.3])
def test_prox_maps_of_any_step_give_the_active_set_hypergradient(name: str, step: float) -> None:
    regularizer: Regularizer = REGULARIZERS[name]
    layout, target = Layout.of(MOMENT, name="y"), draw(6, seed=4)

    def smooth(y: Tensor) -> tuple[Tensor, Tensor]:
        return y @ GRAM @ y / 2 - MOMENT @ y, GRAM @ y - MOMENT

    def solver(x: Tensor) -> Tensor:
        coefficients = regularizer.coefficients(x, layout)
        lower = ProximalGradient(tol=1e-13, max_steps=5000)
        return lower.minimize(smooth, lambda v, a: regularizer.prox(coefficients, v, a), 0 * MOMENT).y

    def prox_step(x: Tensor, y: Tensor) -> Tensor:
        return regularizer.prox(regularizer.coefficients(x, layout), y - step * smooth(y)[1], step)

    x = torch.tensor(LOGS[name], dtype=torch.float64, requires_grad=True)
    y = implicit_function(solver, fixed_point=prox_step)(x)
    assert 0 < int((y == 0).sum()) < 6
    (found,) = torch.autograd.grad((y - target).square().sum() / 2, x)
    problem = Problem(
        upper=lambda x, y, b: (y - target).square().sum() / 2, lower=lambda x, y, b: smooth(y)[0],
        regularizer=regularizer,
    )  # fmt: skip
    exact = hypergradient(problem, x.detach(), y.detach(), estimator=ActiveSet())
    assert float(exact.certificate.margin or 0) > 1e-3
    torch.testing.assert_close(found, exact.gradient, rtol=1e-6, atol=0)
    ends = [(solver(x.detach() + h) - target).square().sum() / 2 for h in (1e-6, -1e-6)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("lower_set", [Simplex(), bilevel.Box(0, 0.4), bilevel.Ball(0.3), bilevel.L1Ball(0.5)])
def test_projected_gradient_maps_differentiate_across_sets(lower_set: Set) -> None:
    layout = Layout.of(MOMENT, name="y")
    project = lower_set.bind(layout)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return GRAM @ y - 3 * MOMENT - 0.3 * x

    def solver(x: Tensor) -> Tensor:
        lower = ProximalGradient(tol=1e-13, max_steps=5000)
        return lower.minimize(lambda y: (y.sum(), gradient(x, y)), lambda v, a: project(v), 0 * MOMENT).y

    x, b = draw(6, seed=8).requires_grad_(), draw(6, seed=9)
    solve = implicit_function(solver, fixed_point=lambda x, y: project(y - 0.5 * gradient(x, y)))
    (found,) = torch.autograd.grad(solve(x) @ b, x)
    rows = torch.eye(6, dtype=torch.float64) * 1e-6
    reference = torch.stack([(solver(x.detach() + row) - solver(x.detach() - row)) @ b / 2e-6 for row in rows])
    torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-7)


def test_entries_at_active_bounds_send_nothing_back() -> None:
    solve = implicit_function(lambda x: x.clamp(-1, 1), fixed_point=lambda x, y: (y - 0.5 * (y - x)).clamp(-1, 1))
    x = torch.tensor([3.0, 0.5, -2.0], dtype=torch.float64, requires_grad=True)
    solve(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert x.grad[0] == x.grad[2] == 0


def test_nested_variables_and_leaves_that_need_no_gradient() -> None:
    def solver(x: Any) -> Any:
        return {"u": [x["a"] * x["b"][0]], "v": x["b"][0].sum() - 2 * x["a"]}

    def optimality(x: Any, y: Any) -> Any:
        u = y["u"][0] - x["a"] * x["b"][0]
        return {"v": 3 * (y["v"] - x["b"][0].sum() + 2 * x["a"]) + u.sum(), "u": [u]}  # another order of keys

    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    b = draw(2, 3).requires_grad_()
    idle = torch.ones(2, dtype=torch.float64)
    y = implicit_function(solver, optimality=optimality)({"a": a, "b": [b, idle]})
    (y["u"][0].square().sum() + 5 * y["v"]).backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, 2 * a.detach() * b.detach().square().sum() - 10)
    torch.testing.assert_close(b.grad, 2 * a.detach().square() * b.detach() + 5)
    assert idle.grad is None
    only_u = implicit_function(solver, optimality=optimality)({"a": a, "b": [b, idle]})["u"][0]
    (partial,) = torch.autograd.grad(only_u.sum(), a)
    torch.testing.assert_close(partial, b.detach().sum())


def test_it_composes_with_the_graph_around_it_and_with_float32() -> None:
    theta = torch.tensor([0.5, -0.5], requires_grad=True)
    solve = implicit_function(lambda x: x.exp(), optimality=lambda x, y: y.log() - x)
    value = solve(solve(theta.sin())).sum()
    (found,) = torch.autograd.grad(value, theta)
    (exact,) = torch.autograd.grad(theta.sin().exp().exp().sum(), theta)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)
    assert found.dtype == torch.float32


def test_a_condition_without_x_gives_zero() -> None:
    x = torch.ones(2, requires_grad=True)
    y = implicit_function(lambda x: torch.ones(2), optimality=lambda x, y: y - 1)(x)
    assert torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is None
    assert not implicit_function(lambda x: torch.ones(2), optimality=lambda x, y: y - 1)(torch.ones(2)).requires_grad


def test_hypergradients_of_the_user_s_solver_match_the_library_s() -> None:
    """The iMAML inner problem: y* = (Q + lam I)^-1 (c + lam x), dy*/dx = lam (Q + lam I)^-1."""
    q, c, lam = GRAM, MOMENT, 0.7
    solve = implicit_function(
        lambda x: torch.linalg.solve(q + lam * torch.eye(6, dtype=torch.float64), c + lam * x),
        optimality=lambda x, y: q @ y - c + lam * (y - x),
    )
    x = draw(6, seed=11).requires_grad_()
    b = draw(6, seed=12)
    (found,) = torch.autograd.grad(solve(x) @ b, x)
    exact = lam * torch.linalg.solve(q + lam * torch.eye(6, dtype=torch.float64), b)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)


def test_answers_that_are_no_solutions_are_refused() -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    off = implicit_function(lambda x: x + 0.1, optimality=lambda x, y: y - x)
    with pytest.raises(SolveFailed, match=r"no solution: ‖R\(x, y\)‖ = 0.141, above tol = 0.0001"):
        off(x)
    with pytest.raises(SolveFailed, match=r"‖P\(x, y\) - y‖ = .* mend fixed_point="):
        implicit_function(lambda x: x + 0.1, fixed_point=lambda x, y: x)(x)
    with pytest.raises(SolveFailed):
        implicit_function(lambda x: x, optimality=lambda x, y: y / 0 - x)(x)
    tolerant = implicit_function(lambda x: x + 0.1, optimality=lambda x, y: y - x, tol=0.2)
    torch.testing.assert_close(torch.autograd.grad(tolerant(x).sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("linear", [None, NormalCG(tol=1e-10, max_steps=20), CG(max_steps=5)])
def test_solutions_that_are_not_isolated_are_refused(linear: Any) -> None:
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    flat = implicit_function(lambda x: x, optimality=lambda x, y: (y - x).sum().expand(2), linear=linear)
    with pytest.raises(LinearSolveFailed, match="backward pass failed"):
        torch.autograd.grad(flat(x) @ torch.tensor([1.0, -1.0]).double(), x)


def test_a_truncated_linear_solve_is_refused() -> None:
    x = draw(6, seed=2).requires_grad_()
    solve = implicit_function(ridge, optimality=ridge_gradient, linear=CG(tol=1e-2, max_steps=1))
    with pytest.raises(LinearSolveFailed, match=r"step limit.*relative residual") as caught:
        torch.autograd.grad(solve(x).sum(), x)
    assert caught.value.status is bilevel.Status.STEP_LIMIT


def test_second_derivatives_are_refused_not_wrong() -> None:
    solve = implicit_function(lambda x: x.sqrt(), optimality=lambda x, y: y * y - x)
    x = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    (h,) = torch.autograd.grad(solve(x), x, create_graph=True)
    assert float(h.detach()) == 0.25
    with pytest.raises(bilevel.SecondOrderUnsupported, match="differentiated once only"):
        torch.autograd.grad(h + x.square(), x)
    (h,) = torch.autograd.grad(solve(x).square(), x, create_graph=True)
    with pytest.raises(bilevel.SecondOrderUnsupported):
        h.backward()


def test_unusable_conditions_are_refused() -> None:
    def identity(x: Any) -> Any:
        return x

    with pytest.raises(InvalidProblem, match="needs one of optimality= and fixed_point="):
        implicit_function(identity)
    with pytest.raises(InvalidProblem, match="needs one of"):
        implicit_function(identity, optimality=lambda x, y: y, fixed_point=lambda x, y: y)
    with pytest.raises(InvalidProblem, match="tol must be > 0"):
        implicit_function(identity, optimality=lambda x, y: y, tol=0)
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(InvalidProblem, match=r"optimality must return something like y, .*got shapes \[\(\)\]"):
        implicit_function(identity, optimality=lambda x, y: (y - x).sum())(x)
    with pytest.raises(InvalidProblem, match="got shapes \\['float'\\]"):
        implicit_function(identity, fixed_point=lambda x, y: 1.0)(x)
    with pytest.raises(InvalidProblem, match="not a Tensor"):
        implicit_function(lambda x: 1.0, optimality=lambda x, y: y)(x)
