"""Few-shot regression of sine waves: learn a start from which few points tell amplitude and phase."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from bilevel.data._base import moved
from bilevel.modules import functional
from bilevel.problems._base import Task
from bilevel.problems.few_shot import Adaptation, Examples, Weights, check_counts, few_shot, interval, learners, scores

JUDGED = 1000
ENDS = 5.0
"""Inputs lie between -5 and 5."""


def sine(
    seed: int = 0, *, shots: int = 10, queries: int = 10, tasks: int = 25, lower_steps: int = 5, lr: float = 0.02,
    strength: float = 0.0, hidden: int = 40, eval_steps: int | None = None, dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Task:  # fmt: skip
    """Learn the start of a small network from which few gradient steps fit a sine wave to ten points of it.

    A task is `A sin(z - p)` with A uniform in [0.1, 5] and p uniform in [0, pi]; inputs z are uniform in [-5, 5]. The
    network is 1-40-40-1 with ReLU.

    Args:
        seed: of the network's start. (The tasks of each step are drawn by the seed of the solve.)
        shots: points to learn from.
        queries: points to be asked about.
        tasks: of each upper step.
        lower_steps: gradient steps of an adaptation; the solver must take as many.
        lr: their length where `task.evaluate` adapts; the solver should take the same.
        strength: of the proximal term of implicit MAML; 0 for the others.
        hidden: units of each layer.
        eval_steps: gradient steps of `task.evaluate`, as many as `lower_steps` if None; 0 does not adapt.
        dtype: of all numbers.
        device: of all tensors.

    Raises:
        InvalidProblem: an option is out of range.

    Notes:
        `task.evaluate` gives the mean squared error over 1,000 tasks that no step sees, and half the width of its 95 %
        interval. A constant prediction of 0 has an error of about 4.2.

    References:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017 (section
        5.1).
    """
    check_counts(shots=shots, queries=queries, tasks=tasks, lower_steps=lower_steps, hidden=hidden)
    adaptation = Adaptation(lr, lower_steps, strength)
    net = functional(_network(seed, hidden).to(device, dtype))

    def draw(count: int, generator: Generator) -> tuple[Examples, Examples]:
        drawn = draw_waves(count, shots, queries, generator)
        return tuple(tuple(part.to(device, dtype) for part in half) for half in drawn)  # type: ignore[return-value]

    problem = few_shot(net, F.mse_loss, partial(draw, tasks), tasks=tasks, lower_steps=lower_steps, strength=strength)
    judge = adaptation if eval_steps is None else adaptation._replace(steps=eval_steps)
    asked = moved(draw(JUDGED, Generator().manual_seed(1)), device)

    def loss(y: Weights, batch: Examples) -> Tensor:
        return F.mse_loss(net(y, batch[0]), batch[1])

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        mean, half = interval(scores(loss, loss, x, asked, judge))
        return {"test_mse": mean, "interval": half}

    return Task(
        "sine", problem, net.parameters(), None, steps=300, evaluate=evaluate, source="made up: no data",
        solvers=learners(lr, lower_steps),
    )  # fmt: skip


def draw_waves(tasks: int, shots: int, queries: int, generator: Generator) -> tuple[Examples, Examples]:
    """Draw sine waves, and points of each.

    Args:
        tasks: how many waves.
        shots: points of each to learn from.
        queries: points of each to be asked about.
        generator: draws.

    Returns:
        `(inputs [tasks, shots, 1], values [tasks, shots, 1])`, and likewise with queries.
    """
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    inputs = ENDS * (2 * torch.rand(tasks, shots + queries, 1, generator=generator) - 1)
    values = amplitude * (inputs - phase).sin()
    return (inputs[:, :shots], values[:, :shots]), (inputs[:, shots:], values[:, shots:])


def _network(seed: int, hidden: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
