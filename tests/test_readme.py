"""The README says what is so: its programs run, its tables are the library's, its command lines work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilevel import linear, solvers
from bilevel.cli import main

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]\d+)?")


def table(header: str) -> list[dict[str, str]]:
    """Return the rows of the table whose first column has this header."""
    lines = TEXT.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    names = [cell.strip() for cell in lines[start].strip("|").split("|")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)))
    return rows


@pytest.mark.slow
def test_programs_run(run_page: Callable[[Path], dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page(README)
    printed = capsys.readouterr().out.splitlines()
    shown = next(block for block in re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL) if "certificate" not in block
                 and block.startswith("completed")).splitlines()  # fmt: skip
    # Last digits differ between processors; words do not.
    assert [NUMBER.sub("#", line) for line in printed[:3]] == [NUMBER.sub("#", line) for line in shown]
    best = [float(re.search(r"best upper value ([\d.]+)", line).group(1)) for line in (printed[1], shown[1])]  # type: ignore[union-attr]
    assert best[0] == pytest.approx(best[1], abs=1e-4)
    weights, wrong = names["weights"], names["wrong"]
    assert weights[wrong].mean() < 0.25
    assert weights[~wrong].mean() > 0.7


def test_first_program_fits_on_the_first_screen() -> None:
    first = TEXT.index("```python")
    end = TEXT.index("```\n", first + 3)
    assert TEXT.count("\n", 0, end) <= 40
    assert TEXT[first:end].count("\n") <= 14


def test_solver_table_is_the_library() -> None:
    rows = {row["Solver"].strip("`"): row for row in table("Solver")}
    assert set(rows) == set(solvers.__all__)
    for name, row in rows.items():
        solver = getattr(solvers, name)()
        assert row["HVPs"] == ("yes" if solver.needs_hvp else "no"), name
        handled = {
            "sets": solver.handles_lower_set,
            "c(x, y) <= 0": solver.handles_constraints,
            "kinks": solver.handles_nonsmooth,
        }
        assert row["Lower constraints, kinks"] == (", ".join(k for k, able in handled.items() if able) or "no"), name


def test_years_are_those_of_the_docstrings() -> None:
    for row in table("Solver"):
        assert row["Year"] in (getattr(solvers, row["Solver"].strip("`")).__doc__ or "")


def test_linear_solver_table_is_the_library() -> None:
    named = {name for row in table("Linear solver") for name in re.findall(r"`(\w+)`", row["Linear solver"])}
    kinds = {name: getattr(linear, name) for name in linear.__all__}
    known = {
        name
        for name, kind in kinds.items()
        if isinstance(kind, type) and issubclass(kind, linear.LinearSolver) and kind is not linear.LinearSolver
    }
    assert named == known


@pytest.mark.slow
def test_command_lines_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        line for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL) for line in block.strip().splitlines()
    ]
    assert len(lines) >= 3
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "bilevel"
        assert main(arguments) == 0, line


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert target.startswith("https://") or (README.parent / target).exists(), target
