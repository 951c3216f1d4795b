"""The benchmark of tuned networks: its summary, and that it is the program of the example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tune


def row(way: str, seed: int, loss: float) -> dict[str, Any]:
    return {
        "chosen by": way, "seed": seed, "values": 9, "trainings": 2 + seed, "cpu_seconds": 1.0,
        "validation_loss": loss, "test_loss": 2 * loss, "test_error": 0.1,
    }  # fmt: skip


def test_the_summary_has_means_spreads_and_who_won() -> None:
    losses = {"a": [1.0, 3.0, 2.0], "b": [2.0, 2.5, 2.5]}
    rows = [row(way, seed, loss) for way, values in losses.items() for seed, loss in enumerate(values)]
    first, second = tune.example().summary(rows)
    assert first["validation_loss"] == "2 ± 1"
    assert second["validation_loss"] == "2.33 ± 0.29"
    assert first["test_loss"] == "4 ± 2"
    assert first["trainings"] == "3 ± 1"
    assert (first["wins"], second["wins"]) == ("2 of 3", "1 of 3")


@pytest.mark.slow
def test_it_writes_what_the_example_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tune.json"
    assert tune.main(["--seeds", "2", "--seconds", "0.1", "--train-steps", "20", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [entry["seed"] for entry in rows] == [0] * 4 + [1] * 4
    assert {entry["values"] for entry in rows} == {0, 9, 100}
    assert " of 2" in capsys.readouterr().out


@pytest.mark.slow
def test_the_splits_share_no_digit() -> None:
    module = tune.example()
    parts = [{tuple(image.nonzero().flatten().tolist()) for image in part.images} for part in module.split(1)]
    train, validation, test = parts
    assert not train & test
    assert not validation & test
    assert not train & validation
    assert [len(part.labels) for part in module.split(1)] == [sum(module.COUNTS), 1000, 2000]
    assert (module.split(1)[2].images == module.split(2)[2].images).all()
