"""The benchmark of first-order steps: its rows, and that it compares the same derivatives. Nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import first_order
from bilevel.dry_run import open_oracles


@pytest.mark.slow
def test_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    first_order.main(["--json", str(file), "--quick", "--methods", "VPBGD", first_order.HAND])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["task"], row["method"], row["gradients"]) for row in rows] == [
        (task, *of) for task in ("weights, batch 16", "decays, batch 16") for of in (("VPBGD", 4), ("F2SA by hand", 18))
    ]
    assert all(set(first_order.COLUMNS) == row.keys() and row["ratio"] > 0 and row["seconds"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", first_order.SOLVERS)
def test_a_step_is_compared_with_the_derivatives_that_it_takes(name: str) -> None:
    work = first_order.weights(16, quick=True)
    row = first_order.cost(work, name, pairs=1)
    assert (row["hvps"] > 0) == (name in first_order.SECOND)
    if name in first_order.SECOND:
        return
    solver = first_order.SOLVERS[name]
    oracles, x, y = open_oracles(work.problem, work.x, work.y, needs_hvp=False)
    state = solver.init(oracles, x, y)
    calls = first_order.recorded(oracles, lambda: solver.step(oracles, state))
    assert sum(call.kind != "upper_value" for call in calls) == row["gradients"]
    assert {call.at for call in calls} == {0, 1}


@pytest.mark.slow
def test_a_compiled_step_has_a_row_of_its_own() -> None:
    rows = first_order.measure(quick=True, only=["VPBGD", "GPBGD", first_order.HAND], backend="aot_eager")
    assert [row["method"] for row in rows] == ["VPBGD", "VPBGD, compiled", "GPBGD", first_order.HAND] * 2
    assert [row["gradients"] for row in rows] == [4, 4, 2, 18] * 2
    torch._dynamo.reset()


def test_plain_derivatives_are_those_of_the_library() -> None:
    work = first_order.decays(16, quick=True)
    plain = first_order.Plain(work)
    oracles, x, y = open_oracles(work.problem, work.x, work.y)
    plain.linearize(0)
    core = oracles.linearize_lower(x, y)
    pairs = {
        "f in y": (plain.upper_gradient(0), oracles.upper_gradient(x, y).y),
        "g in y": (plain.lower_gradient(1), oracles.lower_gradient(x, y)[1]),
        "g in both": (plain.lower_gradients(0), torch.cat(oracles.lower_gradients(x, y)[1:])),
        "H y": (plain.hvp(0), core.hvp(y)),
        "J y": (plain.cross(1), core.cross(y)),
    }
    for what, (leaves, expected) in pairs.items():
        found = torch.cat([leaf.flatten() for leaf in leaves])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=what)
    torch.testing.assert_close(plain.upper_value(1), oracles.upper_value(x, y))


def test_the_step_by_hand_descends_at_both_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_order, "LR", 0.05)
    work = first_order.decays(16, quick=True)
    hand = first_order.Hand(work)
    oracles, x, y = open_oracles(work.problem, work.x, work.y)
    f = oracles.upper_gradient(x, y).y
    for _ in range(3):
        hand.step()
    z, relaxed = (torch.cat([leaf.flatten() for leaf in point.values()]) for point in hand.points)
    assert float((relaxed - z) @ f) < 0, "only the relaxed point is pulled toward lower f"
    moved = torch.cat([leaf.flatten() for leaf in hand.moving])
    assert 0 < float((moved - x).norm()) < 1
