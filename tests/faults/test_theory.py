"""Faults of the linear solve and of the theory: singular, indefinite, too large, infeasible. One test a row."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import (
    CG,
    GMRES,
    MINRES,
    Dense,
    Implicit,
    InvalidProblem,
    LinearSolveFailed,
    LinearSolver,
    Neumann,
    NormalCG,
    Nystrom,
    NystromPreconditioner,
    Problem,
    Status,
    hypergradient,
)
from bilevel.problems import toys


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def diagonal(*curvatures: float, target: Tensor) -> tuple[Problem, Tensor, Tensor]:
    """Return a problem with H = diag(curvatures), J = -1 and df/dy = y - target; x = 0 and y = 0 solve it below."""
    c = doubles(*curvatures)
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - target).square().sum(),
        lower=lambda x, y, b: 0.5 * (c * y.square()).sum() - (x * y).sum(),
    )
    return problem, torch.zeros(len(c), dtype=torch.float64), torch.zeros(len(c), dtype=torch.float64)


@pytest.mark.parametrize(
    ("linear", "status"),
    [
        (CG(tol=1e-10), Status.CONVERGED),
        (MINRES(tol=1e-10), Status.CONVERGED),
        (Dense(), Status.MINIMUM_NORM),
    ],
    ids=["cg", "minres", "dense"],
)
def test_row_33_singular_with_a_solution_gives_the_least_one(linear: LinearSolver, status: Status) -> None:
    problem, x, y = diagonal(2.0, 4.0, 0.0, target=doubles(1.0, 1.0, 0.0))
    found = hypergradient(problem, x, y, estimator=Implicit(linear=linear))
    torch.testing.assert_close(found.gradient, doubles(-0.5, -0.25, 0.0))
    assert found.certificate.status is status
    assert found.certificate.status.ok


@pytest.mark.parametrize(
    "linear", [CG(), MINRES(max_steps=50), Dense(), GMRES(max_steps=50)], ids=["cg", "minres", "dense", "gmres"]
)
def test_row_34_singular_without_a_solution(linear: LinearSolver) -> None:
    problem, x, y = diagonal(2.0, 4.0, 0.0, target=doubles(1.0, 1.0, 5.0))
    with pytest.raises(LinearSolveFailed, match=r"singular and inconsistent: add damping.*penalty method") as caught:
        hypergradient(problem, x, y, estimator=Implicit(linear=linear))
    assert caught.value.status is Status.SINGULAR


def test_row_34_damping_is_the_advice_that_helps() -> None:
    problem, x, y = diagonal(2.0, 4.0, 0.0, target=doubles(1.0, 1.0, 5.0))
    found = hypergradient(problem, x, y, estimator=Implicit(linear=CG(damping=1.0)), certify=False).gradient
    torch.testing.assert_close(found, doubles(-1 / 3, -1 / 5, -5.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "linear", [CG(), Dense(), CG(preconditioner=NystromPreconditioner(rank=2))], ids=["cg", "dense", "nystrom-cg"]
)
def test_row_35_negative_curvature(linear: LinearSolver) -> None:
    problem, x, y = diagonal(2.0, 4.0, -0.5, target=doubles(1.0, 1.0, 1.0))
    message = (
        r"upper step 0 after \d+ iterations: negative curvature.*MINRES.*curvature between -.* and .*truncate=True"
    )
    with pytest.raises(LinearSolveFailed, match=message) as caught:
        hypergradient(problem, x, y, estimator=Implicit(linear=linear))
    assert caught.value.status is Status.NEGATIVE_CURVATURE


def test_row_35_truncated_on_request_and_flagged() -> None:
    problem, x, y = diagonal(2.0, 4.0, -0.5, target=doubles(1.0, 1.0, 1.0))
    flagged = hypergradient(problem, x, y, estimator=Implicit(truncate=True))
    assert flagged.certificate.status is Status.NEGATIVE_CURVATURE
    assert not flagged.certificate.status.ok
    assert flagged.certificate.error_estimate is not None
    assert torch.isinf(flagged.certificate.error_estimate)
    assert flagged.gradient.norm() > 0


def test_row_35_solve_ends_with_the_status_and_the_last_good_point() -> None:
    problem, x, y = diagonal(2.0, 4.0, -0.5, target=doubles(1.0, 1.0, 1.0))
    solver = bilevel.implicit(lower_steps=0)
    solution = bilevel.solve(problem, solver, x, y, steps=5)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert torch.equal(solution.x, x)


STIFF = [10.0**k for k in range(6)]


def test_row_36_out_of_iterations_is_an_error_where_the_answer_is_worthless() -> None:
    problem, x, y = diagonal(*STIFF, target=doubles(*[1.0] * 6))
    estimator = Implicit(linear=CG(max_steps=1))
    with pytest.raises(LinearSolveFailed, match=r"step limit.*raise max_steps.*relative residual \d") as caught:
        hypergradient(problem, x, y, estimator=estimator)
    assert caught.value.status is Status.STEP_LIMIT


@pytest.mark.parametrize("linear", [CG, MINRES, GMRES, NormalCG])
def test_row_36_out_of_iterations_is_a_status_with_a_residual_and_never_zeros(linear: Any) -> None:
    problem, x, y = diagonal(1.0, 3.0, 10.0, 30.0, target=doubles(1.0, 1.0, 1.0, 1.0))
    estimator = Implicit(linear=linear(max_steps=2, tol=1e-12), truncate=True)
    found = hypergradient(problem, x, y, estimator=estimator)
    assert found.certificate.status is Status.STEP_LIMIT
    assert 1e-12 < float(found.certificate.residual) <= 1
    assert bool((found.gradient != 0).all())
    exact = doubles(1.0, 1 / 3, 0.1, 1 / 30)
    assert found.certificate.error_estimate is not None
    assert float((found.gradient + exact).norm()) <= float(found.certificate.error_estimate)


def test_row_37_diverging_neumann_series_prints_the_curvature() -> None:
    problem, x, y = diagonal(1.0, 3.0, 40.0, target=doubles(1.0, 1.0, 1.0))
    with pytest.raises(LinearSolveFailed, match=r"diverged: lower the step size below 2 / \(largest") as caught:
        hypergradient(problem, x, y, estimator=Implicit(linear=Neumann(terms=1000, alpha=1.0)))
    assert caught.value.status is Status.DIVERGED
    printed = re.search(r"curvature between \S+ and (\S+?)\)", str(caught.value))
    assert printed is not None
    assert float(printed.group(1)) == pytest.approx(40, rel=0.02)
    safe = Implicit(linear=Neumann(terms=1000, alpha=1 / 40, tol=1e-8))
    found = hypergradient(problem, x, y, estimator=safe).gradient
    torch.testing.assert_close(found, doubles(-1.0, -1 / 3, -1 / 40), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "linear", [Nystrom(rank=4), CG(preconditioner=NystromPreconditioner(rank=4))], ids=["solver", "preconditioner"]
)
def test_row_38_rank_beyond_the_dimension(linear: LinearSolver) -> None:
    problem, x, y = diagonal(1.0, 2.0, 3.0, target=doubles(1.0, 1.0, 1.0))
    with pytest.raises(InvalidProblem, match=r"rank 4 exceeds the dimension 3"):
        hypergradient(problem, x, y, estimator=Implicit(linear=linear))


def test_row_38_indefinite_sketch_is_clamped_and_told() -> None:
    problem, x, y = diagonal(4.0, 2.0, -1.0, target=doubles(1.0, 1.0, 1.0))
    linear = Nystrom(rank=3, damping=0.1)
    with pytest.raises(LinearSolveFailed, match="negative curvature"):
        hypergradient(problem, x, y, estimator=Implicit(linear=linear))
    found = hypergradient(problem, x, y, estimator=Implicit(linear=linear, truncate=True), certify=False)
    assert found.certificate.status is Status.NEGATIVE_CURVATURE
    # All curvature it uses is >= 0, so that no entry of w exceeds 1 / damping.
    assert bool((found.gradient.abs() <= 10 + 1e-9).all())
    assert bool(found.gradient.isfinite().all())


@pytest.mark.parametrize(
    "linear",
    [CG(), MINRES(), NormalCG(), GMRES(), Dense(), Neumann(terms=200)],
    ids=lambda linear: type(linear).__name__,
)
@pytest.mark.parametrize("x_shape", [(), (1,)])
@pytest.mark.parametrize("y_shape", [(), (1,), (1, 1)])
def test_row_39_single_numbers(linear: LinearSolver, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - 3).square().sum(), lower=lambda x, y, b: (y - 2 * x.sum()).square().sum()
    )
    x, y = torch.ones(x_shape, dtype=torch.float64), torch.full(y_shape, 2.0, dtype=torch.float64)
    found = hypergradient(problem, x, y, estimator=Implicit(linear=linear)).gradient
    torch.testing.assert_close(found, torch.full(x_shape, -2.0, dtype=torch.float64), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("empty", [torch.zeros(0), {}, [], {"a": torch.zeros(0, 3)}, {"a": {}}], ids=str)
def test_row_40_no_hyperparameters(empty: Any) -> None:
    problem = Problem(upper=lambda x, y, b: y.sum(), lower=lambda x, y, b: y.square().sum())
    with pytest.raises(InvalidProblem, match="no hyperparameters: x has no entries"):
        hypergradient(problem, empty, torch.ones(2))
    with pytest.raises(InvalidProblem, match="no variables: y has no entries"):
        hypergradient(problem, torch.ones(2), empty)


def test_row_40_some_empty_leaves_do_no_harm() -> None:
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square().sum() + x["none"].sum(),
        lower=lambda x, y, b: (y - x["a"]).square().sum(),
    )
    found = hypergradient(problem, {"a": torch.ones(2), "none": torch.zeros(0)}, torch.zeros(2)).gradient
    assert found["none"].shape == (0,)


@pytest.mark.parametrize("size", [10**6, pytest.param(10**7, marks=pytest.mark.slow)])
def test_row_41_huge_x_and_y_need_no_matrix(size: int) -> None:
    """A matrix of x by x would take 4 TB at the smaller size, so that to come back at all is the proof."""
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - 3).square().sum(), lower=lambda x, y, b: 0.5 * (y - x).square().sum()
    )
    x = torch.ones(size)
    found = hypergradient(problem, x, x, certify=False).gradient
    torch.testing.assert_close(found, torch.full((size,), -2.0))


def test_row_41_dense_matrices_are_refused_above_ten_thousand() -> None:
    problem = Problem(upper=lambda x, y, b: y.sum(), lower=lambda x, y, b: 0.5 * (y - x).square().sum())
    start = torch.zeros(10_001)
    with pytest.raises(InvalidProblem, match=r"Dense: d = 10001 > 10000.*use CG"):
        hypergradient(problem, start, start, estimator=Implicit(linear=Dense()))


def test_row_42_lower_level_short_of_its_solution_is_measured() -> None:
    problem = Problem(
        upper=lambda x, y, b: y.pow(4).sum(), lower=lambda x, y, b: (y.exp() - x * y + 0.1 * y.square()).sum()
    )
    x, y = doubles(2.0, 3.0), doubles(0.5, 0.5)
    oracles, flat_x, start = bilevel.dry_run.open_oracles(problem, x, y)
    solution = bilevel.LBFGS(tol=1e-13, max_steps=100).minimize(lambda v: oracles.lower_gradient(flat_x, v), start).y
    exact = hypergradient(problem, x, solution, estimator=Implicit(linear=Dense()))
    near = hypergradient(problem, x, solution + 0.05, estimator=Implicit(linear=Dense()))
    error = float((near.gradient - exact.gradient).norm())
    assert near.certificate.error_estimate is not None
    assert exact.certificate.error_estimate is not None
    assert error <= float(near.certificate.error_estimate) <= 5 * error
    assert float(exact.certificate.error_estimate) < 1e-9
    assert float(near.certificate.lower_gradient_norm) > 1e6 * float(exact.certificate.lower_gradient_norm)


@pytest.mark.parametrize("linear", [CG(), Dense(), MINRES()], ids=["cg", "dense", "minres"])
def test_row_43_several_lower_solutions_that_f_tells_apart(linear: LinearSolver) -> None:
    """g = ‖y1‖² / 2 - x y1 leaves y2 free, and f wants y2 = x: y*(x) is a set, and F has no derivative through it."""
    task = toys.mc()
    solution = bilevel.solve(task.problem, bilevel.implicit(linear=linear), task.x0, task.y0, steps=20)
    assert solution.status is Status.SINGULAR
    assert not solution.status.ok
    assert re.search(r"if the lower level has several solutions, BAMM or MEHA find the one", solution.message)
    with pytest.raises(LinearSolveFailed, match="several solutions"):
        hypergradient(task.problem, task.x0 + 0.5, task.y0, estimator=Implicit(linear=linear))


@pytest.mark.parametrize("solver", [bilevel.BAMM(), bilevel.MEHA()], ids=["BAMM", "MEHA"])
def test_row_43_the_advice_finds_the_best_of_them(solver: bilevel.Solver[Any]) -> None:
    task = toys.mc()
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=500)
    assert task.x_error(solution.x) < 1e-2  # type: ignore[operator]


def test_row_43_several_lower_solutions_that_f_does_not_tell_apart() -> None:
    """Where f does not see what g leaves free F is smooth, and a dense solve says that the system is singular."""
    problem, x, _ = diagonal(2.0, 4.0, 0.0, target=doubles(1.0, 1.0, 0.0))
    both = Problem(upper=lambda x, y, b: problem.upper(x, y, b) - 0.5 * y[2].square(), lower=problem.lower)
    starts = (doubles(0.0, 0.0, 0.0), doubles(0.0, 0.0, 7.0))
    found = [hypergradient(both, x, y, estimator=Implicit(linear=Dense())) for y in starts]
    torch.testing.assert_close(found[0].gradient, found[1].gradient)
    for each in found:
        assert each.certificate.status is Status.MINIMUM_NORM
        assert "others exist" in each.certificate.status.value


def test_row_44_infeasible_start_is_projected() -> None:
    problem = Problem(
        upper=lambda x, y, b: (y - 5).square().sum(),
        lower=lambda x, y, b: 0.5 * (y - x).square().sum(),
        upper_set=bilevel.Box(-1.0, 1.0),
    )
    start = doubles(7.0, -7.0)
    solution = bilevel.solve(problem, bilevel.implicit(), start, doubles(0.0, 0.0), steps=0)
    assert solution.x.tolist() == [1.0, -1.0]
    assert start.tolist() == [7.0, -7.0]


PARTS: dict[str, Any] = {
    "lower_set": bilevel.NonNegative(),
    "constraint": lambda x, y, b: y - 1,
    "equality": lambda x, y, b: y - 1,
    "regularizer": bilevel.ElasticNet(l1=0.1),
}


@pytest.mark.parametrize("part", PARTS)
def test_rows_45_and_47_parts_that_an_implicit_hypergradient_ignores_are_refused(part: str) -> None:
    """Where a constraint is active, the implicit gradient of the unconstrained problem is silently wrong."""
    problem = Problem(
        upper=lambda x, y, b: (y - 5).square().sum(),
        lower=lambda x, y, b: 0.5 * (y - x).square().sum(),
        **{part: PARTS[part]},
    )
    with pytest.raises(InvalidProblem, match="does not handle"):
        bilevel.solve(problem, bilevel.implicit(), doubles(1.0), doubles(1.0))
    with pytest.raises(InvalidProblem, match="does not handle"):
        bilevel.Session(problem, bilevel.implicit(), doubles(1.0), doubles(1.0))
    with pytest.raises(InvalidProblem, match="does not handle"):
        hypergradient(problem, doubles(1.0), doubles(1.0), estimator=bilevel.Implicit())
