"""The loop: budgets, tolerance, callbacks, failures, and that nothing good is lost."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import (
    SGD,
    BilevelError,
    CSVLogger,
    EarlyStopping,
    Event,
    InvalidProblem,
    NonFinite,
    Problem,
    SolveFailed,
    Status,
    implicit,
    solve,
)

TASK = bilevel.problems.quadratic()


def run(**options: Any) -> bilevel.Solution:
    return solve(TASK.problem, implicit(), TASK.x0, TASK.y0, **{"steps": 20, **options})


def poisoned(bad: Any, upper: bool = True) -> Problem:
    """Return the scalar problem with an objective that is nan where `bad(x)`."""
    task = bilevel.problems.scalar()

    def spoil(objective: Any) -> Any:
        return lambda x, y, b: objective(x, y, b) + torch.where(bad(x), math.nan, 0.0) * y

    name = "upper" if upper else "lower"
    return replace(task.problem, **{name: spoil(getattr(task.problem, name))})


def test_tolerance_ends_it_as_converged() -> None:
    solver = implicit(linear=bilevel.CG(tol=1e-8))
    solution = solve(TASK.problem, solver, TASK.x0, TASK.y0, steps=1000, tol=1e-3)
    assert solution.status is Status.CONVERGED
    assert solution.history["stationarity"][-1] <= 1e-3 < solution.history["stationarity"][-2]
    assert "stationarity" in solution.message


def test_tolerance_finer_than_the_hypergradient_is_told() -> None:
    solver = implicit(linear=bilevel.CG(damping=1.0))
    with pytest.warns(bilevel.HypergradientInaccurate, match="its own error is estimated at"):
        solution = solve(TASK.problem, solver, TASK.x0, TASK.y0, steps=1000, tol=1e-3)
    assert solution.status is Status.CONVERGED


def test_missed_tolerance_is_a_step_limit_that_throw_raises() -> None:
    assert run(tol=1e-9).status is Status.STEP_LIMIT
    with pytest.raises(SolveFailed, match="step_limit") as caught:
        run(tol=1e-9, throw=True)
    x, _ = caught.value.last_good
    assert torch.equal(x, run().x)


def test_without_tolerance_all_steps_are_made() -> None:
    solution = run()
    assert solution.status is Status.COMPLETED
    assert len(solution.history) == 20
    assert solution.state.step == 20


def test_no_steps_give_the_start_back() -> None:
    solution = run(steps=0)
    assert torch.equal(solution.x, TASK.x0)
    assert solution.certificate is None
    assert math.isnan(solution.best_value)


def test_budgets() -> None:
    spent = run(steps=1000, max_gradients=200)
    assert spent.status is Status.BUDGET_SPENT
    row = list(spent.history)[-1]
    assert 200 < row["gradients"] + row["hvps"] + row["crosses"] < 400
    late = run(steps=1000, max_seconds=0.0)
    assert late.status is Status.TIME_LIMIT
    assert len(late.history) == 1


def test_callbacks_see_each_step_and_may_stop() -> None:
    seen: list[Event] = []

    def watch(event: Event) -> bool:
        seen.append(event)
        return event.step == 7

    solution = run(callbacks=[watch, lambda event: None])
    assert solution.status is Status.STOPPED
    assert [event.step for event in seen] == list(range(1, 8))
    assert torch.equal(seen[-1].x, solution.x)
    assert seen[-1].row["upper_value"] == solution.history["upper_value"][-1]


def test_early_stopping() -> None:
    stop = EarlyStopping(patience=3, monitor=lambda event: 1.0 if event.step > 2 else -float(event.step), min_delta=0.5)
    assert len(run(callbacks=[stop]).history) == 5
    with pytest.raises(InvalidProblem, match="patience"):
        EarlyStopping(patience=0)


def test_csv_has_a_row_a_step(tmp_path: Path) -> None:
    """Each step appends one line: a peer rewrote its whole log at every step."""
    path = tmp_path / "log.csv"
    sizes: list[int] = []
    log = CSVLogger(path)
    solution = run(callbacks=[log, lambda event: sizes.append(path.stat().st_size)])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["upper_value"]) for row in rows] == solution.history["upper_value"]
    run(callbacks=[log])
    assert len(path.read_text().splitlines()) == 21
    growth = [after - before for before, after in pairwise(sizes)]
    assert max(growth) < 2 * min(growth)


def test_history_becomes_a_dataframe() -> None:
    solution = run()
    frame = solution.to_dataframe()
    assert list(frame.columns) == list(solution.history.columns)
    assert len(frame) == 20
    assert bool((frame["gradients"].diff()[1:] > 0).all())
    assert "20 steps" in str(solution)
    assert len(solution.history.xs) == 20


def test_best_is_kept_where_the_end_is_worse() -> None:
    solver = bilevel.HypergradientDescent(upper=SGD(lr=2.1))
    task = bilevel.problems.scalar(a=1.0)
    solution = solve(task.problem, solver, task.x0, task.y0, steps=10)
    assert solution.best_value == pytest.approx(min(solution.history["upper_value"]))
    assert solution.best_value == pytest.approx(4.5)
    assert abs(float(solution.x) - 3.0) > abs(float(solution.best_x) - 3.0)
    assert float(solution.best_x) == 0.0


def test_last_x_counts_among_the_best() -> None:
    solution = run(steps=3)
    assert solution.best_value < min(solution.history["upper_value"])
    assert torch.equal(solution.best_x, solution.x)


@pytest.mark.parametrize("upper", [True, False])
def test_nan_raises_with_the_last_good_point(upper: bool) -> None:
    problem = poisoned(lambda x: x > 0.5, upper)
    with pytest.raises(NonFinite, match=r"(upper objective|lower objective).*upper step") as caught:
        solve(problem, implicit(), torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    x, y = caught.value.last_good
    assert 0 < float(x) <= 0.5
    assert math.isfinite(y)


def test_nan_hypergradient_is_never_clipped_into_all_entries() -> None:
    """One nan under norm clipping would make every entry nan, or, replaced by 0, pass for convergence."""
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square().sum() + (x - x.detach()).abs().sqrt().sum() * 0.0,
        lower=lambda x, y, b: (y - x).square().sum(),
    )
    with pytest.raises(NonFinite, match="not finite at step 0"):
        solve(problem, implicit(clip_norm=1.0), torch.ones(3), torch.zeros(3))


def test_clipping_shortens_steps() -> None:
    solver = bilevel.HypergradientDescent(upper=SGD(lr=1.0), clip_norm=0.25)
    solution = solve(TASK.problem, solver, TASK.x0, TASK.y0, steps=1)
    torch.testing.assert_close(solution.x.norm(), torch.tensor(0.25, dtype=torch.float64))
    with pytest.raises(InvalidProblem, match="clip_norm"):
        implicit(clip_norm=-1.0)


def test_backtracking_stays_where_the_objective_is_finite() -> None:
    problem = poisoned(lambda x: x > 2.05)
    solver = bilevel.HypergradientDescent(upper=SGD(lr=1.2))
    start = torch.zeros((), dtype=torch.float64)
    with pytest.raises(NonFinite):
        solve(problem, solver, start, start, steps=30)
    solution = solve(problem, solver, start, start, steps=30, on_nonfinite="backtrack")
    assert solution.status is Status.COMPLETED
    assert float(solution.x) == pytest.approx(2.0, abs=1e-3)
    assert solution.history["step"] == list(range(1, 31))


def test_backtracking_that_never_helps_ends_stalled() -> None:
    problem = poisoned(lambda x: x != 0.0)
    start = torch.zeros((), dtype=torch.float64)
    solution = solve(problem, implicit(), start, start, steps=5, on_nonfinite="backtrack")
    assert solution.status is Status.STALLED
    assert "10 halvings" in solution.message
    assert math.isfinite(solution.x)
    assert float(solution.best_x) == 0.0


def test_upper_step_that_runs_away_is_shortened() -> None:
    solver = bilevel.HypergradientDescent(upper=SGD(lr=10.0))
    start = torch.zeros((), dtype=torch.float64)
    solution = solve(bilevel.problems.scalar().problem, solver, start, start, steps=60, on_nonfinite="backtrack")
    assert float(solution.x) == pytest.approx(2.0, abs=1e-3)


def test_skipping_leaves_x_alone_and_sees_the_next_batch() -> None:
    batches = torch.tensor([1.0, math.nan, 3.0, 5.0], dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, b: (y - b[0].mean()).square(),
        lower=lambda x, y, b: (y - x).square(),
        upper_data=bilevel.Loader([(batches[i : i + 1],) for i in range(4)]),
    )
    start = torch.zeros((), dtype=torch.float64)
    solution = solve(problem, implicit(), start, start, steps=4, on_nonfinite="skip")
    assert solution.status is Status.COMPLETED
    assert solution.history["step"] == [1, 3, 4]
    assert math.isfinite(solution.x)


def test_diverging_lower_level_ends_it_with_advice() -> None:
    solver = bilevel.HypergradientDescent(lower=SGD(lr=10.0))
    solution = solve(TASK.problem, solver, TASK.x0, TASK.y0 + 1.0, steps=5)
    assert solution.status is Status.DIVERGED
    assert "lower lr by 0.1" in solution.message
    assert torch.equal(solution.x, TASK.x0)


def test_unbounded_lower_level_is_told() -> None:
    problem = Problem(upper=lambda x, y, b: (y - x).square(), lower=lambda x, y, b: x * y - 1e-9 * y.square())
    solution = solve(problem, implicit(), torch.tensor(1.0), torch.tensor(0.0), steps=3)
    assert solution.status is Status.DIVERGED
    assert "unbounded" in solution.message


def test_failed_linear_solve_is_a_status_with_the_last_good_point() -> None:
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square().sum(),
        lower=lambda x, y, b: (y.square() - 1).square().sum() + (x * y).sum(),
    )
    solution = solve(problem, implicit(lower_steps=0), torch.zeros(3), torch.zeros(3), steps=5)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert "MINRES" in solution.message
    assert not solution.x.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps and tol"),
        ({"tol": -1.0}, "steps and tol"),
        ({"tol": math.nan}, "steps and tol"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        run(**options)


def test_a_solver_must_be_a_solver() -> None:
    with pytest.raises(InvalidProblem, match="Call it"):
        solve(TASK.problem, implicit, TASK.x0, TASK.y0)  # type: ignore[arg-type]
    with pytest.raises(InvalidProblem, match="expected a Solver"):
        solve(TASK.problem, "implicit", TASK.x0, TASK.y0)  # type: ignore[arg-type]


def test_resume_refuses_another_shape() -> None:
    small = bilevel.problems.quadratic(p=3)
    other = solve(small.problem, implicit(), small.x0, small.y0, steps=1)
    with pytest.raises(InvalidProblem, match="cannot resume: x"):
        solve(TASK.problem, implicit(), TASK.x0, TASK.y0, resume=other)


def test_missing_lower_start_is_asked_for() -> None:
    with pytest.raises(InvalidProblem, match="pass y0"):
        solve(TASK.problem, implicit(), TASK.x0)
    started = replace(TASK.problem, lower_init=lambda x: torch.zeros(10, dtype=torch.float64))
    assert torch.equal(solve(started, implicit(), TASK.x0, steps=3).x, run(steps=3).x)


def test_restarting_the_lower_level() -> None:
    def start(x: Tensor) -> Tensor:
        return torch.zeros(10, dtype=torch.float64)

    problem = replace(TASK.problem, lower_init=start)
    cold = bilevel.HypergradientDescent(lower=SGD(lr=None), lower_steps=2, restart_lower=True)
    warm = replace(cold, restart_lower=False)
    gaps = {}
    for name, solver in (("cold", cold), ("warm", warm)):
        solution = solve(problem, solver, TASK.x0, steps=200)
        gaps[name] = solution.history["lower_gradient_norm"][-1]
    assert gaps["warm"] < 1e-2 * gaps["cold"]
    with pytest.raises(InvalidProblem, match="restart_lower=True needs"):
        solve(TASK.problem, cold, TASK.x0, TASK.y0)


def test_certificates_along_the_way() -> None:
    solver = bilevel.HypergradientDescent(certify_every=5)
    history = solve(TASK.problem, solver, TASK.x0, TASK.y0, steps=11).history
    certified = [not math.isnan(value) for value in history["error_estimate"]]
    assert certified == [step % 5 == 0 for step in range(11)]


def test_progress_is_silent_off_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    run()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    run(progress=True)
    assert "20/20" in capfd.readouterr().err


def test_stochastic_lower_level_defaults_to_sgd_and_converges() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(512, 4, generator=generator, dtype=torch.float64) + 2.0
    problem = Problem(
        upper=lambda x, y, b: (y - b[0].mean(0)).square().sum(),
        lower=lambda x, y, b: (y - b[0]).square().mean() + 0.5 * (y - x).square().mean(),
        upper_data=bilevel.Full((data,)),
        lower_data=bilevel.Shuffled((data,), batch_size=64),
    )
    x0 = torch.zeros(4, dtype=torch.float64)
    solution = solve(problem, implicit(lower_steps=5), x0, x0, steps=200)
    assert float((solution.best_x - 2.0).abs().max()) < 0.5
    assert all(math.isfinite(value) for value in solution.history["upper_value"])


def test_errors_are_of_one_family() -> None:
    assert issubclass(NonFinite, BilevelError)
    assert issubclass(NonFinite, FloatingPointError)
    assert issubclass(InvalidProblem, ValueError)
