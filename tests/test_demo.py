"""The demo: its table at a reduced size, its picture, and what it promises at full size."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from bilevel.demo.main import COLUMNS, introduction, main
from bilevel.demo.methods import baselines, best_row, cleaned, recovered, solvers, surest
from bilevel.demo.picture import draw
from bilevel.demo.selection import select
from bilevel.demo.training import best_decay, hold_back, train
from bilevel.problems import noisy_digits
from bilevel.problems._datasets import Part

BASELINES = ["all", "clean only", "validation only", "all + validation"]


@pytest.mark.slow
def test_small_table_and_picture(tmp_path: Path) -> None:
    digits = noisy_digits(0, train=300, validation=150)
    chosen = {name: solver for name, solver in solvers(4).items() if name in ("implicit (CG)", "T1-T2 (identity)")}
    rows = baselines(digits)
    more, solutions = cleaned(digits, chosen, steps=4)
    rows += more
    assert [row["method"] for row in rows] == [*BASELINES, *chosen]
    assert all(set(COLUMNS) <= set(row) for row in more)
    assert all(0.3 < row["test_accuracy"] < 1 for row in rows)
    assert all(0 <= row["relative_error"] <= 1 for row in more)
    assert best_row(rows) in more
    assert recovered(rows) == recovered([*rows])
    order = surest(digits, solutions["implicit (CG)"])
    assert len(order) == int((solutions["implicit (CG)"].best_x < 0).sum())
    draw(tmp_path / "demo.png", digits, rows, solutions)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_introduction_counts() -> None:
    digits = noisy_digits(0, train=200, validation=100)
    assert introduction(digits).startswith("200 digits of MNIST to train on: ")
    assert f"{digits.wrong.double().mean():.1%} are wrong" in introduction(digits)


def test_training_reaches_a_stationary_point() -> None:
    digits = noisy_digits(0, train=100, validation=100)
    part = Part(digits.images, digits.given)
    y = train(part, 0.1)
    probabilities = (part.inputs @ y[:-1] + y[-1]).softmax(-1)
    wanted = torch.nn.functional.one_hot(part.targets, 10)
    gradient = part.inputs.T @ (probabilities - wanted) / 100 + 0.1 * y[:-1]
    assert gradient.norm() < 2e-3


def test_the_third_held_back_chooses_the_decay() -> None:
    fit, held = hold_back(noisy_digits(0).validation)
    assert [len(fit.targets), len(held.targets)] == [666, 334]
    assert best_decay(fit, held, (1e3, 0.03)) == 0.03


@pytest.mark.slow
def test_selection_looks_at_held_back_digits_only() -> None:
    (row,) = select(decays=(0.03,), seeds=(0,), steps=10)
    assert row.keys() == {"decay", "steps", "accuracy", "loss", "retrained 0.03"}
    assert 0.8 < row["accuracy"] < 1


@pytest.mark.slow
def test_full_demo_keeps_its_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / "demo.json"), str(tmp_path / "demo.png")]
    begin = time.process_time()
    assert main(["--json", paths[0], "--picture", paths[1]]) == 0
    assert time.process_time() - begin < 100  # seconds of two cores; a minute of wall time
    document = json.loads(Path(paths[0]).read_text())
    rows = {row["method"]: row for row in document["rows"]}
    best = best_row(document["rows"])
    assert best["f1"] >= 0.88
    assert best["test_accuracy"] >= rows["validation only"]["test_accuracy"]
    assert recovered(document["rows"], "retrained_accuracy") >= 0.8
    assert rows["implicit (CG)"]["relative_error"] < 0.15 < rows["T1-T2 (identity)"]["relative_error"]
    assert "of the labels were replaced" in capsys.readouterr().out
