"""Pictures hold the numbers that they claim to show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bilevel
from bilevel import InvalidProblem, plots

TASK = bilevel.problems.quadratic()


@pytest.fixture(scope="module")
def solution() -> bilevel.Solution:
    solver = bilevel.HypergradientDescent(certify_every=4)
    return bilevel.solve(TASK.problem, solver, TASK.x0, TASK.y0, steps=9)


def test_history(solution: bilevel.Solution, tmp_path: Path) -> None:
    ax = plots.plot_history(solution)
    value, best = ax.get_lines()
    assert list(value.get_ydata()) == solution.history["upper_value"]
    assert list(best.get_ydata()) == sorted(best.get_ydata(), reverse=True)
    ax.figure.savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 1000
    again = plots.plot_history(solution, ax, column="residual", label="linear")
    assert again is ax
    assert [line.get_label() for line in ax.get_lines()][-1] == "linear"


def test_cost(solution: bilevel.Solution) -> None:
    ax = plots.plot_cost({"a": solution, "b": solution}, column="stationarity")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    row = list(solution.history)[-1]
    assert ax.get_lines()[0].get_xdata()[-1] == row["gradients"] + row["hvps"] + row["crosses"]
    seconds = plots.plot_cost(solution, against="seconds").get_lines()[0].get_xdata()
    assert list(seconds) == solution.history["seconds"]
    with pytest.raises(InvalidProblem, match="'calls' or 'seconds'"):
        plots.plot_cost(solution, against="steps")


def test_hypergradient_error(solution: bilevel.Solution) -> None:
    ax = plots.plot_hypergradient_error(solution)
    _, errors = ax.get_lines()
    assert list(errors.get_xdata()) == [1, 5, 9, 10]
    assert ax.get_yscale() == "log"


def test_hyperparameters(solution: bilevel.Solution) -> None:
    lines = plots.plot_hyperparameters(solution).get_lines()
    assert len(lines) == 4
    assert lines[2].get_ydata()[-1] == float(solution.history.xs[-1][2])
    many = bilevel.problems.quadratic(p=300)
    big = bilevel.solve(many.problem, bilevel.implicit(), many.x0, many.y0, steps=1)
    with pytest.raises(InvalidProblem, match="at most 256"):
        plots.plot_hyperparameters(big)


def test_unknown_column_is_named(solution: bilevel.Solution) -> None:
    with pytest.raises(InvalidProblem, match="no column 'loss'; there are step"):
        plots.plot_history(solution, column="loss")


def test_drawing_changes_nothing(solution: bilevel.Solution) -> None:
    before = [row["upper_value"] for row in solution.history]
    kept = [x.clone() for x in solution.history.xs]
    plots.plot_hyperparameters(solution)
    plots.plot_history(solution)
    assert before == [row["upper_value"] for row in solution.history]
    assert all(torch.equal(a, b) for a, b in zip(kept, solution.history.xs, strict=True))
