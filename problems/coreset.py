"""Coreset selection: few examples of a pool, weighted by the hypergradient, that train as well as many."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.data import Full
from bilevel.optimizers import LBFGS, Adam
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import Part
from bilevel.problems.hyper_cleaning import SOURCE, noisy_digits
from bilevel.problems.long_tail import logits
from bilevel.regularizers import L2
from bilevel.solvers import implicit
from bilevel.status import InvalidProblem


def coreset(
    seed: int = 0, *, size: int = 50, pool: int = 2000, strength: float = 1.0, decay: float = 0.01, noise: float = 0.0,
    device: str = "cpu",
) -> Task:  # fmt: skip
    """Choose 50 of 2,000 MNIST digits, so that a linear model trained on them alone does well.

        g = sum_i w_i(x) l_i(y) + decay ‖y‖^2 / 2 with w = softmax(x)
        f = mean of l over 1,000 other digits + strength max(0, H(w) - log 50), with the entropy H

    Weights spread evenly over 50 digits have the entropy log 50: the second term makes w concentrate on as many.
    Without it the 50 largest of many weights are those of odd digits, which train worse than random ones. After
    solving, `task.evaluate` trains on the 50 digits of largest weight, each counting the same, and tells the accuracy
    on test digits.

    Args:
        seed: of the pool.
        size: digits of the coreset.
        pool: digits to choose from, at most 3,000.
        strength: >= 0, of the second term of f.
        decay: > 0, of the model.
        noise: probability that a label of the pool is drawn anew.
        device: of all tensors.

    Raises:
        InvalidProblem: an option is out of range, or mlxtend is not installed.

    References:
        Borsos, Mutny, Krause, "Coresets via bilevel optimization for continual learning and streaming", NeurIPS 2020
        (weights of a pool as upper variables; their greedy selection is not used here).
    """
    if not 1 <= size <= pool <= 3000 or not decay > 0 or not 0 <= noise <= 1 or not strength >= 0:
        raise InvalidProblem(
            f"1 <= size <= pool <= 3000, decay > 0, 0 <= noise <= 1 and strength >= 0 are needed, got size={size}, "
            f"pool={pool}, decay={decay}, noise={noise}, strength={strength}."
        )
    digits = noisy_digits(seed, train=pool, noise=noise)
    images, labels = digits.images.to(device), digits.given.to(device)
    validation, test = (
        Part(part.inputs.to(device), part.targets.to(device)) for part in (digits.validation, digits.test)
    )

    def lower(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return x.softmax(0) @ F.cross_entropy(logits(y, batch[0]), batch[1], reduction="none")

    def upper(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        surplus = (entropy(x) - math.log(size)).relu()
        return F.cross_entropy(logits(y, batch[0]), batch[1]) + strength * surplus

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        rows = x.topk(size).indices
        weights = x.softmax(0)
        return {
            "test_accuracy": trained_accuracy(Part(images[rows], labels[rows]), test, decay),
            "weight_of_coreset": float(weights[rows].sum()),
        }

    problem = Problem(
        upper=upper, lower=lower, upper_data=Full(tuple(validation)), lower_data=Full((images, labels)),
        regularizer=L2(decay),
    )  # fmt: skip
    y0 = {"weight": torch.zeros(784, 10, device=device), "bias": torch.zeros(10, device=device)}
    x0 = torch.zeros(pool, device=device)
    return Task(
        "coreset", problem, x0, y0, steps=60, evaluate=evaluate, source=SOURCE,
        solvers={"implicit": implicit(upper=Adam(0.5))},
    )  # fmt: skip


def entropy(x: Tensor) -> Tensor:
    """Return the entropy of `softmax(x)`, 0-dim."""
    logs = x.log_softmax(0)
    return -(logs.exp() @ logs)


def trained_accuracy(part: Part, test: Part, decay: float) -> float:
    """Train the linear model on some digits, each counting the same, and return its accuracy on others."""
    shape = part.inputs.shape[1] + 1, 10

    def objective(flat: Tensor) -> tuple[Tensor, Tensor]:
        point = flat.view(shape).detach().requires_grad_()
        with torch.enable_grad():
            scores = torch.addmm(point[-1], part.inputs, point[:-1])
            loss = F.cross_entropy(scores, part.targets) + 0.5 * decay * point.square().sum()
            (gradient,) = torch.autograd.grad(loss, point)
        return loss.detach(), gradient.flatten()

    y = LBFGS(tol=1e-4, max_steps=300).minimize(objective, part.inputs.new_zeros(shape).flatten()).y.view(shape)
    right: Tensor = torch.addmm(y[-1], test.inputs, y[:-1]).argmax(-1) == test.targets
    return float(right.double().mean())
