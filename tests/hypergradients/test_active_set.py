"""Hypergradients across kinks and bounds: against differences of F, closed forms, and at the kinks themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import CG, Box, Dense, ElasticNet, Implicit, InvalidProblem, NonNegative, Problem, hypergradient
from bilevel.dry_run import open_oracles
from bilevel.hypergradients.active_set import ActiveSet
from bilevel.layout import named_leaves
from bilevel.optimizers.proximal import ProximalGradient
from bilevel.problems import toys
from bilevel.regularizers import L1, L2, GroupL1, SparseGroupL1
from bilevel.sets import Product, Simplex
from bilevel.solvers.sparse import SparseDescent

TIGHT = SparseDescent(lower=ProximalGradient(tol=1e-13, max_steps=20_000))
EXACT = ActiveSet(Implicit(linear=Dense()))
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, -1, -1])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, A_VAL = draw(40, 12), draw(30, 12, seed=1)
BETA = torch.tensor([2.0, -1.5, 1, 0, 0, 0, 0.7, 0, 0, 0, -1, 0], dtype=torch.float64)
T, T_VAL = A @ BETA + draw(40, seed=2), A_VAL @ BETA + draw(30, seed=3)


def squares(x: Any, y: Tensor, batch: Any) -> Tensor:
    return (A @ y - T).square().mean() / 2


def validation(x: Any, y: Tensor, batch: Any) -> Tensor:
    return (A_VAL @ y - T_VAL).square().mean() / 2


def logistic(x: Any, y: Tensor, batch: Any) -> Tensor:
    return torch.nn.functional.softplus(-(A @ y) * T.sign()).mean()


def logistic_validation(x: Any, y: Tensor, batch: Any) -> Tensor:
    return torch.nn.functional.softplus(-(A_VAL @ y) * T_VAL.sign()).mean()


def svm(per_sample: bool) -> tuple[Problem, Any, Tensor]:
    """Return the dual of a linear SVM in shares of C: `alpha = e^x y`, y in [0, 1]."""
    rows = A[:20, :8] * T[:20].sign().unsqueeze(-1)

    def dual(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        alpha = x.exp() * y
        return (alpha @ rows).square().sum() / 2 - alpha.sum()

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        w = (x.exp() * y) @ rows
        return torch.nn.functional.softplus(-(A_VAL[:, :8] @ w) * T_VAL.sign()).mean()

    x = -3 + 0.3 * draw(20, seed=4) if per_sample else torch.tensor(-3.0, dtype=torch.float64)
    return Problem(upper=upper, lower=dual, lower_set=Box(0, 1)), x, torch.full((20,), 0.5, dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def least_squares(regularizer: Any, **parts: Any) -> Problem:
    return Problem(upper=validation, lower=squares, regularizer=regularizer, **parts)


ZERO = torch.zeros(12, dtype=torch.float64)
CASES: dict[str, tuple[Problem, Any, Tensor]] = {
    "lasso": (least_squares(L1(lambda x: x.exp())), number(-1.5), ZERO),
    "weighted_lasso": (least_squares(L1(lambda x: x.exp())), -1.5 + 0.5 * draw(12, seed=4), ZERO),
    "elastic_net": (
        least_squares(ElasticNet(lambda x: x["l1"].exp(), lambda x: x["l2"].exp())),
        {"l1": number(-1.5), "l2": number(-0.7)},
        ZERO,
    ),
    "group_lasso": (least_squares(GroupL1(lambda x: x.exp(), groups=GROUPS)), -0.3 + 0.3 * draw(4, seed=5), ZERO),
    "sparse_group_lasso": (
        least_squares(SparseGroupL1(lambda x: x[0].exp(), lambda x: x[1].exp(), groups=GROUPS)),
        [number(-2.0), number(-0.9)],
        ZERO,
    ),
    "sparse_logistic": (
        Problem(upper=logistic_validation, lower=logistic, regularizer=L1(lambda x: x.exp())), number(-3.0), ZERO,
    ),
    "sparse_group_logistic": (
        Problem(
            upper=logistic_validation, lower=logistic,
            regularizer=SparseGroupL1(lambda x: x[0].exp(), lambda x: x[1].exp(), groups=GROUPS),
        ),
        [number(-4.0), number(-3.0)],
        ZERO,
    ),
    "box": (least_squares(L2(lambda x: x.exp()), lower_set=Box(-0.2, 0.9)), -1 + draw(12, seed=6), ZERO),
    "nonnegative_lasso": (least_squares(L1(lambda x: x.exp()), lower_set=NonNegative()), number(-1.5), ZERO),
    "boxed_elastic_net": (
        least_squares(ElasticNet(lambda x: x.exp(), 0.1), lower_set=Box(-1.0, 0.8)), -2 + 0.3 * draw(12, seed=4), ZERO,
    ),
    "svm_one_c": svm(per_sample=False),
    "svm_c_per_sample": svm(per_sample=True),
}  # fmt: skip


def flat(x: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for _, leaf in named_leaves(x)])


def solved(problem: Problem, x: Any, y: Tensor, solver: SparseDescent = TIGHT) -> Tensor:
    """Return y*(x), with exact zeros and bounds."""
    oracles, flat_x, flat_y = open_oracles(problem, x, y)
    return oracles.y_layout.unflatten(solver.solve_lower(oracles, flat_x, flat_y).y)


def differences(problem: Problem, x: Any, y: Tensor, step: float) -> Tensor:
    """Return central differences of F, each from lower solves of its own."""
    oracles, flat_x, flat_y = open_oracles(problem, x, y)
    rows = []
    for unit in torch.eye(len(flat_x), dtype=flat_x.dtype):
        ends = [flat_x + sign * step * unit for sign in (1, -1)]
        values = [oracles.upper_value(end, TIGHT.solve_lower(oracles, end, flat_y).y) for end in ends]
        rows.append((values[0] - values[1]) / (2 * step))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_hypergradients_match_differences(name: str) -> None:
    problem, x, start = CASES[name]
    y = solved(problem, x, start)
    found = hypergradient(problem, x, y, estimator=EXACT)
    certificate = found.certificate
    assert certificate.margin is not None
    assert float(certificate.margin) > 1e-4
    held = int((open_oracles(problem, x, start)[0].declared(flat(x)).held(y) | (y == 0) | (y == 1)).sum())
    assert 0 < held < y.numel() or name in ("box", "boxed_elastic_net")
    for step in (1e-4, 1e-5):
        reference = differences(problem, x, y, step)
        torch.testing.assert_close(flat(found.gradient), reference, rtol=1e-6, atol=1e-6 * float(reference.abs().max()))
        assert float((flat(found.gradient) - reference).norm() / reference.norm()) < 1e-6
    assert certificate.error_estimate is not None
    assert float(certificate.error_estimate) < 1e-6
    assert float(certificate.lower_gradient_norm) < 1e-10


def test_orthonormal_lasso_is_the_closed_form() -> None:
    q, _ = torch.linalg.qr(draw(50, 6))
    a, target = q * math.sqrt(50), draw(6, seed=1)
    z = a.T @ (t := draw(50, seed=2)) / 50
    problem = Problem(
        upper=lambda x, y, b: (y - target).square().sum() / 2,
        lower=lambda x, y, b: (a @ y - t).square().mean() / 2,
        regularizer=L1(lambda x: x.exp()),
    )
    x = z.abs().sort().values[2:4].mean().log()
    y = z.sign() * (z.abs() - x.exp()).clamp_min(0)
    found = hypergradient(problem, x, y, estimator=EXACT)
    expected = -(x.exp() * y.sign() * (y - target)).sum()
    torch.testing.assert_close(found.gradient, expected, rtol=1e-10, atol=1e-12)
    off, on = (x.exp() - z.abs())[y == 0].min(), y.abs()[y != 0].min()
    torch.testing.assert_close(found.certificate.margin, torch.minimum(off, on), rtol=1e-9, atol=1e-12)


def test_lasso_and_elastic_net_are_their_formulas() -> None:
    """H_S = A_S^T A_S / n + e^c I, w = H_S^-1 b_S, dF/da = -e^a sign(y_S)^T w, dF/dc = -e^c y_S^T w."""
    problem, x, start = CASES["elastic_net"]
    y = solved(problem, x, start)
    s = y != 0
    h = A[:, s].T @ A[:, s] / 40 + x["l2"].exp() * torch.eye(int(s.sum()), dtype=torch.float64)
    w = torch.linalg.solve(h, (A_VAL.T @ (A_VAL @ y - T_VAL) / 30)[s])
    found = hypergradient(problem, x, y, estimator=EXACT).gradient
    torch.testing.assert_close(found["l1"], -x["l1"].exp() * (y[s].sign() @ w), rtol=1e-9, atol=0)
    torch.testing.assert_close(found["l2"], -x["l2"].exp() * (y[s] @ w), rtol=1e-9, atol=0)


def test_weights_off_the_support_have_no_hypergradient() -> None:
    problem, x, start = CASES["weighted_lasso"]
    y = solved(problem, x, start)
    h = hypergradient(problem, x, y, estimator=EXACT).gradient
    assert (y == 0).any()
    assert torch.equal(h == 0, y == 0)


def test_svm_dual_is_the_formula_of_free_and_bound_samples() -> None:
    """In alpha, bounded by C = e^a: dF/da = C (sum_U b_i - 1_U^T Q_UM Q_MM^-1 b_M), M free, U at C."""
    problem, x, start = CASES["svm_one_c"]
    y, c = solved(problem, x, start), x.exp()
    free, top = (y > 0) & (y < 1), y == 1
    rows = A[:20, :8] * T[:20].sign().unsqueeze(-1)
    gram, alpha = rows @ rows.T, (c * y).requires_grad_()
    f = torch.nn.functional.softplus(-(A_VAL[:, :8] @ (alpha @ rows)) * T_VAL.sign()).mean()
    (b,) = torch.autograd.grad(f, alpha)
    moved = gram[top][:, free].sum(0) @ torch.linalg.solve(gram[free][:, free], b[free])
    found = hypergradient(problem, x, y, estimator=EXACT)
    torch.testing.assert_close(found.gradient, c * (b[top].sum() - moved), rtol=1e-8, atol=0)
    slope = c * (gram @ alpha.detach() - 1)
    slack = torch.where(y == 0, slope, torch.where(top, -slope, torch.inf)).min()
    assert found.certificate.margin is not None
    assert float(found.certificate.margin) <= float(slack) * (1 + 1e-9)


def test_entries_at_their_bounds_have_no_implicit_gradient() -> None:
    task = toys.box()
    assert task.problem.lower_solution is not None
    x = torch.tensor([3.0, 0.5, -2.0], dtype=torch.float64)
    found = hypergradient(task.problem, x, task.problem.lower_solution(x), estimator=EXACT)
    s, t = x.new_tensor([3.0, 1, -0.2]), x.new_tensor([0.0, 0, 0.5])
    torch.testing.assert_close(found.gradient, x - s + x.new_tensor([0.0, 1, 0]) * (x - t), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.certificate.margin, number(0.5))  # entry 1 to its bound; multipliers 2 and 1


def one_entry(x: float, *, reach: float = 1.0) -> tuple[Problem, Tensor, Tensor]:
    """Return `min (y - 2)^2 / 2 + x |y|` in one entry beside one that is far from 0, its x, and its solution."""
    b = torch.tensor([2.0, 30.0], dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, _: y.sum(), lower=lambda x, y, _: reach * (y - b).square().sum() / 2,
        regularizer=L1(lambda x: reach * x),
    )  # fmt: skip
    return problem, number(x), (b - x).clamp_min(0)


@pytest.mark.parametrize("reach", [1.0, 10.0])
@pytest.mark.parametrize("x", [1.5, 1.9999, 2.0, 2.0001, 2.5])
def test_the_margin_is_the_distance_to_the_kink_and_0_at_it(x: float, reach: float) -> None:
    certificate = hypergradient(*one_entry(x, reach=reach), estimator=EXACT).certificate
    assert certificate.margin is not None
    assert float(certificate.margin) == pytest.approx(reach * abs(2 - x), rel=1e-6)
    assert ("one-sided" in str(certificate)) == (x == 2.0)
    assert ("strict complementarity fails" in str(certificate)) == (x == 2.0)
    assert "margin" in str(certificate)


def test_a_margin_within_the_accuracy_of_y_counts_as_0() -> None:
    problem, x, y = one_entry(2.0 + 1e-6)
    off = y + torch.tensor([0.0, 1e-5]).double()
    certificate = hypergradient(problem, x, off, estimator=EXACT).certificate
    assert certificate.margin is not None
    assert float(certificate.margin) == 0
    assert float(certificate.lower_gradient_norm) == pytest.approx(1e-5)


def test_both_one_sided_derivatives_at_a_kink_are_found_from_their_sides() -> None:
    problem, x, y = one_entry(2.0)
    assert float(hypergradient(problem, x, y, estimator=EXACT).gradient) == pytest.approx(-1.0)
    below = y + torch.tensor([1e-14, 0.0]).double()
    found = hypergradient(problem, x, below, estimator=EXACT)
    assert float(found.gradient) == pytest.approx(-2.0)
    assert found.certificate.margin is not None
    assert float(found.certificate.margin) == 0


def test_a_face_that_is_wrong_is_not_trusted() -> None:
    problem, x, y = one_entry(1.0)
    wrong = torch.tensor([0.0, 29.0]).double()
    certificate = hypergradient(problem, x, wrong, estimator=EXACT).certificate
    assert certificate.error_estimate is not None
    assert math.isinf(certificate.error_estimate)
    assert certificate.margin is not None
    assert float(certificate.margin) == 0
    assert float(certificate.lower_gradient_norm) == pytest.approx(1.0)
    right = hypergradient(problem, x, y, estimator=EXACT).certificate
    assert right.error_estimate is not None
    assert float(right.error_estimate) < 1e-12


def test_a_point_without_free_entries_leaves_the_direct_part() -> None:
    problem = Problem(
        upper=lambda x, y, b: (x - 3).square() + y.sum(), lower=lambda x, y, b: (y - 1).square().sum() / 2,
        regularizer=L1(lambda x: x),
    )  # fmt: skip
    x, y = number(1.25), torch.zeros(3, dtype=torch.float64)
    for certify in (True, False):
        found = hypergradient(problem, x, y, estimator=EXACT, certify=certify)
        assert float(found.gradient) == pytest.approx(-3.5)
        assert found.certificate.margin is not None
        assert float(found.certificate.margin) == pytest.approx(0.25)
        assert (found.certificate.error_estimate is not None) == certify
        assert found.certificate.counts.hvps == 0


def test_smooth_problems_are_those_of_implicit_without_a_margin() -> None:
    problem = bilevel.problems.quadratic().problem
    x, y = draw(4), draw(10)
    one = hypergradient(problem, x, y, estimator=EXACT)
    other = hypergradient(problem, x, y, estimator=Implicit(linear=Dense()))
    torch.testing.assert_close(one.gradient, other.gradient, rtol=1e-12, atol=0)
    assert one.certificate.margin is None
    assert "margin" not in str(one.certificate)


@pytest.mark.parametrize("linear", [CG(tol=1e-12, max_steps=100), bilevel.MINRES(tol=1e-12, max_steps=100), Dense()])
@pytest.mark.parametrize("regularizer", [L1(lambda x: x.exp()), GroupL1(lambda x: x.exp(), groups=GROUPS)])
def test_blocks_are_separate_problems_with_faces_of_their_own(linear: bilevel.LinearSolver, regularizer: Any) -> None:
    data = draw(3, 40, 12, seed=7), draw(3, 40, seed=8) + draw(3, 40, 12, seed=7) @ BETA
    x = number(-1.0)

    def upper(x: Tensor, y: Tensor, b: Any) -> Tensor:
        return (y - BETA).square().sum()

    def lower(x: Tensor, y: Tensor, b: Any) -> Tensor:
        return (b[0] @ y - b[1]).square().mean() / 2

    estimator = ActiveSet(Implicit(linear=linear))
    whole = Problem(upper=upper, lower=lower, lower_data=bilevel.Full(data), blocks=3, regularizer=regularizer)
    y = solved(whole, x, torch.zeros(3, 12, dtype=torch.float64))
    together = hypergradient(whole, x, y, estimator=estimator)
    assert len({tuple(row) for row in (y == 0).tolist()}) > 1
    each = []
    for i, row in enumerate(y):
        own = bilevel.Full((data[0][i], data[1][i]))
        alone = Problem(upper=upper, lower=lower, lower_data=own, regularizer=regularizer)
        each.append(hypergradient(alone, x, row, estimator=estimator))
    torch.testing.assert_close(together.gradient, torch.stack([h.gradient for h in each]).mean(), rtol=1e-8, atol=0)
    margins = [h.certificate.margin for h in each]
    assert together.certificate.margin is not None
    assert all(m is not None for m in margins)
    slack = min(float(m) for m in margins if m is not None)
    assert float(together.certificate.margin) == pytest.approx(slack, rel=0.5)


def test_warm_starts_follow_a_changing_support() -> None:
    problem, _, start = CASES["lasso"]
    estimator = ActiveSet(Implicit(linear=CG(tol=1e-10, max_steps=50)))
    oracles, x, y = open_oracles(problem, number(-1.5), start)
    state = estimator.init(oracles, x, y)
    supports = set()
    for log_alpha in (-0.2, -1.0, -1.01, -3.0, 2.0, -1.0):
        x = number(log_alpha)
        y = TIGHT.solve_lower(oracles, x, y).y
        warm, state = estimator.estimate(oracles, x, y, state)
        cold, _ = EXACT.estimate(oracles, x, y, EXACT.init(oracles, x, y))
        torch.testing.assert_close(warm.gradient, cold.gradient, rtol=1e-8, atol=1e-12)
        assert state.free is not None
        assert state.w is not None
        assert not state.w[~state.free].any()
        supports.add(int(state.free.sum()))
    assert len(supports) >= 4
    assert 0 in supports


def test_a_warm_start_that_is_exact_still_sees_the_margin() -> None:
    """The linear solver takes no step and meets no curvature; the free entry is nearer to its kink than the other."""
    b, scale, x = torch.tensor([2.0, 0.5], dtype=torch.float64), 3.0, number(1.9)
    problem = Problem(
        upper=lambda x, y, _: y.sum(), lower=lambda x, y, _: scale * (y - b).square().sum() / 2,
        regularizer=L1(lambda x: scale * x),
    )  # fmt: skip
    y = (b - x).clamp_min(0)
    oracles, flat_x, flat_y = open_oracles(problem, x, y)
    for linear in (CG(tol=1e-6), bilevel.Identity()):
        estimator = ActiveSet(Implicit(linear=linear, truncate=True))
        state = estimator.init(oracles, flat_x, flat_y)
        for _ in range(2):
            found, state = estimator.estimate(oracles, flat_x, flat_y, state)
            assert found.certificate.margin is not None
            assert float(found.certificate.margin) == pytest.approx(scale * 0.1, rel=1e-9)
        assert found.certificate.curvature is None


def test_step_lengths_are_measured_again_on_a_new_support() -> None:
    problem, _, start = CASES["lasso"]
    estimator = ActiveSet(Implicit(linear=bilevel.Neumann(terms=2000), truncate=True))
    oracles, x, y = open_oracles(problem, number(-0.2), start)
    state = estimator.init(oracles, x, y)
    for log_alpha in (-0.2, -3.0):
        x = number(log_alpha)
        y = TIGHT.solve_lower(oracles, x, y).y
        found, state = estimator.estimate(oracles, x, y, state)
        exact, _ = EXACT.estimate(oracles, x, y, EXACT.init(oracles, x, y))
        torch.testing.assert_close(found.gradient, exact.gradient, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "linear", [bilevel.Nystrom(rank=3, damping=1e-3), bilevel.MFAC(gradients=5), bilevel.Identity()]
)
def test_every_linear_solver_works_on_the_face(linear: bilevel.LinearSolver) -> None:
    problem, x, start = CASES["lasso"]
    if isinstance(linear, bilevel.MFAC):
        data = bilevel.Full((A, T))
        problem = replace(problem, lower=lambda x, y, b: (b[0] @ y - b[1]).square().mean() / 2, lower_data=data)
    y = solved(problem, x, start)
    assert (y == 0).any()
    h = hypergradient(problem, x, y, estimator=ActiveSet(Implicit(linear=linear, truncate=True)), certify=False)
    assert bool(h.gradient.isfinite())


def test_polish_takes_one_newton_step_on_the_face() -> None:
    problem, x, start = CASES["sparse_logistic"]
    rough = solved(problem, x, start, SparseDescent(lower=ProximalGradient(tol=1e-4)))
    exact = hypergradient(problem, x, solved(problem, x, start), estimator=EXACT)
    errors = []
    for polish in (False, True):
        estimator = ActiveSet(Implicit(linear=Dense(), polish=polish, check=CG(tol=1e-10, max_steps=50)))
        found = hypergradient(problem, x, rough, estimator=estimator)
        errors.append(float((found.gradient - exact.gradient).abs()))
        assert found.certificate.error_estimate is not None
        assert errors[-1] <= float(found.certificate.error_estimate)
    assert errors[1] < 1e-2 * errors[0]


def test_the_singular_lasso_is_refused() -> None:
    """More free entries than examples: H_SS is singular, and the hypergradient not unique."""
    a, t = draw(3, 8), draw(3, seed=1)
    problem = Problem(
        upper=lambda x, y, b: y.sum(), lower=lambda x, y, b: (a @ y - t).square().mean() / 2,
        regularizer=L1(lambda x: x.exp()),
    )  # fmt: skip
    with pytest.raises(bilevel.LinearSolveFailed) as caught:
        hypergradient(problem, number(-2.0), torch.ones(8, dtype=torch.float64), estimator=EXACT)
    assert caught.value.status is bilevel.Status.SINGULAR


def test_parts_it_cannot_treat_are_refused() -> None:
    _, x, start = CASES["lasso"]
    parts: list[tuple[dict[str, Any], str]] = [
        ({"constraint": lambda x, y, b: y - 1}, "ImplicitKKT"),
        ({"lower_set": Simplex()}, "expected bounds on single entries .* got Simplex"),
        ({"lower_set": Product({"w": Simplex()})}, "for 'w'"),
        ({"lower_set": Box(0, 1), "regularizer": GroupL1(1.0, GROUPS)}, "GroupL1 together with a lower_set"),
    ]
    for part, message in parts:
        nested = "w" in str(message)[:8]
        lower: Callable[..., Tensor] = (lambda x, y, b: squares(x, y["w"], b) * x.exp()) if nested else (
            lambda x, y, b: squares(x, y, b) * x.exp()
        )  # fmt: skip
        problem = Problem(upper=lambda x, y, b: x.square(), lower=lower, **part)
        with pytest.raises(InvalidProblem, match=message):
            hypergradient(problem, x, {"w": start} if nested else start, estimator=ActiveSet())


def test_products_of_boxes_are_boxes() -> None:
    target = torch.tensor([2.0, -3.0], dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, b: y["u"].sum() + y["v"].sum(),
        lower=lambda x, y, b: ((y["u"] - x).square().sum() + (y["v"] - x * target).square().sum()) / 2,
        lower_set=Product({"v": Box(-1, 1)}),
    )
    x = number(0.4)
    y = {"u": x.reshape(1), "v": torch.tensor([0.8, -1.0], dtype=torch.float64)}
    found = hypergradient(problem, x, y, estimator=EXACT)
    assert float(found.gradient) == pytest.approx(1 + 2)


def test_float32() -> None:
    problem, x, start = CASES["sparse_group_lasso"]
    exact = hypergradient(problem, x, solved(problem, x, start), estimator=EXACT)
    a, t, a_val, t_val = (v.float() for v in (A, T, A_VAL, T_VAL))
    single = Problem(
        upper=lambda x, y, b: (a_val @ y - t_val).square().mean() / 2,
        lower=lambda x, y, b: (a @ y - t).square().mean() / 2,
        regularizer=problem.regularizer,
    )
    x32 = [leaf.float() for leaf in x]
    y = solved(single, x32, start.float(), SparseDescent())
    found = hypergradient(single, x32, y, estimator=ActiveSet())
    assert found.gradient[0].dtype == torch.float32
    assert found.certificate.margin is not None
    assert found.certificate.margin.dtype == torch.float32
    torch.testing.assert_close(flat(found.gradient).double(), flat(exact.gradient), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["lasso", "box"])
def test_hypergradient_chooses_it_where_there_are_kinks_or_bounds(name: str) -> None:
    problem, x, start = CASES[name]
    y = solved(problem, x, start)
    chosen = hypergradient(problem, x, y)
    assert torch.equal(chosen.gradient, hypergradient(problem, x, y, estimator=ActiveSet()).gradient)
    assert chosen.certificate.margin is not None
