"""The benchmark of distillation: its rows, their choice, and its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import distillation


@pytest.mark.slow
def test_rows_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    file = tmp_path / "rows.json"
    distillation.main(
        ["--json", str(file), "--pictures", str(tmp_path), "--share", "0.005", "--ipc", "1", "--networks",
         "instance norm", "--methods", "random real images", "RCIG"]
    )  # fmt: skip
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["random real images", "RCIG"]
    for row in rows.values():
        assert set(distillation.COLUMNS) <= row.keys()
        assert row["network"] == "instance norm"
        assert 0 <= row["mean"] <= 1
    assert rows["random real images"]["steps"] == 0
    assert rows["RCIG"]["steps"] == 2
    assert (tmp_path / "rcig_1_instance.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_has_a_line_and_quotes_say_what_they_are() -> None:
    assert len(distillation.METHODS) == 8
    assert {name for name, _, _ in distillation.QUOTED} <= distillation.METHODS.keys()
    assert set(distillation.JUDGES).isdisjoint(distillation.CHOOSERS)


def test_all_of_mnist_is_taken_where_it_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    assert distillation.whole_mnist(None) is None
    assert distillation.whole_mnist("elsewhere.npz") == Path("elsewhere.npz")
    assert distillation.whole_mnist("fetched") is None
    assert "bilevel data fetch mnist" in capsys.readouterr().out
    (tmp_path / "mnist.npz").touch()
    assert distillation.whole_mnist("fetched") == tmp_path / "mnist.npz"
