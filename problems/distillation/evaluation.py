"""How good distilled data are: fresh networks trained on them alone, chosen on validation data, then tested."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from bilevel.data._seeding import mixed
from bilevel.problems._datasets import Part
from bilevel.problems.distillation.networks import Network, Parameters
from bilevel.problems.distillation.statement import check_images
from bilevel.problems.distillation.synthetic import Synthetic, training_loss
from bilevel.status import InvalidProblem

CHUNK = 100
"""Images classified at a time."""
_OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on distilled data, all of them (or `batch_size`) at each step.

    Args:
        lr: > 0, constant.
        steps: after which the network may be judged, rising; training takes the last of them.
        decay: >= 0, of all weights; decoupled, which for "sgd" is the same.
        augment: >= 0: how far images are moved at random at each step, as a share of: shifts by 1/4 of the image,
            turns by 60 degrees, and stretches by 1/2. 0.5 is about what the papers' augmentation does to digits.
        batch_size: of the distilled images; all if None.
        optimizer: "adam" or "sgd".

    Raises:
        InvalidProblem: an option is out of its range.
    """

    lr: float = 1e-3
    steps: tuple[int, ...] = (100, 200, 400)
    decay: float = 0.0
    augment: float = 0.0
    batch_size: int | None = None
    optimizer: Literal["adam", "sgd"] = "adam"

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.steps))
        if not self.steps or self.steps[0] < 1 or not rising:
            raise InvalidProblem(f"Recipe(steps=...) must be rising numbers from 1, got {self.steps}.")
        batch = 1 if self.batch_size is None else self.batch_size
        if not self.lr > 0 or not self.decay >= 0 or not self.augment >= 0 or batch < 1:
            raise InvalidProblem(
                f"Recipe: lr must be > 0, decay and augment >= 0, batch_size >= 1 or None, got {self}."
            )
        if self.optimizer not in _OPTIMIZERS:
            raise InvalidProblem(f"Recipe(optimizer=...) must be one of {[*_OPTIMIZERS]}, got {self.optimizer!r}.")

    def of(self, weights: Parameters) -> torch.optim.Optimizer:
        """Return the optimizer of some weights."""
        found: torch.optim.Optimizer = _OPTIMIZERS[self.optimizer](
            weights.values(), lr=self.lr, weight_decay=self.decay
        )
        return found


@dataclass(frozen=True)
class Evaluation:
    """What fresh networks reached.

    Args:
        recipe: the one chosen.
        steps: training steps, chosen too.
        validation: mean accuracy on the validation data, by which both were chosen.
        accuracies: of each network on the test data.
    """

    recipe: Recipe
    steps: int
    validation: float
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean test accuracy."""
        return mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation of the test accuracies, nan for one network."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else math.nan


def evaluate(
    data: Synthetic,
    network: Network,
    validation: Part,
    test: Part,
    *,
    seeds: Sequence[int] = (100, 101, 102, 103, 104),
    recipes: Sequence[Recipe] = (Recipe(),),
) -> Evaluation:
    """Train fresh networks on distilled data, choose recipe and steps on validation data, and test.

    The test data are looked at once, after the choice.

    Args:
        data: to train on.
        network: the architecture; it need not be the one distilled with.
        validation: real images and labels.
        test: others.
        seeds: of the networks' starts, one network each.
        recipes: to choose among.

    Raises:
        InvalidProblem: data do not fit the network, or there is nothing to choose from.

    Cost:
        `len(recipes) * len(seeds)` trainings.

    Example:
        >>> from bilevel.problems.distillation import mlp
        >>> data = Synthetic(torch.tensor([[-1.0], [1.0]]), torch.eye(2))
        >>> part = Part(torch.tensor([[-2.0], [3.0]]), torch.tensor([0, 1]))
        >>> evaluate(data, mlp(shape=(1,), classes=2), part, part, recipes=[Recipe(lr=0.1)]).mean
        1.0
    """
    check_images("evaluate: validation", validation, network)
    check_images("evaluate: test", test, network)
    check_images("evaluate: data", Part(data.images, data.targets.argmax(1)), network)
    if not recipes or not seeds:
        raise InvalidProblem("evaluate needs at least one recipe and one seed.")
    best: tuple[float, Recipe, int, list[Parameters]] | None = None
    for recipe in recipes:
        runs = [trained(data, network, recipe, seed) for seed in seeds]
        for index, steps in enumerate(recipe.steps):
            weights = [run[index] for run in runs]
            reached = mean(accuracy(network, y, validation) for y in weights)
            if best is None or reached > best[0]:
                best = reached, recipe, steps, weights
    assert best is not None
    return Evaluation(best[1], best[2], best[0], tuple(accuracy(network, y, test) for y in best[3]))


def trained(data: Synthetic, network: Network, recipe: Recipe, seed: int) -> list[Parameters]:
    """Return the weights of a fresh network after each number of steps in the recipe."""
    weights = {name: value.requires_grad_() for name, value in network.start(seed, data.images.dtype).items()}
    optimizer = recipe.of(weights)
    generator = Generator().manual_seed(mixed("training", seed))
    found = []
    for step in range(1, recipe.steps[-1] + 1):
        images, targets = data.images, data.targets
        if recipe.batch_size is not None and recipe.batch_size < len(images):
            rows = torch.randperm(len(images), generator=generator)[: recipe.batch_size]
            images, targets = images[rows], targets[rows]
        if recipe.augment > 0:
            images = moved(images, recipe.augment, generator)
        optimizer.zero_grad()
        training_loss(network.logits(weights, images), targets, data.loss).backward()
        optimizer.step()
        if step in recipe.steps:
            found.append({name: value.detach().clone() for name, value in weights.items()})
    return found


def accuracy(network: Network, y: Parameters, data: Part) -> float:
    """Return the share of images that a network classifies rightly."""
    with torch.no_grad():
        parts = [network.logits(y, images).argmax(1) for images in data.inputs.split(CHUNK)]
    return float((torch.cat(parts) == data.targets).double().mean())


def moved(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Return images `[b, c, h, w]` each shifted, turned and stretched at random; see `Recipe.augment`.

    What comes in from outside has the value of the image's nearest border.

    Raises:
        InvalidProblem: they are no such images.
    """
    if images.dim() != 4:
        raise InvalidProblem(f"augment > 0 needs images [b, c, h, w], got {list(images.shape)}.")
    draws = share * (2 * torch.rand((5, len(images)), generator=generator, dtype=images.dtype) - 1)
    turn = draws[0] * math.pi / 3
    wide, high = 1 + draws[1] / 2, 1 + draws[2] / 2
    rows = [
        torch.stack([turn.cos() * wide, -turn.sin() * wide, draws[3] / 2], 1),
        torch.stack([turn.sin() * high, turn.cos() * high, draws[4] / 2], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
