"""The benchmarks run and write the rows that pages quote; what they rely on in CG holds. Nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import hypergradient, replay, throughput
from benchmarks.plain import Plain, conjugate_gradients, exact, exact_softmax_regression
from benchmarks.tasks import network, softmax_regression
from bilevel.linear import CG, Jacobi, Operator
from bilevel.status import Status


@pytest.mark.slow
def test_rows_of_a_hypergradient_have_their_keys_and_equal_products() -> None:
    task = network(16, quick=True)
    rows = hypergradient.cost(task, exact(task), pairs=1) + hypergradient.batched(task, pairs=1)
    assert [row["method"] for row in rows] == [
        "plain", "generic", "declared", "declared + Jacobi", "nystrom-pcg", "floor", "hvps loop", "hvps batched",
    ]  # fmt: skip
    for row in rows:
        assert {"task", "method", "ratio", "error", "added_mb", "seconds"} <= row.keys()
        assert row["hvps"] == hypergradient.HVPS
        assert row["ratio"] > 0
        assert row["seconds"] > 0
        assert row["added_mb"] > 0
    assert rows[3]["error"] < rows[0]["error"] / 2, "the declared diagonal is a better preconditioner than none"
    assert rows[-1]["error"] < 1e-6, "a batched product is the same product"


def test_references_agree_with_each_other() -> None:
    task = softmax_regression(quick=True)
    torch.testing.assert_close(exact(task), exact_softmax_regression(task), rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_the_same_code_runs_on_any_device_and_writes_its_rows(tmp_path: Path, device: str) -> None:
    file = tmp_path / "rows.json"
    hypergradient.main(["--json", str(file), "--quick", "--device", device])
    rows = json.loads(file.read_text())["rows"]
    assert {row["task"] for row in rows} == {"MLP", "CNN", "transformer block"}
    assert all(set(throughput.COLUMNS) <= row.keys() and row["hvps_per_second"] > 0 for row in rows)


@pytest.mark.slow
def test_rows_of_replay_have_their_keys_and_the_same_gradient(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    replay.main(["--json", str(file), "--quick", "--long"])
    rows = json.loads(file.read_text())["rows"]
    assert [row["schedule"] for row in rows] == [
        "plain torch", "store-all", "sqrt", "k-ary", "binomial", "sqrt", "binomial",
    ]  # fmt: skip
    for row in rows[:5]:
        assert {"steps", "ratio", "added_mb", "peak_states", "recomputed", "error", "plain_steps"} <= row.keys()
        assert row["error"] < 1e-5
        assert row["ratio"] > 0
    assert rows[2]["peak_states"] <= 2 * rows[2]["steps"] ** 0.5
    assert rows[2]["added_mb"] < rows[1]["added_mb"]
    assert rows[6]["error"] < 1e-4


def test_plain_counts_its_products() -> None:
    plain = Plain(network(16, quick=True))
    plain.hypergradient(3)
    assert plain.hvps == 3


@pytest.mark.parametrize("scale", [1.0, 1e-22, 1e20])
def test_cg_on_long_vectors_is_the_textbook_recurrence_at_any_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.rand(100_000, generator=generator) + 0.05
    b = torch.randn(100_000, generator=generator)
    found = CG(tol=0.0, max_steps=12).solve(Operator(lambda v: diagonal * v), scale * b)
    expected = conjugate_gradients(lambda v: diagonal.double() * v, b.double(), 12)
    assert found.products == 13
    assert float((found.value.double() / scale - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    "case", ["definite", "indefinite", "singular", "not finite", "zero", "warm", "Jacobi", "damped"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cg_on_one_vector_does_what_it_does_on_one_row(case: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    # Twelve curvatures over two decades: few enough that rounding does not change the number of steps.
    d = torch.logspace(-1, 1, 12, dtype=dtype)
    d[0] = {"indefinite": -1.0, "singular": 0.0, "not finite": torch.nan}.get(case, 0.1)
    b = torch.randn(12, generator=generator).to(dtype) * (case != "zero")
    x0 = (b / d).float().to(dtype) + 0.01 if case == "warm" else None
    operator = Operator(lambda v: d * v, diagonal=d.clamp_min(0))
    solver = CG(
        tol=1e-4, max_steps=25, damping=0.1 * (case == "damped"), preconditioner=Jacobi() if case == "Jacobi" else None
    )
    alone = solver.solve(operator, b, x0)
    row = solver.solve(operator, b[None], None if x0 is None else x0[None])
    assert (alone.status, alone.steps, alone.products) == (row.status, row.steps, row.products)
    assert case not in ("definite", "warm") or alone.status is Status.CONVERGED
    torch.testing.assert_close(alone.value, row.value[0], rtol=1e-3, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(alone.residual, row.residual[0], rtol=1e-2, atol=solver.tol, equal_nan=True)
    assert (alone.curvature is None) == (row.curvature is None)
    if alone.curvature is not None and row.curvature is not None:
        torch.testing.assert_close(alone.curvature, row.curvature, rtol=1e-3, atol=1e-5)
