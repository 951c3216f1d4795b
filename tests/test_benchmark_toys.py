"""The benchmark of the toys: its rows, its refusals, and how a method is added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import toys
from bilevel import solvers

MERELY_CONVEX = {"BAMM": "solved", "BDA": "solved", "BAMM, mu = 0": "missed", "BDA, mu = 0": "missed"}


def test_rows_and_refusals_that_name_an_able_solver(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    toys.main(["--json", str(file), "--problems", "sc", "ineq", "lasso1", "--methods", "BAMM, mu = 0"])
    rows = {row["problem"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["sc"]["status"] == "solved"
    assert set(toys.COLUMNS) <= rows["sc"].keys()
    assert rows["sc"]["error"] < 1e-8
    assert rows["sc"]["hvps"] == 2 * rows["sc"]["iterations"]
    assert rows["ineq"]["status"] == rows["lasso1"]["status"] == "refused"
    assert "LVHBA" in rows["ineq"]["message"]
    assert "MEHA" in rows["lasso1"]["message"]


def test_a_method_is_a_line_and_failures_are_rows() -> None:
    methods = {
        "short": {toys.ELSE: toys.Run(solvers.BAMM(mu=0.0), 2), "sc": toys.Run(solvers.BAMM(mu=0.0), 3)},
        "too long": {toys.ELSE: toys.Run(solvers.BAMM(mu=0.0, upper_lr=1e3), 500)},
    }
    rows = toys.rows(["sc", "quadratic"], methods)
    assert [row.get("iterations") for row in rows if row["method"] == "short"] == [3, 2]
    assert [row["status"] for row in rows] == ["missed", "diverged", "missed", "diverged"]


def test_every_solver_has_a_line() -> None:
    kinds = {type(run.solver) for settings in toys.METHODS.values() for run in settings.values()}
    exported = {getattr(solvers, name) for name in solvers.__all__ if isinstance(getattr(solvers, name), type)}
    assert exported <= kinds
    assert all(toys.ELSE in settings for settings in toys.METHODS.values())


@pytest.mark.slow
def test_who_solves_the_merely_convex_toy() -> None:
    rows = toys.rows(["mc"], {name: toys.METHODS[name] for name in MERELY_CONVEX})
    assert {row["method"]: row["status"] for row in rows} == MERELY_CONVEX
