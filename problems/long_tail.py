"""Class imbalance: one weight per class is learned, so that a model of long-tailed digits does well on all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.data import Full
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import Part, Split, mnist
from bilevel.problems.hyper_cleaning import SOURCE, apart
from bilevel.regularizers import L2
from bilevel.sets import Box
from bilevel.status import InvalidProblem

MOST = 300
"""Training examples of the most frequent class."""
CHECKED = 30
"""Validation examples of each class."""


def long_tail(seed: int = 0, *, imbalance: float = 50.0, decay: float = 0.01, device: str = "cpu") -> Task:
    """Weight the classes of long-tailed MNIST digits by the hypergradient of a balanced validation loss.

        g = mean_i exp(x_(class of i)) l_i(y) + decay ‖y‖^2 / 2,   f = mean of l over 30 digits of each class

    with the cross-entropy l of a linear model. Class c has `300 imbalance^(-c / 9)` training digits, from 300 down to 6
    by default. `task.evaluate` tells the accuracy on 1,000 test digits, 100 of each class, and that of the three rarest
    classes. x = 0 is plain training; `log(n / 10 n_c)` weighs classes by inverse frequency.

    Args:
        seed: of the choice of digits.
        imbalance: > 1, the size of the most frequent class over that of the rarest.
        decay: of the model.
        device: of all tensors.

    Raises:
        InvalidProblem: an option is out of range, or mlxtend is not installed.
    """
    if not imbalance >= 1 or not decay > 0:
        raise InvalidProblem(f"imbalance must be at least 1 and decay > 0, got {imbalance} and {decay}.")
    split = tailed(seed, imbalance)
    train, validation, test = (Part(part.inputs.to(device), part.targets.to(device)) for part in split)

    def lower(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (x[batch[1]].exp() * F.cross_entropy(logits(y, batch[0]), batch[1], reduction="none")).mean()

    def upper(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits(y, batch[0]), batch[1])

    problem = Problem(
        upper=upper, lower=lower, upper_data=Full(tuple(validation)), lower_data=Full(tuple(train)),
        regularizer=L2(decay), upper_set=Box(-5.0, 5.0),
    )  # fmt: skip

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        right = (logits(y, test.inputs).argmax(-1) == test.targets).double()
        return {"test_accuracy": float(right.mean()), "rare_accuracy": float(right[test.targets >= 7].mean())}

    y0 = {"weight": torch.zeros(784, 10, device=device), "bias": torch.zeros(10, device=device)}
    return Task("long-tail", problem, torch.zeros(10, device=device), y0, steps=60, evaluate=evaluate, source=SOURCE)


def tailed(seed: int, imbalance: float) -> Split:
    """Choose long-tailed digits to train on, balanced ones to validate, and the test digits."""
    data, (free, held) = mnist(), apart()
    order = free[torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))]
    train, validation = [], []
    for digit in range(10):
        own = order[data.targets[order] == digit]
        validation.append(own[:CHECKED])
        train.append(own[CHECKED : CHECKED + round(MOST * imbalance ** (-digit / 9))])
    rows = torch.cat(train), torch.cat(validation), held
    return Split(*(Part(data.inputs[chosen], data.targets[chosen]) for chosen in rows))


def logits(y: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return the scores of a linear model."""
    return images @ y["weight"] + y["bias"]
