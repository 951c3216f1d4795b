"""check: right hypergradients pass on every kind of lower level, wrong ones do not, and faults become a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import Problem, Verdict, check, cli, problems
from bilevel.problems import Task

DOUBLE = torch.float64


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def quadratic(**fields: Any) -> Problem:
    given: dict[str, Any] = {
        "upper": lambda x, y, batch: (y - 3.0).square().sum() / 2,
        "lower": lambda x, y, batch: (y - 2.0 * x).square().sum(),
    }
    return Problem(**(given | fields))


@pytest.mark.parametrize("name", ["scalar", "quadratic", "imaml_quadratic", "box", "ineq", "mc", "mci", "shen"])
def test_ready_problems_are_right(name: str) -> None:
    task = getattr(problems, name)()
    report = check(task.problem, task.x0, task.y0)
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ridge", "logistic_regression", "hyper_cleaning", "elastic_net", "sparse_group", "svm"]
)
def test_ready_problems_on_real_data_are_right(name: str) -> None:
    task = getattr(problems, name)()
    report = check(task.problem, task.x0, task.y0)
    assert report.ok, report


def test_the_figures_are_those_of_the_closed_form() -> None:
    report = check(quadratic(), double(1.0, 0.5), double(0.0, 0.0))
    h = 2 * (2 * double(1.0, 0.5) - 3)  # dF/dx = a (a x - t)
    assert report.gradient_norm == pytest.approx(float(h.norm()), rel=1e-10)
    assert report.direct_norm == 0
    assert report.slope == pytest.approx(report.differences[1], rel=1e-7)
    assert report.steps[0] > report.steps[1] > 0
    assert report.way == "double_backward"
    assert report.certificate is not None
    assert report.certificate.curvature is not None
    assert float(report.certificate.curvature[0]) == pytest.approx(2.0)
    assert report.lower is not None
    torch.testing.assert_close(report.lower.y, double(2.0, 1.0))
    text = str(report)
    for word in ("dry run", "passed", "curvature seen", "slope", "bit for bit", "verdict"):
        assert word in text


class Bent(torch.autograd.Function):
    """y^2 / 2 with half its gradient in x hidden, as a wrong backward would have it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(y, x)
        return (y - x).square().sum() / 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        y, x = ctx.saved_tensors
        return gradients[0] * (y - x), gradients[0] * (x - y) / 2


def test_a_wrong_first_derivative_is_found() -> None:
    # The gradient in x of the upper objective is half of what it should be: nothing at the door can see that.
    problem = quadratic(upper=lambda x, y, batch: Bent.apply(y, x) + 0 * x.sum())  # type: ignore[no-untyped-call]
    report = check(problem, double(1.0, 0.5), double(0.0, 0.0))
    assert report.verdict is Verdict.WRONG
    assert not report.ok
    assert "check_second_order" in report.message


def test_several_lower_solutions_are_not_called_right() -> None:
    def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return (y[0] + y[1] - x.sum()).square()

    problem = Problem(upper=lambda x, y, batch: y[0].square() + (y[1] - 1).square(), lower=lower)
    report = check(problem, double(1.0), double(0.3, 0.0))
    assert isinstance(report.error, bilevel.LinearSolveFailed)
    assert not report.ok


def test_what_the_door_refuses_is_a_report() -> None:
    report = check(quadratic(lower=lambda x, y, batch: y.square().sum()), double(1.0), double(0.0))
    assert isinstance(report.error, bilevel.UnusedHyperparameter)
    report = check(quadratic(upper=lambda x, y, batch: y), double(1.0, 2.0), double(0.0, 0.0))
    assert isinstance(report.error, bilevel.InvalidProblem)
    assert report.verdict is Verdict.MISSING
    assert "dry run" in str(report)
    assert "failed" in str(report)
    assert "not one number" in str(report)


def test_a_lower_level_without_a_solution_is_a_report() -> None:
    concave = quadratic(lower=lambda x, y, batch: x.sum() * y.sum() - y.square().sum())
    report = check(concave, double(1.0), double(0.0))
    assert report.verdict is Verdict.MISSING
    assert isinstance(report.error, bilevel.Diverged)
    assert "unbounded" in str(report)


def test_a_lower_level_that_is_not_solved_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.lower_level.minimizers.LBFGS_STEPS", 3)
    bent = quadratic(lower=lambda x, y, batch: ((y - x).exp() - y).sum() + (y[0] * y[1] - x.sum()).square())
    report = check(bent, double(1.0, 0.5), double(4.0, -3.0))
    assert report.verdict is Verdict.UNDECIDED
    assert "not solved after 3 steps" in report.message


def test_a_linear_solve_that_fails_is_a_report() -> None:
    # At its minimum this lower objective has no curvature.
    flat = quadratic(lower=lambda x, y, batch: (y - x).pow(4).sum())
    report = check(flat, double(1.0), double(0.0))
    assert isinstance(report.error, bilevel.LinearSolveFailed)
    assert not report.ok


def test_warnings_of_the_door_become_notes() -> None:
    rounded = quadratic(
        upper=lambda x, y, batch: (y - 3.0).square().sum() + x["soft"].sum() + x["hard"].round().sum(),
        lower=lambda x, y, batch: (y - x["soft"]).square().sum(),
    )
    report = check(rounded, {"soft": double(1.0), "hard": double(0.2)}, double(0.0))
    assert any("gradient is zero" in note for note in report.notes)
    assert "warning" in str(report)


def test_a_kink_of_F_is_undecided() -> None:
    task = problems.lasso1()
    report = check(task.problem, task.x0, task.y0)
    assert report.verdict is Verdict.UNDECIDED
    assert "kink" in report.message


def test_an_inaccurate_estimator_is_told_by_its_own_error() -> None:
    task = problems.quadratic()
    rough = bilevel.Implicit(linear=bilevel.Neumann(terms=0), truncate=True)
    report = check(task.problem, task.x0, task.y0, estimator=rough)
    assert report.verdict is Verdict.UNDECIDED
    assert "by its own estimate" in report.message


def test_estimators_that_train_are_checked_on_their_own_training() -> None:
    task = problems.quadratic()
    report = check(task.problem, task.x0, task.y0, estimator=bilevel.Unrolled(steps=3, restart=True))
    assert report.ok, report
    assert report.lower is None
    half = bilevel.Unrolled(steps=6, truncate=1, restart=True)
    assert check(task.problem, task.x0, task.y0, estimator=half).verdict is not Verdict.RIGHT


def test_both_ends_stay_in_the_upper_set() -> None:
    seen: list[float] = []

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        seen.append(float(x.detach().min()))
        return (y - 3.0).square().sum() + x.sqrt().sum()

    report = check(quadratic(upper=upper, upper_set=bilevel.Box(0.5, 9.0)), double(0.5, 2.0), double(0.0, 0.0))
    assert min(seen) >= 0.5
    assert report.verdict is not Verdict.WRONG


def test_random_state_and_variables_are_untouched() -> None:
    x, y, random = double(1.0, 2.0), double(0.0, 0.0), torch.get_rng_state()
    check(quadratic(), x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, double(1.0, 2.0))
    assert torch.equal(y, double(0.0, 0.0))


def test_blocks_and_float32() -> None:
    targets = torch.tensor([1.0, 3.0])
    problem = Problem(
        upper=lambda x, y, t: 0.5 * (y - t).square(), lower=lambda x, y, t: (y - x * t).square(),
        upper_data=bilevel.Full(targets), lower_data=bilevel.Full(targets), blocks=2,
    )  # fmt: skip
    assert check(problem, torch.tensor(0.5), torch.zeros(2)).ok


def wrong_task() -> Task:
    wrong = quadratic(upper=lambda x, y, batch: Bent.apply(y, x))  # type: ignore[no-untyped-call]
    return replace(problems.scalar(), problem=wrong, x0=double(1.0), y0=double(0.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learning-rates", "robustness-audit"])
def test_the_command_takes_the_estimator_of_a_task_that_trains(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", name]) == 0
    assert "verdict" in capsys.readouterr().out


def test_a_measured_step_length_is_kept_between_the_differences() -> None:
    # The curvature of the lower level depends on x, and with it what SGD(lr=None) measures at its start.
    problem = Problem(
        upper=lambda x, y, batch: (y - 1).square().sum(), lower=lambda x, y, batch: (x.exp() * (y - 2).square()).sum()
    )
    report = check(problem, double(0.3, -0.5), double(0.0, 0.0), estimator=bilevel.Unrolled(steps=3, restart=True))
    assert report.ok, report


@pytest.mark.parametrize(("name", "code"), [("scalar", 0), ("lasso1", 1)])
def test_the_command(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", name]) == code
    assert "verdict" in capsys.readouterr().out


def test_the_command_on_a_task_of_the_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert cli.main(["check", "test_problem:wrong_task"]) == 1
    assert "wrong" in capsys.readouterr().out
