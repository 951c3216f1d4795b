"""The benchmark of remedies for low metasmoothness: its rows, and that each remedy changes one thing."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import metasmoothness
from benchmarks.metasmoothness import ADAM, PLAIN, REMEDIES, Run, Setup


@pytest.mark.slow
def test_rows_have_their_keys_and_figures(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    names = ["none: SGD, relu, max pooling", "GELU, average pooling, lr / 4"]
    metasmoothness.main(["--json", str(file), "--quick", "--remedies", *names])
    rows = json.loads(file.read_text())["rows"]
    assert [row["remedy"] for row in rows] == names
    for row in rows:
        assert set(metasmoothness.COLUMNS) <= row.keys()
        assert -1 <= row["score"] <= 1
        assert row["curvature"] >= 0
        assert 0 <= row["accuracy"] <= 1
    assert rows[0]["score"] < rows[1]["score"], "after five steps the smooth network is the smoother one"


def test_each_remedy_changes_one_thing_of_its_base() -> None:
    for name, (base, setup) in REMEDIES.items():
        start = {"SGD": PLAIN, "Adam": ADAM, "": setup}[base]
        changed = [field.name for field in fields(Setup) if getattr(start, field.name) != getattr(setup, field.name)]
        parts = name.removeprefix("Adam, ").removeprefix("none: ").count(",") + 1
        assert base == "" or "the same" in name or len(changed) == parts, name


def test_the_gain_of_a_short_step_is_what_the_metagradient_says() -> None:
    run = Run.of(Setup(activation=torch.nn.Tanh, pool="average", steps=4), 0)
    figures = run.figures(0)
    assert figures["gain_tenth"] == pytest.approx(1.0, abs=0.05)
    assert run.figures(0) == figures
