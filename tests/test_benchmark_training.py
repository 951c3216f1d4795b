"""Benchmarks of gradients through training: schedules as said, costs counted, baselines that are what they say."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import schedule, through_training
from bilevel.problems import data_selection, learning_rates, noisy_pool, retrained, small_parts


def test_a_family_of_schedules_warms_up_and_decays() -> None:
    rates = schedule.family(10, 1.0, 0.3, schedule.SHAPES["linear"]).exp().tolist()
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, *(1 - i / 7 for i in range(7))])
    assert schedule.family(10, 0.5, 0.0, schedule.SHAPES["constant"]).exp().tolist() == pytest.approx([0.5] * 10)
    assert min(schedule.family(100, 0.05, 0.0, schedule.SHAPES["linear"]).exp()) >= 0.999 * schedule.LOWEST
    ends = {name: float(shape(torch.ones(1))) for name, shape in schedule.SHAPES.items()}
    assert ends == pytest.approx(
        {"constant": 1.0, "linear": 0.0, "cosine": 0.0, "exponential": 0.01, "inverse root": 21**-0.5}, abs=1e-3
    )


def test_trainings_are_those_of_the_task() -> None:
    task = learning_rates(parts=small_parts(dtype=torch.float32), train_steps=5, knots=5, hidden=4)
    for seed in (None, 7):
        _, y = schedule.Trainings(task, seed)(task.x0)
        again = retrained(task, task.x0, seed)
        assert all(torch.equal(y[name], leaf) for name, leaf in again.items())
    diverged = schedule.Trainings(task)(torch.full((5,), math.nan))[0]
    assert diverged == 1e3


@pytest.mark.slow
def test_rows_of_schedules_tell_their_costs() -> None:
    setting = schedule.Setting(train_steps=6, upper_steps=2, knots=3, peaks=(0.1, 0.2))
    rows = {row["method"]: row for row in schedule.rows_of(0, setting)}
    assert rows["grid"]["trainings"] == 2 * 3 * 5
    assert rows["TPE, family"]["trainings"] == rows["TPE, knots"]["trainings"] == 9
    # Two steps and a certificate are 3 trainings of 6 gradients, 6 HVPs, and 2 gradients at their ends.
    assert rows["metagradients"]["trainings"] == 3 * (6 + 2 * 6 + 2) / 6
    assert rows["grid"]["validation_loss"] < rows["constant 0.05"]["validation_loss"]
    assert all(len(row["rates"]) == 6 for row in rows.values())
    assert schedule.means(list(rows.values()))[0]["method"] == "constant 0.05"


def test_a_small_loss_is_that_of_one_example() -> None:
    pool = noisy_pool(parts=small_parts(train=20, dtype=torch.float32))
    task = data_selection(pool=pool, train_steps=2, hidden=4, batch_size=20)
    each = [float(through_training.one_loss(task, task.y0, pool, i)) for i in range(20)]
    whole = float(task.problem.lower(task.x0, task.y0, pool.everything))
    assert sum(each) / 20 == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_rows_of_decays_and_of_the_audit() -> None:
    rows = {row["method"]: row for row in through_training.decays(0, steps=2, hidden=2)}
    assert rows["every weight, last"]["validation_loss"] < rows["one decay"]["validation_loss"]
    assert rows["one, train + validation"]["validation_loss"] < rows["one decay"]["validation_loss"]
    assert rows["picked, train + validation"]["validation_loss"] < rows["one decay"]["validation_loss"]
    audit = through_training.audit(0, train_steps=3)
    assert [row["method"] for row in audit] == ["unchanged", "random", "worst found"]
    assert audit[0]["change"] == 0.0 < audit[2]["change"] <= audit[1]["change"] == pytest.approx(0.3)
    (mean,) = (row for row in through_training.means(audit * 2) if row["method"] == "unchanged")
    assert mean["test_loss"] == audit[0]["test_loss"]
    assert mean["runs"] == 2


@pytest.mark.slow
def test_rows_of_a_selection() -> None:
    rows = {row["method"]: row for row in through_training.selection(0, train_steps=20)}
    assert {"whole pool", "random", "small loss", "oracle", "target alone", *through_training.SELECTIONS} == set(rows)
    assert rows["oracle"]["good"] == rows["target alone"]["good"] == 1.0
    assert rows["random"]["good"] == pytest.approx(rows["whole pool"]["good"], abs=0.05)
    assert rows["weights"]["good"] > rows["whole pool"]["good"]
