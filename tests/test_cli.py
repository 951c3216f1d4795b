"""The command line, and the files that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bilevel
from bilevel import InvalidProblem, cli
from bilevel.compare import compare, spread
from bilevel.names import parse_solvers
from bilevel.problems import Task
from bilevel.report import table, write_json


def test_list_names_problems_and_solvers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in (*bilevel.solvers.__all__, *(ready.replace("_", "-") for ready in bilevel.problems.ready)):
        assert name in out


def test_run_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    code = cli.main(["run", "quadratic", "--solver", "neumann(terms=5)", "--steps", "4", "--json", str(file)])
    assert code == 0
    assert "after 4 steps" in capsys.readouterr().out
    document = json.loads(file.read_text())
    (row,) = document["rows"]
    assert row["solver"] == "neumann(terms=5)"
    assert {"problem", "seed", "upper_value", "x_error", "seconds", "gradients", "hvps", "status"} <= set(row)
    assert {"processor", "cores", "torch", "python", "commit"} <= set(document["meta"])


def test_compare_gives_rows_and_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "compare.json"
    arguments = ["compare", "quadratic", "--solvers", "implicit,amigo", "--seeds", "2", "--steps", "3"]
    assert cli.main([*arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["solver"], row["seed"]) for row in rows] == [
        ("implicit", 0),
        ("amigo", 0),
        ("implicit", 1),
        ("amigo", 1),
    ]
    assert "±" in capsys.readouterr().out


def test_a_refusal_is_a_row_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "scalar", "--solvers", "nystrom,implicit", "--steps", "2"]) == 0
    captured = capsys.readouterr()
    assert "InvalidProblem" in captured.out
    assert "completed" in captured.out
    assert "rank" in captured.err


@pytest.mark.parametrize(
    ("problem", "taken"),
    [("scalar", cli.DEFAULTS[0]), ("lasso1", cli.DEFAULTS[1]), ("box", cli.DEFAULTS[1]), ("ineq", cli.DEFAULTS[2])],
)
def test_solvers_that_fit_are_taken_by_default(problem: str, taken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", problem, "--steps", "2"]) == 0
    first = taken.partition(",")[0]
    assert first in capsys.readouterr().out
    assert cli.main(["compare", problem, "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in taken.split(","))


def test_a_problem_that_no_solver_fits_is_refused_with_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = bilevel.problems.ineq()
    both = replace(task, problem=replace(task.problem, regularizer=bilevel.L1(0.1)))
    monkeypatch.setattr(bilevel.problems, "ineq", lambda: both)
    assert cli.main(["run", "ineq"]) == 2
    assert "does not handle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "no problem 'nothing'; there are"),
        (["run", "quadratic", "--solver", "magic"], "no solver 'magic'; there are"),
        (["run", "ridg"], "no problem 'ridg'; did you mean 'ridge'?"),
        (["run", "quadratic", "--solver", "neuman(terms=3)"], "no solver 'neuman'; did you mean 'neumann'?"),
        (["run", "quadratic", "--solver", "implicit(upper=Adm(lr=1))"], "did you mean 'Adam'"),
        (["run", "quadratic", "--solver", "implicit(upper=Adam(1))"], "name each option"),
        (["run", "quadratic", "--solver", "implicit(upper=Adam(speed=1))"], "speed"),
        (["run", "quadratic", "--solver", "implicit(speed=3)"], "speed"),
        (["run", "quadratic", "--solver", "implicit(linear=__import__('os'))"], "cannot read solvers"),
        (["run", "quadratic", "--solver", "implicit,amigo"], "run takes one solver"),
        (["run", "quadratic", "--solver", "implicit("], "cannot read solvers"),
        (["run", "no.such.module:task"], "cannot import problem"),
    ],
)
def test_wrong_calls_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def small_task() -> Task:
    return bilevel.problems.scalar(t=1.0)


def test_a_problem_of_the_users(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert cli.main(["run", f"{__name__.rpartition('.')[2]}:small_task", "--steps", "2"]) == 0
    assert "scalar" in capsys.readouterr().out


def test_a_task_may_bring_its_solver(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    solver = bilevel.Metagradient(lower_steps=3)
    monkeypatch.setattr(
        bilevel.problems,
        "trained",
        lambda: replace(bilevel.problems.scalar(), solvers={"trained": solver}),
        raising=False,
    )
    for command in ("run", "compare"):
        assert cli.main([command, "bilevel.problems:trained", "--steps", "2"]) == 0
        assert "trained" in capsys.readouterr().out
    assert cli.main(["run", "bilevel.problems:trained", "--solver", "implicit", "--steps", "2"]) == 0
    assert "implicit" in capsys.readouterr().out


def test_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "bilevel", "list"], capture_output=True, text=True, check=True)
    assert "quadratic" in done.stdout


def test_failed_solve_exits_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def saddle() -> Task:
        problem = bilevel.Problem(upper=lambda x, y, b: (y - 1).square(), lower=lambda x, y, b: x * y - y.square())
        return Task("saddle", problem, torch.ones(()), torch.zeros(()), steps=2)

    monkeypatch.setattr(bilevel.problems, "scalar", saddle)
    assert cli.main(["run", "scalar", "--solver", "implicit(lower_steps=0)"]) == 1


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", [{"a": float("nan"), "b": torch.tensor(2.0), "c": [1, 2]}])
    document = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert document["rows"] == [{"a": None, "b": 2.0, "c": [1, 2]}]


def test_table_chooses_columns() -> None:
    assert table([{"a": 1, "b": None}], ["b", "a"]).splitlines()[-1].split() == ["-", "1"]


def test_compare_from_python_uses_the_tasks_own_steps() -> None:
    rows = compare(lambda seed: bilevel.problems.scalar(), {"one": bilevel.implicit()}, steps=None)
    assert rows[0]["x_error"] < 1e-2
    assert spread(rows)[0]["runs"] == spread(rows)[0]["ok"] == 1


def test_compare_times_how_long_the_others_take_to_what_the_first_reached() -> None:
    makers = {
        "first": bilevel.implicit(),
        "short": bilevel.implicit(upper=bilevel.SGD(1e-6)),
        "same": bilevel.implicit(),
    }
    first, short, same = compare(lambda seed: bilevel.problems.quadratic(seed=seed), makers, steps=20)
    assert 0 < first["seconds_to_first"] <= first["seconds"]
    assert short["seconds_to_first"] is None
    assert 0 < same["seconds_to_first"] <= same["seconds"]


def test_parts_of_solvers_have_options_of_their_own() -> None:
    (solver,) = parse_solvers("implicit(linear=CG(max_steps=7), upper=SGD(lr=0.5), clip_norm=2.0)").values()
    assert solver == bilevel.implicit(linear=bilevel.CG(max_steps=7), upper=bilevel.SGD(0.5), clip_norm=2.0)
    (nested,) = parse_solvers("HypergradientDescent(estimator=Implicit(linear=Neumann(terms=2)))").values()
    assert nested == bilevel.HypergradientDescent(estimator=bilevel.Implicit(linear=bilevel.Neumann(terms=2)))


def test_a_task_may_name_its_solvers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "sine", "--steps", "2"]) == 0
    assert "maml" in capsys.readouterr().out
    assert cli.main(["compare", "sine", "--steps", "1"]) == 0
    assert "first-order maml" in capsys.readouterr().out
    assert cli.main(["run", "sine", "--solver", "implicit", "--steps", "2"]) == 2
    assert "lower_init" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["run"], ["compare"], ["data"]])
def test_help_shows_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--help"])
    examples = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  bilevel ")]
    assert len(examples) >= 2
    assert all(len(line) <= 120 for line in examples)


def test_solver_texts_are_parsed_not_evaluated() -> None:
    assert list(parse_solvers("all")) == list(bilevel.solvers.__all__)
    assert parse_solvers("neumann(terms=0)")["neumann(terms=0)"] == bilevel.neumann(terms=0)
    assert list(parse_solvers("hypergradient_descent,Implicit")) == ["hypergradient_descent", "Implicit"]
    for text in ("implicit(**{})", "neumann(3)"):
        with pytest.raises(InvalidProblem, match="name each option"):
            parse_solvers(text)


def test_values_of_relaxed_methods_are_told_with_the_lower_level_solved_too() -> None:
    rows = compare(
        lambda seed: bilevel.problems.quadratic(seed=seed),
        {"exact": bilevel.implicit(), "relaxed": bilevel.BOME()},
        steps=40,
    )
    gaps = [abs(row["solved_value"] - row["upper_value"]) for row in rows]
    assert gaps[0] < 1e-4 < gaps[1]


def test_a_level_that_cannot_be_solved_alone_has_no_solved_value() -> None:
    data = bilevel.Shuffled(torch.randn(8), batch_size=2)
    problem = bilevel.Problem(
        upper=lambda x, y, batch: (y - 1).square(),
        lower=lambda x, y, batch: (y - x - batch).square().mean(),
        lower_data=data,
    )
    task = bilevel.problems.Task("batches", problem, torch.tensor(0.0), torch.tensor(0.0))
    (row,) = compare(lambda seed: task, {"first": bilevel.F2SA()}, steps=3)
    assert row["solved_value"] is None
