"""Hypergradients of constrained lower levels: dense KKT systems, differences, margins, and what must be refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from sklearn.svm import SVC
from torch import Tensor

import bilevel
from bilevel import (
    CG,
    MINRES,
    Box,
    Dense,
    InvalidProblem,
    LinearSolveFailed,
    NonNegative,
    Problem,
    Status,
    hypergradient,
)
from bilevel.dry_run import open_oracles
from bilevel.hypergradients.active_set import ActiveSet
from bilevel.hypergradients.implicit import Implicit
from bilevel.hypergradients.kkt import ImplicitKKT, _Conditions
from bilevel.problems import toys
from bilevel.regularizers import L1, L2

EXACT = ImplicitKKT(linear=Dense(), check=Dense())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROOT = draw(8, 8) / 3
Q = ROOT @ ROOT.T + torch.eye(8, dtype=torch.float64)
B, C, TARGET = draw(8, 3, seed=1), draw(4, 8, seed=2), draw(8, seed=3)
E = draw(2, 8, seed=4)
X = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64)


def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
    return (y - TARGET).square().sum() / 2 + (x * y[:3]).sum()


def quadratic(x: Tensor, y: Tensor, batch: Any) -> Tensor:
    return y @ Q @ y / 2 - y @ (B @ x)


def quartic(x: Tensor, y: Tensor, batch: Any) -> Tensor:
    return quadratic(x, y, batch) + y.pow(4).sum() / 4 + (x[0] * y).cosh().sum() / 5


def cuts(x: Tensor, y: Tensor, batch: Any) -> Tensor:
    return C @ y - torch.stack([-0.4 + x[0], -0.3 * x[1], 5 + x[2], -1 + x[2].square()])


def sums(x: Tensor, y: Tensor, batch: Any) -> Tensor:
    return E @ y - x[:2].exp()


CASES: dict[str, Problem] = {
    "qp": Problem(upper=upper, lower=quadratic, constraint=cuts, equality=sums),
    "equalities": Problem(upper=upper, lower=quartic, equality=sums),
    "inequalities": Problem(upper=upper, lower=quartic, constraint=cuts),
    "curved": Problem(
        upper=upper,
        lower=quartic,
        constraint=lambda x, y, b: torch.stack([y.square().sum() - x[0].exp() / 3, y[0] - 3 + x[1]]),
        equality=lambda x, y, b: (y[0] * y[1] + y[2].sin() - 0.2 * x[1])[None],
    ),
    "simplex": Problem(
        upper=upper, lower=quartic, equality=lambda x, y, b: (y.sum() - 1 - x[0])[None], lower_set=NonNegative()
    ),
    "sparse_and_balanced": Problem(
        upper=upper, lower=quartic, equality=lambda x, y, b: (y.sum() - x[0])[None],
        regularizer=L1(lambda x: 0.3 * x[1].exp()),
    ),
    "declared_and_boxed": Problem(
        upper=upper, lower=quadratic, constraint=cuts, regularizer=L2(lambda x: x[2].exp()), lower_set=Box(-0.45, 4.0)
    ),
}  # fmt: skip


def _snapped(y: Tensor, bound: float) -> Tensor:
    return torch.where((y - bound).abs() < 1e-6, bound, y)


def solved(problem: Problem, x: Tensor, active: Tensor | None = None, face: Any = None) -> _Conditions:
    """Return the conditions at the lower solution: SLSQP, then Newton on what is active."""
    oracles, x, start = open_oracles(problem, x, torch.full((8,), 0.1, dtype=torch.float64))
    low, high = (float(v) for v in (oracles.project_y(start - 1e9)[0], oracles.project_y(start + 1e9)[0]))

    def numbers(y: Any) -> Tensor:
        return torch.as_tensor(y, dtype=torch.float64)

    declared = oracles.declared(x)
    split = problem.kinked
    # The L1 term is smooth in y = p - q with p, q >= 0.
    merge = (lambda z: numbers(z)[:8] - numbers(z)[8:]) if split else numbers

    def objective(z: Any) -> tuple[float, Any]:
        leaf = numbers(z).requires_grad_()
        y = leaf[:8] - leaf[8:] if split else leaf
        value = problem.lower(x, y, None)
        if split:
            value = value + 0.3 * x[1].exp() * leaf.sum()
        elif problem.regularizer is not None:
            value = value + declared.value(y)
        (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), gradient.numpy()

    rows = []
    if problem.constraint is not None:
        rows.append({"type": "ineq", "fun": lambda z: -problem.constraint(x, merge(z), None).numpy()})
    if problem.equality is not None:
        rows.append({"type": "eq", "fun": lambda z: problem.equality(x, merge(z), None).numpy()})
    count = 16 if split else 8
    sides = [(0.0, None)] * 16 if split else [(low, high)] * 8
    first = torch.full((count,), 0.1, dtype=torch.float64).clamp(low, high).numpy()
    found = minimize(
        objective,
        first,
        jac=True,
        bounds=sides,
        constraints=rows,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    y = merge(found.x)
    y = torch.where(y.abs() < 1e-6, 0.0, y) if split else _snapped(_snapped(y, low), high)
    here = _Conditions.at(oracles, x, y, 0, 1e-5, active=active, face=face)
    for _ in range(4):
        here = _Conditions.at(oracles, x, here.newton(Dense()), 0, active=here.active, face=here.face)
    missed = torch.cat([here.lagrangian.gradient, here.rows.value[here.active]])
    assert float(missed.norm()) < 1e-11
    assert float((here.face.y - y).norm()) < 1e-3
    return here


def value(problem: Problem, here: _Conditions) -> Tensor:
    return problem.upper(here.x, here.face.y, None)


def differences(problem: Problem, here: _Conditions, step: float) -> Tensor:
    """Return central differences of F, each from lower solves of its own."""
    rows = []
    for unit in torch.eye(len(here.x), dtype=torch.float64) * step:
        ends = [value(problem, solved(problem, here.x + sign * unit, here.active, here.face)) for sign in (1, -1)]
        rows.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_hypergradients_match_differences(name: str) -> None:
    problem = CASES[name]
    here = solved(problem, X)
    found = hypergradient(problem, X, here.face.y, estimator=EXACT)
    certificate = found.certificate
    assert certificate.margin is not None
    assert float(certificate.margin) > 1e-3
    for step in (1e-4, 1e-5):
        reference = differences(problem, here, step)
        assert float((found.gradient - reference).norm() / reference.norm()) < 1e-6
    assert certificate.error_estimate is not None
    assert float(certificate.error_estimate) < 1e-8
    assert float(certificate.lower_gradient_norm) < 1e-10
    assert not here.face.free.all() or name not in ("simplex", "sparse_and_balanced", "declared_and_boxed")


def test_a_qp_is_its_dense_kkt_system() -> None:
    """K^T u = (b, 0, 0), dF/dx = df/dx - (dKKT/dx)^T u with KKT = (L_y, h, c of the active ones)."""
    here = solved(CASES["qp"], X)
    y, active = here.face.y, here.active[:4]
    a = torch.cat([C[active], E])
    n = len(a)
    k = torch.cat([torch.cat([Q, a.T], 1), torch.cat([a, a.new_zeros(n, n)], 1)])
    b = torch.cat([y - TARGET, a.new_zeros(n)])
    b[:3] += X
    u = torch.linalg.solve(k.T, b)
    in_x = torch.tensor([[1, 0, 0], [0, -0.3, 0], [0, 0, 1], [0, 0, 2 * X[2]]], dtype=torch.float64)
    moved = torch.cat([-B, -in_x[active], -torch.cat([X[:2].exp().diag(), X.new_zeros(2, 1)], 1)])
    assert 1 <= int(active.sum()) < 4
    found = hypergradient(CASES["qp"], X, y, estimator=EXACT)
    torch.testing.assert_close(found.gradient, y[:3] - moved.T @ u, rtol=1e-9, atol=1e-12)


def test_the_dual_of_an_svm_with_an_intercept() -> None:
    """Each sample has a C of its own, `0 <= alpha_i <= e^(x_i)`, and the intercept makes `<s, alpha> = 0`."""
    points, sides = draw(8, 4, seed=5), torch.tensor([1.0, -1] * 4, dtype=torch.float64)
    rows, fresh = points * sides[:, None], draw(20, 4, seed=6)
    x = 0.3 * draw(8, seed=7) - 0.5
    problem = Problem(
        upper=lambda x, y, b: torch.nn.functional.softplus(-fresh @ ((x.exp() * y) @ rows)).mean(),
        lower=lambda x, y, b: ((x.exp() * y) @ rows).square().sum() / 2 - (x.exp() * y).sum(),
        equality=lambda x, y, b: ((x.exp() * y) @ sides)[None],
        lower_set=Box(0.0, 1.0),
    )
    here = solved(problem, x)
    free = int(here.face.free.sum())
    assert 2 <= free < 8
    svc = SVC(kernel="linear", C=1.0, tol=1e-12).fit(points.numpy(), sides.numpy(), sample_weight=x.exp().numpy())
    weights = torch.tensor(svc.coef_[0])
    # scikit-learn's SVC keeps products of samples in float32.
    torch.testing.assert_close((x.exp() * here.face.y) @ rows, weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(here.multipliers, torch.tensor(svc.intercept_), rtol=0, atol=1e-6)
    found = hypergradient(problem, x, here.face.y, estimator=EXACT)
    assert found.certificate.margin is not None
    assert float(found.certificate.margin) > 1e-3
    for step in (1e-4, 1e-5):
        reference = differences(problem, here, step)
        assert float((found.gradient - reference).norm() / reference.norm()) < 1e-6


def test_examine_reports_multipliers_and_margins() -> None:
    here = solved(CASES["qp"], X)
    oracles, x, y = open_oracles(CASES["qp"], X, here.face.y)
    point = EXACT.examine(oracles, x, y)
    active = point.active[:4]
    slope = Q @ y - B @ x + C.T @ point.multipliers[:4] + E.T @ point.multipliers[4:]
    assert float(slope.norm()) < 1e-10
    assert not point.multipliers[:4][~active].any()
    assert point.active[4:].all()
    forces = point.multipliers[:4] * C.norm(dim=1)
    torch.testing.assert_close(point.multiplier_margin, forces[active].min())
    distances = -cuts(x, y, None) / C.norm(dim=1)
    torch.testing.assert_close(point.slack_margin, distances[~active].min())
    assert 0 < float(point.independence) < 1


@pytest.mark.parametrize("linear", [CG(tol=1e-12, max_steps=50), MINRES(tol=1e-12, max_steps=50), Dense()])
@pytest.mark.parametrize("name", ["qp", "curved", "simplex"])
def test_linear_solvers_agree(name: str, linear: bilevel.LinearSolver) -> None:
    y = solved(CASES[name], X).face.y
    found = hypergradient(CASES[name], X, y, estimator=ImplicitKKT(linear=linear)).gradient
    exact = hypergradient(CASES[name], X, y, estimator=EXACT).gradient
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [toys.ineq, toys.llc])
def test_the_hypergradient_vanishes_at_the_solution_of_toys(make: Any) -> None:
    task = make()
    y = {"y1": torch.full((1,), 0.7).double(), "y2": torch.full((1,), -0.4).double()}
    y_star = task.problem.lower_solution(task.problem.reference) if task.problem.lower_solution else y
    found = hypergradient(task.problem, task.problem.reference, y_star, estimator=EXACT)
    assert float(found.gradient.norm()) < 1e-7
    if make is toys.ineq:
        assert float(found.certificate.margin or 0) == pytest.approx(2.5)


def test_the_slack_side_of_the_margin() -> None:
    task = toys.ineq()  # y* = 3 without the constraint y <= 2 - x, so at x = -1.5 it is inactive by .5
    found = hypergradient(task.problem, torch.tensor([-1.5]).double(), torch.tensor([3.0]).double(), estimator=EXACT)
    assert float(found.gradient) == pytest.approx(-3.5)
    assert float(found.certificate.margin or 0) == pytest.approx(0.5)


@pytest.mark.parametrize("active_tol", [1e-6, 0.0])
def test_a_vanishing_multiplier_is_a_zero_margin_and_says_so(active_tol: float) -> None:
    task = toys.ineq()
    estimator = ImplicitKKT(active_tol=active_tol)
    found = hypergradient(
        task.problem, torch.tensor([-1.0]).double(), torch.tensor([3.0]).double(), estimator=estimator
    )
    assert float(found.certificate.margin if found.certificate.margin is not None else 1) == 0
    assert "strict complementarity fails" in str(found.certificate)


def test_a_point_held_on_the_wrong_side_is_not_trusted() -> None:
    task = toys.ineq()
    y = torch.tensor([1.0]).double()  # on the constraint at x = 1, though the objective pulls away from it
    problem = Problem(
        upper=task.problem.upper,
        lower=lambda x, y, b: 0.5 * (y - 0.2).square().sum(),
        constraint=task.problem.constraint,
    )
    certificate = hypergradient(problem, torch.tensor([1.0]).double(), y, estimator=EXACT).certificate
    assert certificate.margin is not None
    assert float(certificate.margin) == 0
    assert certificate.error_estimate is not None
    assert float(certificate.error_estimate) == float("inf")
    assert float(certificate.lower_gradient_norm) == pytest.approx(0.8)


@pytest.mark.parametrize("noise", [1e-3, 1e-4])
def test_the_error_estimate_covers_an_inaccurate_solution(noise: float) -> None:
    problem = CASES["curved"]
    here = solved(problem, X)
    exact = hypergradient(problem, X, here.face.y, estimator=EXACT).gradient
    oracles, x, y = open_oracles(problem, X, here.face.y)
    for seed in range(5):
        off = y + noise * draw(8, seed=seed)
        estimator = ImplicitKKT(linear=Dense(), check=Dense(), active_tol=0.05)
        found, _ = estimator.estimate(oracles, x, off, estimator.init(oracles, x, off), certify=True)
        error = float((found.gradient - exact).norm())
        assert found.certificate.error_estimate is not None
        assert error <= float(found.certificate.error_estimate) <= 3 * error
        assert float(found.certificate.lower_gradient_norm) > 0.1 * noise


def test_a_loose_linear_solve_shows_in_the_error_estimate() -> None:
    problem = CASES["qp"]
    y = solved(problem, X).face.y
    exact = hypergradient(problem, X, y, estimator=EXACT).gradient
    found = hypergradient(problem, X, y, estimator=ImplicitKKT(linear=CG(tol=1e-1, max_steps=2)))
    error = float((found.gradient - exact).norm())
    assert found.certificate.error_estimate is not None
    assert 1e-6 < error <= float(found.certificate.error_estimate) <= 3 * error


def test_without_constraints_it_is_active_set_and_implicit() -> None:
    smooth = Problem(upper=upper, lower=quadratic)
    y = torch.linalg.solve(Q, B @ X)
    found = hypergradient(smooth, X, y, estimator=EXACT)
    torch.testing.assert_close(found.gradient, hypergradient(smooth, X, y, estimator=Implicit(Dense())).gradient)
    boxed = Problem(upper=upper, lower=quadratic, lower_set=Box(-0.1, 0.1))
    y = solved(boxed, X).face.y
    one, other = (hypergradient(boxed, X, y, estimator=e) for e in (EXACT, ActiveSet(Implicit(Dense()))))
    torch.testing.assert_close(one.gradient, other.gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.certificate.margin, other.certificate.margin)


def test_constraints_that_fix_y_leave_no_tangent() -> None:
    problem = Problem(upper=upper, lower=quadratic, equality=lambda x, y, b: y - B @ x)
    found = hypergradient(problem, X, B @ X, estimator=EXACT)
    leaf = X.clone().requires_grad_()
    (exact,) = torch.autograd.grad(upper(leaf, B @ leaf, None), leaf)
    torch.testing.assert_close(found.gradient, exact, rtol=1e-10, atol=1e-12)
    assert found.certificate.curvature is None


def test_everything_held_by_the_box_leaves_the_direct_part() -> None:
    point = torch.full((8,), 0.5, dtype=torch.float64)
    oracles, x, y = open_oracles(Problem(upper=upper, lower=quadratic, lower_set=Box(0.5, 0.5)), X, point)
    estimator = ImplicitKKT()
    estimate, _ = estimator.estimate(oracles, x, y, estimator.init(oracles, x, y), certify=True)
    torch.testing.assert_close(estimate.gradient, point[:3])


def test_dependent_active_constraints_are_refused() -> None:
    twice = Problem(
        upper=upper, lower=quadratic, equality=lambda x, y, b: torch.stack([y.sum() - x[0], 2 * y.sum() - 2 * x[0]])
    )
    y = torch.full((8,), float(X[0]) / 8, dtype=torch.float64)
    oracles, x, _ = open_oracles(Problem(upper=upper, lower=quadratic), X, y)
    oracles = bilevel.Oracles(twice, oracles.x_layout, oracles.y_layout)
    for call in (EXACT.examine, lambda *at: EXACT.estimate(*at, EXACT.init(*at))):
        with pytest.raises(LinearSolveFailed, match=r"entries \[0, 1\] .* LICQ fails") as caught:
            call(oracles, x, y)
        assert caught.value.status is Status.CQ_FAILURE
    square = bilevel.Oracles(
        Problem(upper=upper, lower=quadratic, equality=lambda x, y, b: (y.sum() - x[0]).square()[None]),
        oracles.x_layout, oracles.y_layout,
    )  # fmt: skip
    with pytest.raises(LinearSolveFailed, match="LICQ fails"):
        EXACT.examine(square, x, y)


def test_a_saddle_on_the_tangent_space_is_refused() -> None:
    saddle = Problem(
        upper=upper, lower=lambda x, y, b: quadratic(x, y, b) - 20 * y[0].square(),
        equality=lambda x, y, b: (y[1] - x[0])[None],
    )  # fmt: skip
    y = torch.zeros(8, dtype=torch.float64)
    y[1] = X[0]
    with pytest.raises(LinearSolveFailed) as caught:
        hypergradient(saddle, X, y, estimator=ImplicitKKT())
    assert caught.value.status is Status.NEGATIVE_CURVATURE
    # Where the constraint removes the direction of negative curvature, y is a strict minimum all the same.
    held = Problem(upper=upper, lower=saddle.lower, equality=lambda x, y, b: (y[0] - x[0])[None])
    here = solved(held, X)
    assert bool(hypergradient(held, X, here.face.y, estimator=ImplicitKKT()).gradient.isfinite().all())


def test_x_may_enter_through_a_constraint_alone() -> None:
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square().sum() / 2, lower=lambda x, y, b: (y - 3).square().sum() / 2,
        constraint=lambda x, y, b: x + y - 2,
    )  # fmt: skip
    found = hypergradient(problem, torch.tensor([1.5]), torch.tensor([0.5]), estimator=ImplicitKKT())
    assert float(found.gradient) == pytest.approx(0.5)
    unused = Problem(upper=problem.upper, lower=problem.lower, constraint=lambda x, y, b: y - 2)
    with pytest.raises(bilevel.UnusedHyperparameter):
        hypergradient(unused, torch.tensor([1.5]), torch.tensor([0.5]), estimator=ImplicitKKT())


def test_warm_starts() -> None:
    problem = CASES["inequalities"]
    here = solved(problem, X)
    oracles, x, y = open_oracles(problem, X, here.face.y)
    estimator = ImplicitKKT(linear=CG(tol=1e-10, max_steps=50))
    _, state = estimator.estimate(oracles, x, y, estimator.init(oracles, x, y))
    before = oracles.counts
    estimator.estimate(oracles, x, y, state)
    warm = (oracles.counts - before).hvps
    cold_estimator = ImplicitKKT(linear=CG(tol=1e-10, max_steps=50), warm_start=False)
    before = oracles.counts
    cold_estimator.estimate(oracles, x, y, state)
    assert warm < (oracles.counts - before).hvps


def test_float32() -> None:
    exact = hypergradient(CASES["qp"], X, y := solved(CASES["qp"], X).face.y, estimator=EXACT)
    q, b, c, e, t = (v.float() for v in (Q, B, C, E, TARGET))
    single = Problem(
        upper=lambda x, y, _: (y - t).square().sum() / 2 + (x * y[:3]).sum(),
        lower=lambda x, y, _: y @ q @ y / 2 - y @ (b @ x),
        constraint=lambda x, y, _: c @ y - torch.stack([-0.4 + x[0], -0.3 * x[1], 5 + x[2], -1 + x[2].square()]),
        equality=lambda x, y, _: e @ y - x[:2].exp(),
    )
    found = hypergradient(single, X.float(), y.float(), estimator=ImplicitKKT(active_tol=1e-4))
    assert found.gradient.dtype == torch.float32
    torch.testing.assert_close(found.gradient.double(), exact.gradient, rtol=1e-3, atol=1e-3)
    assert found.certificate.margin is not None
    assert found.certificate.margin.dtype == torch.float32


@pytest.mark.parametrize("name", ["qp", "simplex"])
def test_hypergradient_chooses_it_where_there_are_constraints(name: str) -> None:
    y = solved(CASES[name], X).face.y
    chosen = hypergradient(CASES[name], X, y)
    torch.testing.assert_close(chosen.gradient, hypergradient(CASES[name], X, y, estimator=ImplicitKKT()).gradient)


def test_unusable_input_is_refused() -> None:
    with pytest.raises(InvalidProblem, match="active_tol"):
        ImplicitKKT(active_tol=-1.0)
    x, y = torch.ones((), dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    parts: list[tuple[dict[str, Any], str]] = [
        ({"blocks": 2}, "takes no blocks"), ({"lower_set": bilevel.Ball(1.0)}, "single entries"),
    ]  # fmt: skip
    for part, message in parts:
        problem = Problem(
            upper=lambda x, y, b: (y - x).square().sum(), lower=lambda x, y, b: (y - x).square().sum(), **part
        )
        with pytest.raises(InvalidProblem, match=message):
            hypergradient(problem, x, y, estimator=ImplicitKKT())
