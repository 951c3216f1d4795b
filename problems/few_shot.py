"""Few-shot learning: a start from which few steps adapt a network to a new task, learned from many other tasks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, vmap

from bilevel.data import episodes
from bilevel.data.episodes import Draw
from bilevel.modules import FunctionalModule
from bilevel.optimizers import Adam
from bilevel.problem import Problem
from bilevel.solvers._base import Solver
from bilevel.solvers.published import maml
from bilevel.status import InvalidProblem

Weights: TypeAlias = dict[str, Tensor]
Examples: TypeAlias = tuple[Tensor, Tensor]
Loss: TypeAlias = Callable[[Weights, Examples], Tensor]
CHUNK = 100
"""Tasks adapted at a time: more would not be faster, and take more memory."""


class Adaptation(NamedTuple):
    """How a task is learned from its start: `steps` gradient steps of length `lr` on the loss of its support examples.

        y <- y - lr (d loss / dy + strength (y - x)),   y = x at first

    Args:
        lr: step length.
        steps: how many.
        strength: >= 0, of the proximal term that keeps y near its start (implicit MAML).
    """

    lr: float
    steps: int
    strength: float = 0.0


def few_shot(
    net: FunctionalModule,
    loss: Callable[[Tensor, Tensor], Tensor],
    draw: Draw,
    *,
    tasks: int,
    lower_steps: int,
    strength: float = 0.0,
) -> Problem:
    """State the learning of a start: x are the weights from which every task is adapted, y those after it.

        g_i = loss on the support examples of task i + strength ‖y - x‖^2 / 2,   f_i = loss on its query examples

    Args:
        net: y, inputs -> predictions.
        loss: predictions, targets -> 0-dim.
        draw: generator -> (support, query), each (inputs, targets) with a leading dimension of tasks.
        tasks: drawn at each upper step.
        lower_steps: gradient steps of an adaptation; the solver must take as many.
        strength: >= 0; what implicit MAML needs, and the others do not.

    Raises:
        InvalidProblem: an option is out of range.

    Example:
        >>> import bilevel
        >>> def draw(generator):  # 4 tasks: lines through 0, each with a slope of its own, five points of each
        ...     slope, z = (torch.randn(4, n, 1, generator=generator) for n in (1, 5))
        ...     return (z, slope * z), (z, slope * z)
        >>> net = bilevel.functional(torch.nn.Linear(1, 1))
        >>> problem = few_shot(net, torch.nn.functional.mse_loss, draw, tasks=4, lower_steps=2)
        >>> solution = bilevel.solve(problem, bilevel.maml(0.1, lower_steps=2), net.parameters(), steps=3)
        >>> solution.status.name
        'COMPLETED'
    """
    check_counts(tasks=tasks, lower_steps=lower_steps)
    if not strength >= 0:
        raise InvalidProblem(f"strength must be >= 0, got {strength}.")

    def upper(x: Weights, y: Weights, batch: Examples) -> Tensor:
        return loss(net(y, batch[0]), batch[1])

    def lower(x: Weights, y: Weights, batch: Examples) -> Tensor:
        value = loss(net(y, batch[0]), batch[1])
        if strength == 0:
            return value
        return value + 0.5 * strength * sum(((y[name] - x[name]).square().sum() for name in y), value.new_zeros(()))

    support, query = episodes(draw, lower_steps)
    return Problem(
        upper=upper,
        lower=lower,
        upper_data=query,
        lower_data=support,
        lower_init=lambda x: {name: leaf.expand(tasks, *leaf.shape) for name, leaf in x.items()},
        blocks=tasks,
    )


def adapted(loss: Loss, x: Weights, support: Examples, adaptation: Adaptation) -> Weights:
    """Return the weights of every task after adaptation, with a leading dimension of tasks.

    Args:
        loss: weights, examples -> 0-dim.
        x: the start, the same for all tasks.
        support: examples with a leading dimension of tasks.
        adaptation: how.
    """
    lr, strength = adaptation.lr, adaptation.strength
    y = {name: leaf.detach().expand(len(support[0]), *leaf.shape) for name, leaf in x.items()}
    slope = vmap(grad(loss), in_dims=(0, 0))
    for _ in range(adaptation.steps):
        slopes = slope(y, support)
        y = {name: leaf - lr * (slopes[name] + strength * (leaf - x[name].detach())) for name, leaf in y.items()}
    return y


def scores(
    loss: Loss, score: Loss, x: Weights, tasks: tuple[Examples, Examples], adaptation: Adaptation
) -> Tensor:  # fmt: skip
    """Adapt to every task on its support examples, and return its score on the query examples, `[tasks]`."""
    found = []
    with torch.no_grad():
        for i in range(0, len(tasks[0][0]), CHUNK):
            support, query = ((inputs[i : i + CHUNK], targets[i : i + CHUNK]) for inputs, targets in tasks)
            found.append(vmap(score)(adapted(loss, x, support, adaptation), query))
    return torch.cat(found)


def interval(values: Tensor) -> tuple[float, float]:
    """Return the mean over tasks, and half the width of its 95 % confidence interval (1.96 standard errors).

    Args:
        values: `[tasks]`, one score of each.

    Example:
        >>> mean, half = interval(torch.tensor([0.0, 1.0]).repeat(300))
        >>> mean, round(half, 3)
        (0.5, 0.04)
    """
    numbers = values.double()
    return float(numbers.mean()), 1.96 * float(numbers.std()) / math.sqrt(len(numbers))


def check_counts(**counts: int) -> None:
    """Refuse counts that are not positive.

    Raises:
        InvalidProblem: one is not.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidProblem(f"{name} must be a positive int, got {value!r}.")


def learners(lr: float, lower_steps: int) -> dict[str, Solver[Any]]:
    """Return the solvers that few-shot tasks are made for, by name."""
    options: dict[str, Any] = {"lr": lr, "lower_steps": lower_steps, "upper": Adam(lr=0.003)}
    return {"maml": maml(**options), "first-order maml": maml(first_order=True, **options)}
