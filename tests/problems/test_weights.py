"""Problems that learn weights, masks and magnitudes: closed forms and invariants, and what solving them gains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bilevel
from bilevel import InvalidProblem
from bilevel.dry_run import open_oracles
from bilevel.problems import augmentation, coreset, feature_selection, long_tail, meta_weight_net
from bilevel.problems._datasets import Part, mnist
from bilevel.problems.augmentation import KINDS, augmented
from bilevel.problems.coreset import entropy, trained_accuracy
from bilevel.problems.hyper_cleaning import apart
from bilevel.problems.long_tail import tailed


def test_masked_ridge_is_solved_by_its_formula(generator: torch.Generator) -> None:
    task = feature_selection(noise=5)
    x = torch.randn(15, generator=generator, dtype=torch.float64)
    assert task.problem.lower_solution is not None
    y = task.problem.lower_solution(x)
    # The solution of the ridge regression on masked columns.
    oracles, flat, _ = open_oracles(task.problem, x, task.y0)
    assert float(oracles.lower_gradient(flat, y)[1].norm()) < 1e-12


def test_hypergradient_of_the_mask_agrees_with_finite_differences(generator: torch.Generator) -> None:
    task = feature_selection(noise=5)
    x, v = (torch.randn(15, generator=generator, dtype=torch.float64) for _ in range(2))
    problem, solution = task.problem, task.problem.lower_solution
    assert solution is not None
    assert problem.upper_data is not None
    batch = problem.upper_data.batch(0, 0)

    def value(at: Tensor) -> float:
        return float(problem.upper(at, solution(at), batch))

    found = bilevel.hypergradient(problem, x, solution(x)).gradient @ v
    for h in (1e-4, 1e-5):
        assert float(found) == pytest.approx((value(x + h * v) - value(x - h * v)) / (2 * h), rel=1e-5)


def test_a_learned_mask_drops_noise() -> None:
    task = feature_selection()
    assert task.evaluate is not None
    solution = bilevel.solve(task.problem, bilevel.implicit(), task.x0, task.y0, steps=60)
    said = task.evaluate(solution.best_x, None)
    assert said["noise_kept"] <= 4  # of 40
    assert said["features"] - said["noise_kept"] >= 3  # of 10


def test_tails_are_long_and_validation_is_balanced() -> None:
    train, validation, test = tailed(0, 50.0)
    assert train.targets.bincount().tolist() == [300, 194, 126, 81, 53, 34, 22, 14, 9, 6]
    assert validation.targets.bincount().tolist() == [30] * 10
    assert test.targets.bincount().tolist() == [100] * 10
    pictures = torch.cat([part.inputs for part in (train, validation, test)])
    assert len(pictures.unique(dim=0)) == len(pictures)


def test_class_weights_are_repetitions() -> None:
    """A class of weight 3 counts like one whose examples are there three times."""
    task = long_tail()
    (images, labels), y = task.problem.lower_data.batch(0, 0), {}  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    y = {name: 0.1 * torch.randn(leaf.shape, generator=generator) for name, leaf in task.y0.items()}
    x = torch.zeros(10)
    x[9] = math.log(3)
    thrice = torch.cat([torch.arange(len(labels)), *2 * [torch.nonzero(labels == 9).flatten()]])
    repeated = task.problem.lower(torch.zeros(10), y, (images[thrice], labels[thrice])) * len(thrice) / len(labels)
    torch.testing.assert_close(task.problem.lower(x, y, (images, labels)), repeated)


@pytest.mark.slow
def test_class_weights_help_rare_classes() -> None:
    task = long_tail()
    assert task.evaluate is not None
    plain, learned = (
        bilevel.solve(task.problem, bilevel.implicit(upper=bilevel.Adam(lr)), task.x0, task.y0, steps=20)
        for lr in (0.0, 0.3)
    )
    before, after = (task.evaluate(solution.x, solution.y) for solution in (plain, learned))
    assert after["rare_accuracy"] > before["rare_accuracy"] + 0.1
    assert after["test_accuracy"] > before["test_accuracy"] + 0.03


def test_coreset_weights_sum_to_one_and_their_level_does_not_matter(generator: torch.Generator) -> None:
    task = coreset(size=5, pool=40)
    x = torch.randn(40, generator=generator)
    y = {name: 0.1 * torch.randn(leaf.shape, generator=generator) for name, leaf in task.y0.items()}
    for level in ("lower", "upper"):
        objective, data = getattr(task.problem, level), getattr(task.problem, f"{level}_data")
        torch.testing.assert_close(objective(x + 3, y, data.batch(0, 0)), objective(x, y, data.batch(0, 0)))
    torch.testing.assert_close(entropy(torch.zeros(40)), torch.tensor(math.log(40)))
    images, labels = task.problem.lower_data.batch(0, 0)  # type: ignore[union-attr]
    alone = torch.full((40,), -1e3)
    alone[7] = 0.0
    one = F.cross_entropy(images[7:8] @ y["weight"] + y["bias"], labels[7:8])
    torch.testing.assert_close(task.problem.lower(alone, y, (images, labels)), one)


def test_a_coreset_is_judged_by_training_on_its_largest_weights() -> None:
    task = coreset(size=20, pool=40)
    assert task.evaluate is not None
    images, labels = task.problem.lower_data.batch(0, 0)  # type: ignore[union-attr]
    x = -torch.arange(40.0)
    test = Part(*(each[apart()[1]] for each in mnist()))
    expected = trained_accuracy(Part(images[:20], labels[:20]), test, 0.01)
    assert task.evaluate(x, None)["test_accuracy"] == expected > 0.3


def test_a_constant_weighing_is_the_plain_mean(generator: torch.Generator) -> None:
    task = meta_weight_net(hidden=4)
    x = task.x0 | {"2.weight": torch.zeros(1, 100), "2.bias": torch.tensor([-3.0])}
    batch = task.problem.lower_data.batch(0, 0)  # type: ignore[union-attr]
    torch.testing.assert_close(task.problem.lower(x, task.y0, batch), task.problem.upper(x, task.y0, batch))


@pytest.mark.slow
def test_weights_by_loss_tell_wrong_labels() -> None:
    task = meta_weight_net()
    assert task.evaluate is not None
    solver = bilevel.unrolled(bilevel.SGD(0.2), 5, upper=bilevel.Adam(0.003))
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=80)
    said = task.evaluate(solution.best_x, solution.best_y)
    assert said["weight_right"] > 2 * said["weight_wrong"]


def test_no_magnitude_is_no_change(generator: torch.Generator) -> None:
    images = torch.rand(3, 784, generator=generator, dtype=torch.float64)
    x = {kind: torch.tensor(-30.0, dtype=torch.float64) for kind in KINDS}
    torch.testing.assert_close(augmented(x, images), images, rtol=0, atol=1e-8)
    noisy = augmented(x | {"noise": torch.tensor(0.0, dtype=torch.float64)}, images) - images
    assert float(noisy.std()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_is_differentiable_in_each_magnitude(kind: str) -> None:
    images = mnist().inputs[:20].double()
    weights = torch.randn(20, 784, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(at: Tensor) -> Tensor:
        torch.manual_seed(0)
        x = {name: torch.tensor(-2.0, dtype=torch.float64) for name in KINDS} | {kind: at}
        return (weights * augmented(x, images)).sum()

    state = torch.get_rng_state()
    at = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(value(at), at)
    for h in (1e-6, 1e-7):  # interpolation has kinks at pixels: steps that pass none
        assert float(found) == pytest.approx(float((value(at + h) - value(at - h)).detach()) / (2 * h), rel=1e-3)
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (feature_selection, {"noise": -1}),
        (feature_selection, {"decay": 0.0}),
        (long_tail, {"imbalance": 0.5}),
        (coreset, {"size": 50, "pool": 40}),
        (coreset, {"strength": -1.0}),
        (meta_weight_net, {"noise": 1.5}),
        (augmentation, {"batch_size": 300}),
    ],
)
def test_wrong_options_are_refused(make: Callable[..., Any], options: dict[str, Any]) -> None:
    with pytest.raises(InvalidProblem, match=next(iter(options))):
        make(**options)
