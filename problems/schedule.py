"""Learning rates: the schedule of a short training, learned through it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilevel.data import Full, Shuffled
from bilevel.optimizers import SGD, Adam, Cosine, Knots
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import Parts
from bilevel.problems._networks import judge, loss_of, tanh_network
from bilevel.problems.digits import mnist_parts
from bilevel.problems.hyper_cleaning import SOURCE
from bilevel.replay import StoreAll
from bilevel.sets import Box
from bilevel.solvers.metagradient import Metagradient

LOWEST, START, HIGHEST = 1e-3, 0.05, 2.0
"""Rates: the bounds, and the constant from which the search starts."""


def learning_rates(
    seed: int = 0,
    *,
    parts: Parts | None = None,
    train_steps: int = 100,
    knots: int = 10,
    hidden: int = 64,
    momentum: float = 0.9,
    batch_size: int = 100,
    fresh: bool = True,
) -> Task:
    """Learn the learning-rate schedule of a short training of a network on MNIST digits.

        f(x) = validation loss after `train_steps` steps of SGD with the rates exp(x), interpolated between knots

    The rates are not in the lower objective, so that implicit differentiation cannot see them: `task.solver` trains.

    Args:
        seed: of the split and of the network's start.
        parts: the data; 3,000 digits to train on and 1,000 to validate on if None.
        train_steps: of each training.
        knots: numbers that make up the schedule; `train_steps` of them give each step its own.
        hidden: tanh units.
        momentum: of SGD.
        batch_size: of the training.
        fresh: give each training other batches. If not, the schedule comes to fit the order of the first ones: the
            validation loss of that one training falls further, and that of others less.

    Raises:
        InvalidProblem: an option is out of range, or mlxtend is not installed.

    References:
        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML training with metagradient descent", 2025, arXiv
        2503.13751.

    Example:
        >>> task = learning_rates(train_steps=20)
        >>> task.x0.shape, type(task.solver).__name__
        (torch.Size([10]), 'Metagradient')
    """
    parts = mnist_parts(seed) if parts is None else parts
    model = tanh_network(seed, parts.train.inputs, hidden)

    def loss(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        return loss_of(model, y, batch)

    problem = Problem(
        upper=loss,
        lower=loss,
        upper_data=Full(tuple(parts.validation)),
        lower_data=Shuffled(tuple(parts.train), batch_size),
        upper_set=Box(math.log(LOWEST), math.log(HIGHEST)),
    )
    solver = Metagradient(
        upper=Adam(lr=Cosine(0.2, end=0.01, steps=50)),
        lower=SGD(Knots(steps=train_steps), momentum),
        lower_steps=train_steps,
        fresh=fresh,
        schedule=StoreAll(),
    )
    return Task(
        "learning-rates",
        problem,
        torch.full((knots,), math.log(START), dtype=parts.train.inputs.dtype),
        model.parameters(),
        steps=50,
        evaluate=judge(model, parts.test),
        source=SOURCE,
        solvers={type(solver).__name__: solver},
    )
