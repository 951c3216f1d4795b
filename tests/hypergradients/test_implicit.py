"""Implicit hypergradients against closed forms, finite differences, and their own error estimates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import (
    CG,
    MINRES,
    Dense,
    Identity,
    Implicit,
    InvalidProblem,
    LinearSolveFailed,
    Neumann,
    NystromPreconditioner,
    Problem,
    Status,
    hypergradient,
)
from bilevel.dry_run import open_oracles


def exact_quadratic(x: Tensor) -> tuple[Problem, Tensor, Tensor]:
    """Return the quadratic task's problem, y*(x), and dF/dx by autograd through the closed form."""
    problem = bilevel.problems.quadratic(condition=50.0).problem
    assert problem.lower_solution is not None
    leaf = x.clone().requires_grad_()
    value = problem.upper(leaf, problem.lower_solution(leaf), None)
    (h,) = torch.autograd.grad(value, leaf)
    return problem, problem.lower_solution(x).detach(), h


X = torch.tensor([0.3, -1.2, 0.7, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "linear",
    [Dense(), CG(tol=1e-13, max_steps=60), MINRES(tol=1e-13, max_steps=60),
     CG(tol=1e-13, max_steps=60, preconditioner=NystromPreconditioner(rank=4))],
    ids=["dense", "cg", "minres", "nystrom-pcg"],
)  # fmt: skip
def test_accurate_solvers_meet_the_closed_form(linear: bilevel.LinearSolver) -> None:
    problem, y, h = exact_quadratic(X)
    found = hypergradient(problem, X, y, estimator=Implicit(linear=linear))
    torch.testing.assert_close(found.gradient, h, rtol=1e-10, atol=1e-12)
    assert found.certificate.error_estimate is not None
    assert float(found.certificate.error_estimate) < 1e-8


@pytest.mark.parametrize("terms", [0, 3, 30, 300])
def test_neumann_is_within_its_reported_error(terms: int) -> None:
    problem, y, h = exact_quadratic(X)
    found = hypergradient(problem, X, y, estimator=Implicit(linear=Neumann(terms=terms), truncate=True))
    error = (found.gradient - h).norm()
    estimate = found.certificate.error_estimate
    assert estimate is not None
    assert error <= estimate <= 3 * error + 1e-10


@pytest.mark.parametrize("step", [1e-4, 1e-5])
def test_hypergradient_of_a_nonlinear_problem_matches_differences_of_f(step: float) -> None:
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, _: (torch.sin(y) + y.square()).sum() + (x * y[:3]).sum(),
        lower=lambda x, y, _: torch.nn.functional.softplus(c @ y + b @ x).sum(),
        regularizer=bilevel.L2(weight=lambda x: x.exp().repeat(2)),
    )

    def solution(x: Tensor) -> Tensor:
        oracles, _, y = open_oracles(problem, x, torch.zeros(6, dtype=torch.float64))
        return bilevel.LBFGS(tol=1e-13, max_steps=200).minimize(lambda v: oracles.lower_gradient(x, v), y).y

    x = torch.tensor([0.1, -0.4, 0.2], dtype=torch.float64)
    h = hypergradient(problem, x, solution(x), estimator=Implicit(linear=Dense())).gradient
    for i, unit in enumerate(torch.eye(3, dtype=torch.float64)):
        ahead, behind = x + step * unit, x - step * unit
        slope = (problem.upper(ahead, solution(ahead), None) - problem.upper(behind, solution(behind), None)) / (
            2 * step
        )
        assert float(h[i]) == pytest.approx(float(slope), rel=1e-5, abs=1e-7)


def test_scaling_laws_and_invariances() -> None:
    problem, y, h = exact_quadratic(X)
    estimator = Implicit(linear=Dense())

    def of(**changes: object) -> Tensor:
        found: Tensor = hypergradient(replace(problem, **changes), X, y, estimator=estimator).gradient
        return found

    torch.testing.assert_close(of(upper=lambda x, y, b: 3 * problem.upper(x, y, b) + 7), 3 * h)
    torch.testing.assert_close(of(lower=lambda x, y, b: 5 * problem.lower(x, y, b) - 2), h)


def test_invertible_change_of_lower_variables_changes_nothing() -> None:
    problem, y, h = exact_quadratic(X)
    t = torch.randn(10, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 4 * torch.eye(10)
    moved = replace(
        problem,
        upper=lambda x, z, b: problem.upper(x, t @ z, b),
        lower=lambda x, z, b: problem.lower(x, t @ z, b),
    )
    found = hypergradient(moved, X, torch.linalg.solve(t, y), estimator=Implicit(linear=Dense()))
    torch.testing.assert_close(found.gradient, h)


def test_blocks_sum_to_the_stacked_problem() -> None:
    """Three independent lower problems as blocks, and as one problem whose objectives loop over them."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 5, generator=generator, dtype=torch.float64) + 0.5
    t = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    data = bilevel.Full((a, t))
    blocked = Problem(
        upper=lambda x, y, b: (y - b[1]).square().sum(),
        lower=lambda x, y, b: 0.5 * (b[0] * (y - x).square()).sum() + y.exp().sum(),
        upper_data=data,
        lower_data=data,
        blocks=3,
    )
    stacked = Problem(
        upper=lambda x, y, b: (y - t).square().sum() / 3,
        lower=lambda x, y, b: 0.5 * (a * (y - x).square()).sum() + y.exp().sum(),
    )
    x, y = torch.linspace(-1, 1, 5, dtype=torch.float64), 0.1 * torch.ones(3, 5, dtype=torch.float64)
    one = hypergradient(blocked, x, y, estimator=Implicit(linear=Dense()))
    other = hypergradient(stacked, x, y, estimator=Implicit(linear=Dense()))
    torch.testing.assert_close(one.gradient, other.gradient, rtol=1e-10, atol=1e-12)


def test_upper_variable_only_in_the_upper_objective_has_its_direct_term_only() -> None:
    problem = Problem(
        upper=lambda x, y, b: (x["direct"] * 2.0).sum() + (y - 1).square().sum(),
        lower=lambda x, y, b: (y - x["shift"]).square().sum(),
    )
    x = {"direct": torch.ones(2), "shift": torch.zeros(3)}
    found = hypergradient(problem, x, torch.zeros(3))
    torch.testing.assert_close(found.gradient["direct"], torch.full((2,), 2.0))
    torch.testing.assert_close(found.gradient["shift"], torch.full((3,), -2.0))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_number_at_each_level(shape: tuple[int, ...]) -> None:
    """Peers return 0 for scalars: a step limit from the length of a 0-dim tensor, or a last step never committed."""
    x, y = torch.full(shape, 1.0, dtype=torch.float64), torch.full(shape, 2.0, dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - 3.0).square().sum(), lower=lambda x, y, b: 1.5 * (y - 2.0 * x).square().sum()
    )
    for linear in (CG(), Dense(), MINRES(), Neumann(terms=100)):
        found = hypergradient(problem, x, y, estimator=Implicit(linear=linear))
        assert found.gradient.shape == shape
        torch.testing.assert_close(found.gradient, torch.full(shape, -2.0, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_weights_and_bias_are_solved_jointly() -> None:
    """A peer's dense solve kept only the diagonal blocks between tensors: 30 % error on weights plus bias."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 3, generator=generator, dtype=torch.float64) + 1.0
    targets = torch.randn(20, generator=generator, dtype=torch.float64)

    def loss(x: Tensor, y: dict[str, Tensor], b: object) -> Tensor:
        return (x.sigmoid() * (features @ y["weight"] + y["bias"] - targets).square()).mean()

    problem = Problem(
        upper=lambda x, y, b: (features[:5] @ y["weight"] + y["bias"] - targets[:5]).square().mean(), lower=loss
    )

    def solution(x: Tensor) -> dict[str, Tensor]:
        root = x.sigmoid().sqrt()
        design = torch.cat([features, torch.ones(20, 1, dtype=torch.float64)], 1) * root[:, None]
        w = torch.linalg.solve(design.T @ design, design.T @ (root * targets))
        return {"weight": w[:3], "bias": w[3]}

    x = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    (h,) = torch.autograd.grad(problem.upper(x, solution(x), None), x)
    y = {name: leaf.detach() for name, leaf in solution(x).items()}
    for linear in (Dense(), CG(tol=1e-13, max_steps=30)):
        found = hypergradient(problem, x.detach(), y, estimator=Implicit(linear=linear))
        torch.testing.assert_close(found.gradient, h, rtol=1e-9, atol=1e-12)


def test_polish_squares_the_error_of_the_lower_solve() -> None:
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square().sum(), lower=lambda x, y, b: (y.exp() - x * y + 0.1 * y.square()).sum()
    )
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    oracles, _, start = open_oracles(problem, x, torch.zeros(2, dtype=torch.float64))
    y = bilevel.LBFGS(tol=1e-14, max_steps=100).minimize(lambda v: oracles.lower_gradient(x, v), start).y
    exact = hypergradient(problem, x, y, estimator=Implicit(linear=Dense())).gradient
    errors = {}
    for polish in (False, True):
        for distance in (1e-2, 1e-3):
            estimator = Implicit(linear=Dense(), polish=polish)
            found = hypergradient(problem, x, y + distance, estimator=estimator, certify=False)
            errors[polish, distance] = float((found.gradient - exact).norm())
    assert errors[False, 1e-2] / errors[False, 1e-3] == pytest.approx(10, rel=0.1)
    assert errors[True, 1e-2] / errors[True, 1e-3] == pytest.approx(100, rel=0.1)


def test_damping_bias_is_part_of_the_estimate() -> None:
    problem, y, h = exact_quadratic(X)
    found = hypergradient(problem, X, y, estimator=Implicit(linear=CG(tol=1e-12, max_steps=50, damping=0.5)))
    error = (found.gradient - h).norm()
    assert found.certificate.error_estimate is not None
    assert error <= found.certificate.error_estimate <= 2 * error


def test_certified_strong_convexity_gives_bounds_that_hold() -> None:
    problem, y, _ = exact_quadratic(X)
    estimator = Implicit(linear=CG(max_steps=3), strong_convexity=1.0, truncate=True)
    found = hypergradient(problem, X, y + 0.1, estimator=estimator).certificate
    assert found.lower_distance_bound is not None
    assert found.linear_distance_bound is not None
    assert float(found.lower_distance_bound) >= 0.1 * 10**0.5
    assert hypergradient(problem, X, y, estimator=Implicit()).certificate.lower_distance_bound is None
    with pytest.raises(InvalidProblem, match="strong_convexity"):
        Implicit(strong_convexity=0.0)


def test_balance_stops_the_linear_solve_at_the_error_of_the_lower_one() -> None:
    problem = bilevel.problems.quadratic(d=60, condition=1e3).problem
    bent = replace(problem, upper=lambda x, y, b: problem.upper(x, y, b) + y.pow(4).sum())
    assert problem.lower_solution is not None
    y = problem.lower_solution(X)
    exact = hypergradient(bent, X, y, estimator=Implicit(linear=Dense())).gradient
    oracles, x, start = open_oracles(bent, X, y + 1e-2)
    spent, errors = {}, {}
    for balance in (False, True):
        estimator = Implicit(linear=CG(tol=1e-12, max_steps=100), warm_start=False, balance=balance)
        _, state = estimator.estimate(oracles, x, start, estimator.init(oracles, x, start), certify=True)
        before = oracles.counts
        estimate, _ = estimator.estimate(oracles, x, start, state)
        spent[balance] = (oracles.counts - before).hvps
        errors[balance] = float((estimate.gradient - exact).norm())
    assert spent[True] < spent[False] / 2
    assert errors[True] < 2 * errors[False]


def test_warm_start_reuses_the_last_solution() -> None:
    problem, y, _ = exact_quadratic(X)
    oracles, x, start = open_oracles(problem, X, y)
    spent = {}
    for warm in (False, True):
        estimator = Implicit(linear=CG(tol=1e-8, max_steps=60), warm_start=warm)
        _, state = estimator.estimate(oracles, x, start, estimator.init(oracles, x, start))
        before = oracles.counts
        estimator.estimate(oracles, x, start, state)
        spent[warm] = (oracles.counts - before).hvps
    assert spent[True] <= 2 < spent[False]


@pytest.mark.parametrize(
    ("curvatures", "status"),
    [((1.0, 2.0, -0.5), Status.NEGATIVE_CURVATURE), ((0.0, 0.0, 0.0), Status.SINGULAR)],
)
def test_hopeless_systems_raise_and_are_flagged_on_request(curvatures: tuple[float, ...], status: Status) -> None:
    c = torch.tensor(curvatures, dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square().sum(), lower=lambda x, y, b: 0.5 * (c * y.square()).sum() - (x * y).sum()
    )
    x, y = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    with pytest.raises(LinearSolveFailed, match=r"failed at upper step 0.*truncate=True") as caught:
        hypergradient(problem, x, y)
    assert caught.value.status is status
    flagged = hypergradient(problem, x, y, estimator=Implicit(truncate=True)).certificate
    assert flagged.status is status
    assert flagged.error_estimate is not None
    assert torch.isinf(flagged.error_estimate)


def test_minres_solves_what_cg_refuses() -> None:
    c = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square().sum(), lower=lambda x, y, b: 0.5 * (c * y.square()).sum() - (x * y).sum()
    )
    x = torch.ones(3, dtype=torch.float64)
    y = x / c
    found = hypergradient(problem, x, y, estimator=Implicit(linear=MINRES(tol=1e-12), truncate=True), certify=False)
    torch.testing.assert_close(found.gradient, 2 * (y - 1) / c)


def test_out_of_iterations_is_an_error_only_where_the_answer_is_worthless() -> None:
    generator = torch.Generator().manual_seed(0)
    c = torch.logspace(0, 4, 40, dtype=torch.float64)
    t = torch.randn(40, generator=generator, dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, b: (y - t).square().sum(), lower=lambda x, y, b: 0.5 * (c * (y - x).square()).sum()
    )
    x = torch.zeros(40, dtype=torch.float64)
    with pytest.raises(LinearSolveFailed, match=r"step limit.*relative residual") as caught:
        hypergradient(problem, x, x, estimator=Implicit(linear=CG(max_steps=1)))
    assert caught.value.status is Status.STEP_LIMIT
    found = hypergradient(problem, x, x, estimator=Implicit(linear=CG(max_steps=1), truncate=True))
    assert found.gradient.norm() > 0
    assert found.certificate.status is Status.STEP_LIMIT


def test_identity_is_flagged_as_an_approximation() -> None:
    problem, y, _ = exact_quadratic(X)
    found = hypergradient(problem, X, y, estimator=Implicit(linear=Identity()))
    assert found.certificate.status is Status.APPROXIMATE
    assert "approximate" in str(found.certificate)


def _random_problem(seed: int) -> tuple[Problem, Tensor, Tensor, Tensor, int]:
    """Return a strongly convex problem (n <= 30, condition <= 1e4), x, y*(x), an inexact y, and a step limit."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform() -> float:
        return float(torch.rand((), generator=generator, dtype=torch.float64))

    n, p = (int(torch.randint(1, high, (), generator=generator)) for high in (31, 11))
    q, _ = torch.linalg.qr(normal(n, n))
    exponents = torch.rand(n, generator=generator, dtype=torch.float64) if uniform() < 0.5 else torch.linspace(0, 1, n)
    a = q @ torch.diag((10 ** (4 * uniform())) ** exponents.double()) @ q.T
    b, c, e, t = normal(n, p), normal(n, n) / n**0.5, normal(n, p), normal(n)
    bend = 10 ** (2 * uniform() - 2) if uniform() < 0.7 else 0.0
    problem = Problem(
        upper=lambda x, y, _: 0.5 * (y - t).square().sum() + 0.05 * x.square().sum() + 0.3 * y.sin().sum(),
        lower=lambda x, y, _: 0.5 * y @ a @ y - y @ (b @ x) + bend * torch.nn.functional.softplus(c @ y + e @ x).sum(),
    )
    x, y = normal(p), torch.zeros(n, dtype=torch.float64)
    for _ in range(60):
        slope = torch.func.grad(lambda v: problem.lower(x, v, None))(y)
        y = y - torch.linalg.solve(torch.func.hessian(lambda v: problem.lower(x, v, None))(y), slope)
    inexact = y + 10 ** (-4 * uniform() - 0.5) * normal(n) * y.norm() / n**0.5 if uniform() > 0.2 else y
    return problem, x, y, inexact, int(torch.randint(1, 16, (), generator=generator))


@pytest.mark.parametrize("count", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_error_estimate_is_honest_on_random_problems(count: int) -> None:
    """The estimate is at least the true error in 95 % of cases, and never below a tenth of it."""
    ratios = []
    for seed in range(90_000, 90_000 + count):
        problem, x, y, inexact, steps = _random_problem(seed)
        exact = hypergradient(problem, x, y, estimator=Implicit(linear=Dense()), certify=False).gradient
        estimator = Implicit(linear=CG(tol=1e-10, max_steps=steps), truncate=True)
        found = hypergradient(problem, x, inexact, estimator=estimator)
        assert found.certificate.error_estimate is not None
        # The reference itself is known to rounding only.
        rounding = 1e-12 * (1 + exact.norm())
        ratios.append(
            float(found.certificate.error_estimate / ((found.gradient - exact).norm() - rounding).clamp_min(1e-30))
        )
    assert sum(ratio >= 1 for ratio in ratios) >= 0.95 * count
    assert min(ratios) >= 0.1
