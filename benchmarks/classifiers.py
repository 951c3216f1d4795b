"""Classifiers of digits trained in the usual way, on data of ready problems."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel import LBFGS
from bilevel.problems import Task
from bilevel.problems._datasets import Part, mnist
from bilevel.problems.augmentation import augmented
from bilevel.problems.hyper_cleaning import apart

LOOK = 50
"""SGD steps between two looks at the validation accuracy; the best network of these is kept."""
BATCH = 100


def sgd(
    task: Task, part: Part, judge: Part, lr: float, seed: int, steps: int, x: dict[str, Tensor] | None = None, *,
    look: int = LOOK,
) -> tuple[float, int, nn.Module]:  # fmt: skip
    """Train the task's network from its start; return the best look's validation accuracy, its step and network.

    Args:
        task: gives the start.
        part: to train on.
        judge: to choose the step by.
        lr: of SGD without momentum.
        seed: of batches and augmentation.
        steps: of SGD.
        x: magnitudes of augmentation; None for none.
        look: steps between two looks; the last step is one, too.
    """
    net, best = network(task.y0), (-1.0, 0, network(task.y0))
    optimizer = torch.optim.SGD(net.parameters(), lr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.cat([torch.randperm(len(part.targets)) for _ in range(steps * BATCH // len(part.targets) + 1)])
        for step in range(1, steps + 1):
            rows = order[(step - 1) * BATCH : step * BATCH]
            images = part.inputs[rows] if x is None else augmented(x, part.inputs[rows])
            optimizer.zero_grad()
            F.cross_entropy(net(images), part.targets[rows]).backward()
            optimizer.step()
            if step == steps or step % look == 0:
                with torch.no_grad():
                    found = accuracy(net(judge.inputs), judge)
                if found > best[0]:
                    best = found, step, network(dict(net.named_parameters()))
    return best


def network(y: Any) -> nn.Module:
    """Return 784-64-10 with tanh, with a copy of some parameters."""
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10))
    net.load_state_dict({name: leaf.detach().clone() for name, leaf in y.items()})
    return net


def linear(part: Part, decay: float, weights: Tensor | None = None) -> Tensor:
    """Minimize the mean of weighted cross-entropies of a linear model, plus decay; return `[785, 10]`."""
    shape = part.inputs.shape[1] + 1, 10

    def objective(flat: Tensor) -> tuple[Tensor, Tensor]:
        y = flat.view(shape).detach().requires_grad_()
        with torch.enable_grad():
            losses = F.cross_entropy(scores(y, part), part.targets, reduction="none")
            loss = (losses if weights is None else weights * losses).mean() + 0.5 * decay * y.square().sum()
            (gradient,) = torch.autograd.grad(loss, y)
        return loss.detach(), gradient.flatten()

    start = part.inputs.new_zeros(shape).flatten()
    return LBFGS(tol=1e-4, max_steps=1000).minimize(objective, start).y.view(shape)


def scores(y: Tensor, part: Part) -> Tensor:
    """Return the scores of a linear model, `[n, 10]`."""
    return torch.addmm(y[-1], part.inputs, y[:-1])


def accuracy(found: Tensor, part: Part) -> float:
    """Return the share of examples whose largest score is the right one's."""
    return float((found.argmax(-1) == part.targets).double().mean())


def parts(task: Task) -> tuple[Part, Part]:
    """Return the training and the validation data of a task."""
    lower: Any = task.problem.lower_data
    upper: Any = task.problem.upper_data
    return Part(*lower.data), Part(*upper.data)


def held_out() -> Part:
    """Return the 1,000 test digits."""
    rows = apart()[1]
    return Part(mnist().inputs[rows], mnist().targets[rows])
