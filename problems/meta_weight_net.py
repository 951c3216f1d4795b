"""Meta-Weight-Net: a small network says from an example's loss how much the example should weigh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel.data import Full, Shuffled
from bilevel.modules import functional
from bilevel.optimizers import SGD, Adam
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems.hyper_cleaning import SOURCE, noisy_digits
from bilevel.solvers import unrolled
from bilevel.status import InvalidProblem


def meta_weight_net(
    seed: int = 0, *, noise: float = 0.5, units: int = 100, hidden: int = 64, batch_size: int = 100,
    device: str = "cpu",
) -> Task:  # fmt: skip
    """Learn a weight of each example as a function of its loss, on MNIST digits with wrong labels.

        g = sum_i V(l_i(y); x) l_i(y) / sum_i V(l_i(y); x) over a mini-batch,   f = mean of l over 1,000 clean digits

    V is a network 1-100-1 with ReLU and a sigmoid at the end; x are its parameters, whatever the number of training
    examples. y are the parameters of a network 784-64-10 with tanh. Half of the 3,000 training labels were drawn anew.

    Args:
        seed: of the split, the noise, and both networks' starts.
        noise: probability that a training label is drawn anew.
        units: of V.
        hidden: of the network that is trained.
        batch_size: of the training data.
        device: of all tensors.

    Raises:
        InvalidProblem: an option is out of range, or mlxtend is not installed.

    Notes:
        Weights are divided by their sum: if not, V soon weighs all examples fully, because that trains faster. Here V
        is part of g in y, too; the paper's program cuts its derivative, so that its lower step is the gradient of no
        objective. Keep the best x and y of a solve: later ones fit the examples that V likes by heart.

    References:
        Shu, Xie, Yi, Zhao, Zhou, Xu, Meng, "Meta-Weight-Net: learning an explicit mapping for sample weighting",
        NeurIPS 2019 (Algorithm 1, with one lower step for each upper step; the solver that the task names takes five).
    """
    if not 0 <= noise <= 1 or min(units, hidden, batch_size) < 1:
        raise InvalidProblem(
            f"noise must be from 0 to 1 and sizes positive, got noise={noise}, units={units}, hidden={hidden}, "
            f"batch_size={batch_size}."
        )
    digits = noisy_digits(seed, noise=noise)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weigher = functional(weighing(units).to(device))
        net = functional(nn.Sequential(nn.Linear(784, hidden), nn.Tanh(), nn.Linear(hidden, 10)).to(device))
    images, labels = digits.images.to(device), digits.given.to(device)
    validation, test = (tuple(each.to(device) for each in part) for part in (digits.validation, digits.test))

    def lower(x: dict[str, Tensor], y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = F.cross_entropy(net(y, batch[0]), batch[1], reduction="none")
        weights: Tensor = weigher(x, losses[:, None])[:, 0]
        return (weights * losses).sum() / weights.sum()

    def upper(x: dict[str, Tensor], y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(y, batch[0]), batch[1])

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        with torch.no_grad():
            right = net(y, test[0]).argmax(-1) == test[1]
            losses = F.cross_entropy(net(y, images), labels, reduction="none")
            weights = weigher(x, losses[:, None])[:, 0]
        wrong = digits.wrong.to(device)
        return {
            "test_accuracy": float(right.double().mean()),
            "weight_right": float(weights[~wrong].mean()),
            "weight_wrong": float(weights[wrong].mean()),
        }

    problem = Problem(
        upper=upper, lower=lower, upper_data=Full(validation), lower_data=Shuffled((images, labels), batch_size)
    )
    return Task(
        "meta-weight-net", problem, weigher.parameters(), net.parameters(), steps=300, evaluate=evaluate, source=SOURCE,
        solvers={"unrolled": unrolled(lower=SGD(0.2), lower_steps=5, upper=Adam(0.003))},
    )  # fmt: skip


def weighing(units: int) -> nn.Module:
    """Return V: a loss `[n, 1]` -> a weight `[n, 1]` between 0 and 1."""
    return nn.Sequential(nn.Linear(1, units), nn.ReLU(), nn.Linear(units, 1), nn.Sigmoid())
