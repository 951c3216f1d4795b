"""SparseDescent: what it finds, each of its options, its price, its certificate, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import (
    CG,
    LBFGS,
    MEHA,
    MINRES,
    SGD,
    ActiveSet,
    Adam,
    Box,
    Dense,
    Diverged,
    ElasticNet,
    Full,
    Implicit,
    InvalidProblem,
    NonFinite,
    Problem,
    Shuffled,
    SparseDescent,
    Status,
)  # fmt: skip
from bilevel.dry_run import open_oracles
from bilevel.optimizers.coordinate_descent import CoordinateDescent
from bilevel.optimizers.proximal import PROBES, ProximalGradient
from bilevel.oracles import Counts
from bilevel.problems import Task, toys
from bilevel.regularizers import L1, GroupL1
from bilevel.sets import Simplex
from bilevel.solvers.sparse import SparseState


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


A, A_VAL = draw(40, 12), draw(30, 12, seed=1)
BETA = torch.tensor([2.0, -1.5, 1, 0, 0, 0, 0.7, 0, 0, 0, -1, 0], dtype=torch.float64)
T, T_VAL = A @ BETA + 2 * draw(40, seed=8), A_VAL @ BETA + 2 * draw(30, seed=9)
ZERO = torch.zeros(12, dtype=torch.float64)
BEST, LEAST = -1.7647, 3.0233955
"""x and F at the one minimum of F, to the digits shown: from a grid of lower solutions."""
NEAR = ProximalGradient(tol=1e-13, max_steps=20_000)


def squares(x: Any, y: Tensor, batch: Any) -> Tensor:
    return (batch[0] @ y - batch[1]).square().mean() / 2


def lasso(**parts: Any) -> Problem:
    given: dict[str, Any] = {
        "upper_data": Full((A_VAL, T_VAL)), "lower_data": Full((A, T)), "regularizer": L1(lambda x: x.exp()),
        "upper_set": Box(-6.0, 1.0),
    }  # fmt: skip
    return Problem(upper=squares, lower=squares, **given | parts)


def net(**parts: Any) -> Problem:
    regularizer = ElasticNet(lambda x: x["l1"].exp(), lambda x: x["l2"].exp())
    return lasso(**{"regularizer": regularizer} | parts)


def one_entry(b: float = 2.0) -> Problem:
    """Return the problem whose lower solution is `max(b - x, 0)` for b, x > 0."""
    return Problem(
        upper=lambda x, y, _: (y + 3).square().sum() / 2 + x, lower=lambda x, y, _: (y - b).square().sum() / 2,
        regularizer=L1(lambda x: x),
    )  # fmt: skip


def best_of(problem: Problem, points: Tensor, start: Tensor) -> tuple[float, float]:
    """Return the least F on the points and where it is, each from an accurate lower solve."""
    oracles, _, y = open_oracles(problem, points[0], start)
    solver, found = SparseDescent(lower=NEAR), []
    for point in points:
        y = solver.solve_lower(oracles, point[None], y).y
        found.append((float(oracles.upper_value(point[None], y)), float(point)))
    return min(found)


# -- what it finds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "steps"), [(toys.lasso1, 120), (toys.box, 200)])
def test_defaults_solve_the_toys(make: Callable[[], Task], steps: int) -> None:
    task = make()
    solution = bilevel.solve(task.problem, SparseDescent(), task.x0, task.y0, steps=steps)
    assert solution.status is Status.COMPLETED
    error = task.x_error(solution.x)
    assert error is not None
    assert error < 1e-3
    assert solution.certificate is not None
    assert solution.certificate.error_estimate is not None
    assert float(solution.certificate.error_estimate) < 1e-6


@pytest.mark.slow
def test_it_ends_at_the_best_point_of_a_fine_grid() -> None:
    problem = lasso()
    solution = bilevel.solve(problem, SparseDescent(), number(0.0), ZERO, steps=60)
    value, x = best_of(problem, torch.linspace(1, -6, 71, dtype=torch.float64), ZERO)
    assert solution.best_value <= value * (1 + 1e-9)
    assert abs(float(solution.best_x) - x) < 7 / 70
    assert 0 < int((solution.best_y == 0).sum()) < 12


@pytest.mark.slow
def test_a_first_order_method_approaches_the_same_point() -> None:
    solution, gaps = None, []
    for steps in (400, 1600):
        solution = bilevel.solve(lasso(), MEHA(), number(-1.0), ZERO, steps=steps, resume=solution)
        gaps.append(abs(float(solution.x) - BEST))
    assert solution is not None
    assert solution.counts.hvps == 0
    assert gaps[1] < 0.6 * gaps[0]
    assert gaps[1] < 0.05
    oracles, x, y = open_oracles(lasso(), solution.x, ZERO)
    reached = float(oracles.upper_value(x, SparseDescent(lower=NEAR).solve_lower(oracles, x, y).y))
    assert LEAST - 1e-7 <= reached <= LEAST * (1 + 1e-3)


# -- options -----------------------------------------------------------------------------------------------------------

EXACT = ActiveSet(Implicit(linear=Dense()))
OPTIONS: dict[str, SparseDescent] = {
    "sgd": SparseDescent(upper=SGD(lr=0.3)),
    "proximal": SparseDescent(lower=ProximalGradient(tol=1e-10, max_steps=5000, step=0.1, patience=100)),
    "coordinate_descent": SparseDescent(lower=CoordinateDescent(A, T)),
    "minres": SparseDescent(estimator=ActiveSet(Implicit(linear=MINRES(tol=1e-10, max_steps=50)))),
    "dense": SparseDescent(estimator=EXACT),
    "certified": SparseDescent(certify_every=10),
    "adam": SparseDescent(upper=Adam(lr=0.05)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_change_the_way_and_not_the_end(name: str) -> None:
    solution = bilevel.solve(lasso(), OPTIONS[name], number(-1.2), ZERO, steps=50)
    assert solution.status is Status.COMPLETED
    assert solution.best_value == pytest.approx(LEAST, rel=1e-5)
    assert abs(float(solution.best_x) - BEST) < 5e-3
    estimated = [not math.isnan(value) for value in solution.history["error_estimate"]]
    assert estimated == [name == "certified" and step % 10 == 0 for step in range(50)]


def test_backtracking_shortens_the_upper_steps_alone() -> None:
    short = SparseDescent(upper=SGD(lr=1.0), certify_every=3).backtracked(0.25)
    assert short == SparseDescent(upper=SGD(lr=0.25), certify_every=3)


def test_a_loose_lower_solve_shows_in_the_certificate() -> None:
    steps = (3, 1000)
    found = [
        bilevel.solve(lasso(), SparseDescent(lower=ProximalGradient(max_steps=k)), number(-1.0), ZERO, steps=1)
        for k in steps
    ]
    errors = [solution.history["lower_gradient_norm"][0] for solution in found]
    assert errors[0] > 1e3 * errors[1]
    assert errors[1] < 1e-7


def test_coordinate_descent_and_proximal_gradients_take_the_same_steps() -> None:
    x0 = {"l1": number(-0.5), "l2": number(-1.0)}
    solvers = SparseDescent(lower=CoordinateDescent(A, T, tol=1e-15)), SparseDescent(lower=NEAR)
    one, other = (bilevel.solve(net(), solver, x0, ZERO, steps=15) for solver in solvers)
    for key in x0:
        torch.testing.assert_close(one.x[key], other.x[key], rtol=0, atol=1e-8)
    assert torch.equal(one.y == 0, other.y == 0)
    torch.testing.assert_close(one.y, other.y, rtol=0, atol=1e-8)


# -- cost --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["proximal", "measured", "coordinate_descent"])
def test_a_step_costs_what_the_docstring_says(name: str) -> None:
    """One gradient a proximal step, and one estimate: df/dy, the graph of dg/dy, its products, one cross product."""
    solver = replace(
        OPTIONS["coordinate_descent" if name == "coordinate_descent" else "proximal"],
        estimator=EXACT,
    )
    if name == "measured":
        solver = replace(solver, lower=ProximalGradient())
    oracles, x, y = open_oracles(lasso(), number(-1.0), ZERO)
    state = solver.init(oracles, x, y)
    for _ in range(2):
        before = oracles.counts
        minimum = solver.solve_lower(oracles, state.x, state.y)
        lower, before = oracles.counts - before, oracles.counts
        after = solver.step(oracles, state)
        spent = oracles.counts - before
        assert lower == Counts(gradients=minimum.evaluations)
        if name == "coordinate_descent":
            assert minimum.evaluations == 0
        else:
            probes = PROBES if name == "measured" else 0
            assert minimum.steps + probes <= minimum.evaluations <= minimum.steps + probes + 1
        free = int((minimum.y != 0).sum())
        assert spent - lower == Counts(gradients=2, hvps=free, crosses=1)  # Dense: a product for each free entry
        state = after


# -- the support, the margin and the certificate -----------------------------------------------------------------------


def test_the_state_reports_the_support_of_each_step() -> None:
    solver = SparseDescent(upper=SGD(lr=0.3))
    oracles, x, y = open_oracles(lasso(), number(1.0), ZERO)
    state, supports = solver.init(oracles, x, y), []
    assert state.estimator.free is None
    for _ in range(8):
        state = solver.step(oracles, state)
        assert state.estimator.free is not None
        assert torch.equal(state.estimator.free, state.y != 0)
        supports.append(int(state.estimator.free.sum()))
    assert len(set(supports)) >= 3
    assert supports[0] < supports[-1]


def test_the_solution_carries_the_margin_off_the_support() -> None:
    """An orthonormal design: y = soft(z, e^x), off the support the margin is e^x - |z_j|, on it |y_j| times 1."""
    q, _ = torch.linalg.qr(draw(50, 8))
    a, t, x = q * math.sqrt(50), 0.3 * draw(50, seed=2), number(-3.0)
    z = a.T @ t / 50
    solution = bilevel.solve(
        lasso(lower_data=Full((a, t)), upper_data=Full((A_VAL[:, :8], T_VAL))), SparseDescent(upper=SGD(lr=1e-12)),
        x, torch.zeros(8, dtype=torch.float64), steps=1,
    )  # fmt: skip
    y = z.sign() * (z.abs() - x.exp()).clamp_min(0)
    assert 0 < int((y == 0).sum()) < 8
    torch.testing.assert_close(solution.y, y, rtol=0, atol=1e-7)
    off, on = (x.exp() - z.abs())[y == 0].min(), y.abs()[y != 0].min()
    assert solution.certificate is not None
    torch.testing.assert_close(solution.certificate.margin, torch.minimum(off, on), rtol=1e-5, atol=0)
    assert "margin" in str(solution)


@pytest.mark.parametrize("gap", [-1e-2, -1e-4, 0.0, 1e-4, 1e-2])
def test_a_margin_of_0_is_told_and_the_answer_is_that_of_one_side(gap: float) -> None:
    """F = (y + 3)² / 2 + x with y = max(2 - x, 0): F' = x - 4 below 2 and 1 above."""
    oracles, x, y = open_oracles(one_entry(), number(2.0 + gap), torch.zeros(1, dtype=torch.float64))
    solver = SparseDescent(lower=NEAR)
    estimate = solver.certify(oracles, solver.init(oracles, x, y))
    assert estimate.certificate.margin is not None
    assert float(estimate.certificate.margin) == pytest.approx(abs(gap), rel=1e-6)
    assert ("one-sided" in str(estimate.certificate)) == (gap == 0)
    assert float(estimate.gradient) == pytest.approx(gap - 2 if gap < 0 else 1.0, abs=1e-9)
    assert estimate.certificate.status is Status.CONVERGED


def test_descent_into_a_kink_stays_there_and_says_so() -> None:
    """F falls up to x = 2, where the entry vanishes, and rises beyond: x goes back and forth, its margin shrinks."""
    solver = SparseDescent(upper=SGD(lr=bilevel.Power(0.5, -1.0)))
    margins = []
    for steps in (20, 400):
        solution = bilevel.solve(one_entry(), solver, number(1.0), torch.zeros(1, dtype=torch.float64), steps=steps)
        assert solution.status is Status.COMPLETED
        assert solution.certificate is not None
        margins.append(float(solution.certificate.margin or 0.0))
        gap = abs(float(solution.x) - 2)
        assert margins[-1] == pytest.approx(gap, rel=1e-3, abs=1e-7)
    assert margins[1] < 1e-2


# -- types, resuming, blocks -------------------------------------------------------------------------------------------


def test_float32_keeps_its_type_and_comes_close() -> None:
    data = {"upper_data": Full((A_VAL.float(), T_VAL.float())), "lower_data": Full((A.float(), T.float()))}
    single = bilevel.solve(lasso(**data), SparseDescent(), torch.tensor(-1.5), ZERO.float(), steps=30)
    double = bilevel.solve(lasso(), SparseDescent(), number(-1.5), ZERO, steps=30)
    assert single.status is Status.COMPLETED
    assert single.x.dtype == single.y.dtype == torch.float32
    assert float(single.x) == pytest.approx(float(double.x), abs=1e-3)
    assert torch.equal(single.y == 0, double.y == 0)


@pytest.mark.parametrize("lower", [ProximalGradient(), CoordinateDescent(A, T)], ids=lambda lower: type(lower).__name__)
def test_resuming_is_running_on(lower: Any) -> None:
    solver, x0 = SparseDescent(lower=lower), {"l1": number(0.5), "l2": number(-1.0)}
    whole = bilevel.solve(net(), solver, x0, ZERO, steps=20)
    half = bilevel.solve(net(), solver, x0, ZERO, steps=10)
    both = bilevel.solve(net(), solver, x0, ZERO, steps=10, resume=half)
    assert not torch.equal(half.y == 0, whole.y == 0)
    assert torch.equal(whole.y, both.y)
    for key in x0:
        assert torch.equal(whole.x[key], both.x[key])


def test_blocks_have_supports_of_their_own() -> None:
    folds = A.reshape(2, 20, 12), T.reshape(2, 20)
    problem = lasso(
        lower_data=Full(folds), upper_data=Full(tuple(v.expand(2, *v.shape) for v in (A_VAL, T_VAL))), blocks=2
    )
    solution = bilevel.solve(problem, SparseDescent(), number(-0.5), ZERO.expand(2, 12).clone(), steps=20)
    assert solution.status is Status.COMPLETED
    assert not torch.equal(solution.y[0] == 0, solution.y[1] == 0)
    for i in range(2):
        alone = lasso(lower_data=Full((folds[0][i], folds[1][i])))
        oracles, x, y = open_oracles(alone, solution.best_x, ZERO)
        expected = SparseDescent(lower=NEAR).solve_lower(oracles, x, y).y
        torch.testing.assert_close(solution.best_y[i], expected, rtol=0, atol=1e-6)


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseDescent(upper=LBFGS()), "upper must be an Optimizer"),
        (lambda: SparseDescent(upper=0.1), "upper must be an Optimizer"),
        (lambda: SparseDescent(lower=SGD(lr=0.1)), "lower must be a ProximalGradient"),
        (lambda: SparseDescent(estimator=Implicit(linear=CG())), "estimator must be an ActiveSet"),
    ],
)
def test_unusable_options_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        make()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"constraint": lambda x, y, b: y - 1}, "does not handle"),
        ({"equality": lambda x, y, b: y[:1] - 1}, "does not handle"),
        ({"lower_set": Simplex()}, "expected bounds on single entries"),
        (
            {"regularizer": GroupL1(lambda x: x.exp(), torch.arange(12) // 3), "lower_set": Box(0, 1)},
            "GroupL1 together",
        ),
    ],
)
def test_parts_it_cannot_treat_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        bilevel.solve(lasso(**parts), SparseDescent(), number(-1.0), ZERO, steps=1)


GROUPED = GroupL1(lambda x: x.exp(), torch.arange(12) // 3)


@pytest.mark.parametrize(
    ("parts", "descent", "message"),
    [
        ({"regularizer": GROUPED}, CoordinateDescent(A, T), "declared L1 or ElasticNet"),
        ({"lower_set": Box(-1, 1)}, CoordinateDescent(A, T), "without lower_set"),
        ({"lower_data": Shuffled((A, T), batch_size=8)}, CoordinateDescent(A, T), "use ProximalGradient"),
        ({}, CoordinateDescent(A[:, :5], T), r"as many columns as y has entries \(12\)"),
        ({}, CoordinateDescent(A, T + 1), "gradients at a random point differ by"),
        ({}, CoordinateDescent(A[:39], T[:39]), "gradients at a random point differ by"),
        ({}, CoordinateDescent(2 * A, T), "Give it the same data"),
    ],
)
def test_coordinate_descent_must_solve_the_problem_stated(
    parts: dict[str, Any], descent: CoordinateDescent, message: str
) -> None:
    with pytest.raises(InvalidProblem, match=message):
        bilevel.solve(lasso(**parts), SparseDescent(lower=descent), number(-1.0), ZERO, steps=1)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [(-1.0, Diverged, "at upper step 7 and may be unbounded"), (torch.inf, NonFinite, "not finite at upper step 7")],
)
def test_a_lower_level_without_a_minimum_is_told(x: float, error: type[Exception], message: str) -> None:
    problem = Problem(
        upper=lambda x, y, b: (y - x).square().sum(), lower=lambda x, y, b: x * y.square().sum(), regularizer=L1(0.1)
    )
    oracles, _, y = open_oracles(problem, number(1.0), torch.ones(2, dtype=torch.float64))
    with pytest.raises(error, match=message):
        SparseDescent().solve_lower(oracles, number(x)[None], y, 7)


def test_states_are_named_tuples_of_plain_parts() -> None:
    oracles, x, y = open_oracles(lasso(), number(-1.0), ZERO)
    state = SparseDescent().init(oracles, x, y)
    assert isinstance(state, SparseState)
    assert state.step == 0
    assert state.metrics is None
