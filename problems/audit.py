"""An audit of a training: how far can small changes of a few training images push the held-out loss up?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.data import Full, Shuffled
from bilevel.optimizers import SGD, Cosine, Sign
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import Parts
from bilevel.problems._networks import judge, loss_of, tanh_network
from bilevel.problems.digits import mnist_parts
from bilevel.problems.hyper_cleaning import SOURCE
from bilevel.replay import StoreAll
from bilevel.sets import Box
from bilevel.solvers.metagradient import Metagradient
from bilevel.status import InvalidProblem


def robustness_audit(
    seed: int = 0,
    *,
    parts: Parts | None = None,
    share: float = 0.03,
    radius: float = 0.3,
    train_steps: int = 150,
    hidden: int = 64,
    batch_size: int = 100,
    lr: float = 0.1,
    momentum: float = 0.9,
) -> Task:
    """Find the worst change, bounded in every pixel, of a few training images: an audit of one's own training.

        f(x) = -(validation loss after `train_steps` steps of SGD);  |x - originals| <= radius, x in [0, 1]

    It bounds from below what faulty or hostile data of this amount could do to this training, and tells how much a
    defense (cleaning, clipping, another rate) takes off that. Labels stay as they are. Which images change is drawn at
    random, and x are those images.

    Args:
        seed: of the split, of the images that may change, and of the network's start.
        parts: the data; 3,000 digits to train on and 1,000 to validate on if None.
        share: of the training images that may change, in (0, 1].
        radius: of the change of every pixel, >= 0; pixels are in [0, 1].
        train_steps: of each training.
        hidden: tanh units.
        batch_size: of the training.
        lr: of SGD.
        momentum: of SGD.

    Raises:
        InvalidProblem: an option is out of range, or mlxtend is not installed.

    Notes:
        Every training gets other batches. If all saw the same ones, the change would fit their order, and do
        little to any other training.

    References:
        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML training with metagradient descent", 2025, arXiv
        2503.13751, on the worst case of small parts of the data.

    Example:
        >>> task = robustness_audit(share=0.01, train_steps=10)
        >>> task.x0.shape, float(task.evaluate(task.x0, task.y0)["change"])
        (torch.Size([30, 784]), 0.0)
    """
    if not (0 < share <= 1 and radius >= 0):
        raise InvalidProblem(f"share must be in (0, 1] and radius >= 0, got {share} and {radius}.")
    parts = mnist_parts(seed) if parts is None else parts
    images, labels = parts.train
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[
        : max(1, round(share * len(labels)))
    ]
    place = torch.full((len(labels),), -1)
    place[chosen] = torch.arange(len(chosen))
    originals = images[chosen]
    model = tanh_network(seed, images, hidden)

    def lower(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        seen, label, index = batch
        row = place[index]
        shown = torch.where((row >= 0)[:, None], x[row.clamp_min(0)], seen)
        return loss_of(model, y, (shown, label))

    def upper(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        return -loss_of(model, y, batch)

    problem = Problem(
        upper=upper,
        lower=lower,
        upper_data=Full(tuple(parts.validation)),
        lower_data=Shuffled((images, labels), batch_size, with_index=True),
        upper_set=Box((originals - radius).clamp_min(0.0), (originals + radius).clamp_max(1.0)),
    )
    solver = Metagradient(
        upper=Sign(Cosine(radius / 5, end=radius / 40, steps=30)),
        lower=SGD(lr, momentum),
        lower_steps=train_steps,
        fresh=True,
        schedule=StoreAll(),
    )
    network = judge(model, parts.test)

    def evaluate(x: Tensor, y: Any) -> dict[str, Any]:
        return network(x, y) | {"change": float((x - originals).abs().max())}

    return Task(
        "robustness-audit",
        problem,
        originals.clone(),
        model.parameters(),
        steps=30,
        evaluate=evaluate,
        source=SOURCE,
        solvers={type(solver).__name__: solver},
    )


def random_change(task: Task, seed: int = 0) -> Tensor:
    """Return the images of an audit, every pixel moved to one end of its range at random: what to compare with.

    Args:
        task: of `robustness_audit`.
        seed: of the choice.
    """
    assert isinstance(task.problem.upper_set, Box)
    assert isinstance(task.x0, Tensor)
    generator = torch.Generator().manual_seed(seed)
    low, high = task.problem.upper_set.lower, task.problem.upper_set.upper
    ends: Tensor = torch.where(torch.rand(task.x0.shape, generator=generator) < 0.5, low, high)
    return ends
