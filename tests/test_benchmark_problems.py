"""The benchmark of problems that learn weights: its rows, and the classifiers that it trains in the usual way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("mlxtend")
pytest.importorskip("sklearn")

from benchmarks import classifiers, problems
from bilevel.problems import meta_weight_net
from bilevel.problems._datasets import Part


@pytest.mark.slow
def test_every_problem_has_a_plain_and_a_learned_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    problems.main(["--json", str(file), "--quick", "--seeds", "4", "5"])
    document = json.loads(file.read_text())
    assert document["meta"]["torch"]
    rows = document["rows"]
    for name in problems.PROBLEMS:
        own = {row["way"]: row for row in rows if row["problem"] == name}
        assert len(own) == sum(row["problem"] == name for row in rows) >= 4
        assert "learned" in own
        for row in own.values():
            assert {"settings", "measure", "validation", "test", "seconds"} <= row.keys()
            assert row["seed"] == 4
            assert 0 < row["test"] < 2 if row["measure"] == "mse" else 0 < row["test"] < 1


def test_means_are_over_seeds() -> None:
    rows = [
        {"problem": "p", "seed": seed, "way": way, "validation": 0.5, "test": value}
        for way, values in {"plain": (0.1, 0.3), "learned": (0.7, 0.5)}.items()
        for seed, value in enumerate(values)
    ]
    plain, learned = problems.means(rows)
    assert (plain["way"], plain["least"], plain["most"]) == ("plain", 0.1, 0.3)
    assert learned["test"] == pytest.approx(0.6)


def test_weighted_linear_models_are_minimizers(generator: torch.Generator) -> None:
    part = Part(torch.randn(60, 5, generator=generator), torch.randint(10, (60,), generator=generator))
    weights = torch.rand(60, generator=generator)
    y = classifiers.linear(part, 0.1, weights).requires_grad_()
    losses = F.cross_entropy(classifiers.scores(y, part), part.targets, reduction="none")
    ((weights * losses).mean() + 0.05 * y.square().sum()).backward()
    assert y.grad is not None
    assert float(y.grad.norm()) < 1e-3
    assert float((y.detach() - classifiers.linear(part, 0.1)).norm()) > 0.01


def test_sgd_keeps_the_best_look_and_leaves_random_numbers_alone() -> None:
    task = meta_weight_net(4)
    noisy, clean = classifiers.parts(task)
    before = torch.get_rng_state()
    found, step, net = classifiers.sgd(task, noisy, clean, 0.1, 4, 30, look=10)
    assert torch.equal(torch.get_rng_state(), before)
    assert step in (10, 20, 30)
    assert classifiers.accuracy(net(clean.inputs), clean) == found
    shorter = classifiers.sgd(task, noisy, clean, 0.1, 4, 10, look=10)
    assert shorter[0] <= found
    again = classifiers.sgd(task, noisy, clean, 0.1, 4, 30, look=10)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again[2].parameters(), strict=True))
