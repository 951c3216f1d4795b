"""Cleaning: of the user's own arrays, with any network, and of the digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bilevel
from bilevel.problems import clean, hyper_cleaning, kept, noisy_digits
from bilevel.problems._datasets import mnist
from bilevel.problems.cleaning import detection


def blobs(n: int, seed: int, noise: float = 0.4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    true = random.integers(3, size=n)
    centers = np.array([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    points = centers[true] + random.normal(scale=0.5, size=(n, 2))
    return points, np.where(random.random(n) < noise, random.integers(3, size=n), true), true


POINTS, LABELS, TRUE = blobs(90, 0)
TRUSTED, _, TRUSTED_LABELS = blobs(45, 1)


def solved(task: bilevel.problems.Task, steps: int = 15, **options: Any) -> bilevel.Solution:
    solver = bilevel.implicit(linear=bilevel.CG(damping=1e-2), upper=bilevel.Adam(lr=0.3), **options)
    return bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps)


def test_lower_objective_is_the_weighted_mean() -> None:
    task = clean(POINTS, LABELS, TRUSTED, TRUSTED_LABELS)
    x = torch.linspace(-1, 1, 90, dtype=torch.float64)
    y = {name: torch.ones_like(leaf) for name, leaf in task.y0.items()}
    y["1.weight"] = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    losses = F.cross_entropy(torch.tensor(POINTS) @ y["1.weight"].T + 1, torch.tensor(LABELS), reduction="none")
    found = task.problem.lower(x, y, task.problem.lower_data.batch(0, 0))
    torch.testing.assert_close(found, (x.sigmoid() * losses).mean())


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor])
def test_arrays_and_tensors_give_the_same_and_stay_as_they_are(convert: Any) -> None:
    given = [convert(each) for each in (POINTS, LABELS, TRUSTED, TRUSTED_LABELS)]
    copies = [each.copy() if isinstance(each, np.ndarray) else each.clone() for each in given]
    solution = solved(clean(*given), steps=3)
    assert all(bool((a == b).all()) for a, b in zip(given, copies, strict=True))
    same = solved(clean(POINTS, LABELS, TRUSTED, TRUSTED_LABELS), steps=3)
    assert bool((solution.x == same.x).all())


def test_finds_wrong_labels_with_a_linear_model() -> None:
    task = clean(POINTS, LABELS, TRUSTED, TRUSTED_LABELS, true_labels=TRUE, test=(TRUSTED, TRUSTED_LABELS))
    solution = solved(task)
    assert task.evaluate is not None
    before, after = task.evaluate(task.x0, task.y0), task.evaluate(solution.best_x, solution.best_y)
    assert set(after) == {"test_accuracy", "f1", "precision", "recall"}
    assert before["f1"] == 0.0
    assert after["f1"] > 0.9
    assert after["test_accuracy"] > 0.95


def test_finds_wrong_labels_with_a_network_that_stays_as_it_was() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    task = clean(POINTS, LABELS, TRUSTED, TRUSTED_LABELS, net=net, decay=0.02, true_labels=TRUE)
    solution = solved(task)
    assert task.evaluate is not None
    assert task.evaluate(solution.best_x, solution.best_y)["f1"] > 0.85
    assert all(bool((value == before[name]).all()) for name, value in net.state_dict().items())


def test_a_network_starts_trained() -> None:
    torch.manual_seed(0)
    net = nn.Linear(2, 3).double()
    task = clean(POINTS, LABELS, TRUSTED, TRUSTED_LABELS, net=net)
    raw = clean(POINTS, LABELS, TRUSTED, TRUSTED_LABELS, net=net, train_steps=0)
    lowest = bilevel.hypergradient(task.problem, task.x0, task.y0).certificate.lower_gradient_norm
    assert lowest < 1e-4
    assert bilevel.hypergradient(raw.problem, raw.x0, raw.y0).certificate.lower_gradient_norm > 1e-2


def test_mini_batches_weigh_the_right_examples() -> None:
    task = clean(POINTS, LABELS, TRUSTED, TRUSTED_LABELS, batch_size=30, true_labels=TRUE)
    assert task.problem.lower_data is not None
    points, labels, index = task.problem.lower_data.batch(1, 0)
    assert bool((points == torch.tensor(POINTS)[index]).all())
    assert bool((labels == torch.tensor(LABELS)[index]).all())
    solution = solved(task, steps=30)
    assert task.evaluate is not None
    assert task.evaluate(solution.x, solution.y)["f1"] > 0.8


def test_integer_images_become_float32() -> None:
    images = (POINTS * 50 + 100).clip(0, 255).astype(np.uint8)
    task = clean(images, LABELS, images, TRUE)
    assert task.x0.dtype == torch.float32
    assert task.problem.lower_data.batch(0, 0)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS[:-1]}, r"training: inputs \(90, 2\) and labels \(89,\)"),
        ({"labels": LABELS.astype(float)}, "labels must be integers from 0"),
        ({"labels": LABELS - 1}, "labels must be integers from 0"),
        ({"validation_inputs": TRUSTED[:0], "validation_labels": TRUSTED_LABELS[:0]}, "validation: .* n > 0"),
        ({"true_labels": TRUE[:5]}, "true_labels"),
    ],
)
def test_wrong_arrays_are_refused(change: dict[str, Any], message: str) -> None:
    arrays = {"inputs": POINTS, "labels": LABELS, "validation_inputs": TRUSTED, "validation_labels": TRUSTED_LABELS}
    with pytest.raises(bilevel.InvalidProblem, match=message):
        clean(**(arrays | change))


def test_detection_counts() -> None:
    x = torch.tensor([-1.0, -1.0, -1.0, 1.0, 0.0])
    wrong = torch.tensor([True, True, False, True, False])
    assert kept(x).tolist() == [False, False, False, True, True]
    assert detection(x, wrong) == pytest.approx({"f1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3})
    assert detection(torch.ones(5), wrong) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_digits_are_split_and_replaced_as_said() -> None:
    one, other = noisy_digits(0), noisy_digits(1)
    assert one.images.shape == (3000, 784)
    assert one.images.dtype == torch.float32
    assert [len(one.validation.targets), len(one.test.targets)] == [1000, 1000]
    assert torch.bincount(one.test.targets).tolist() == [100] * 10
    assert bool((one.test.inputs == other.test.inputs).all())
    assert not bool((one.images == other.images).all())
    # Parts do not overlap: pixel sums of all parts together are those of the whole data set.
    sums = torch.cat([one.images.sum(1), one.validation.inputs.sum(1), one.test.inputs.sum(1)]).sort().values
    torch.testing.assert_close(sums, mnist().inputs.sum(1).sort().values)
    assert 0.46 < one.replaced.double().mean() < 0.54
    # One in ten draws gives the true label back.
    assert one.wrong.double().mean() == pytest.approx(0.9 * float(one.replaced.double().mean()), abs=0.02)
    assert not bool((one.wrong & ~one.replaced).any())


@pytest.mark.slow
def test_hyper_cleaning_gains_within_a_few_steps() -> None:
    task = hyper_cleaning()
    solution = solved(task, steps=5, lower_steps=10)
    assert task.evaluate is not None
    found = task.evaluate(solution.best_x, solution.best_y)
    assert found["f1"] > 0.85
    assert found["test_accuracy"] > 0.84
