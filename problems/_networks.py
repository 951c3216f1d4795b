"""What problems with gradients through training share: a small network, its losses, its judge, another training."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel.dry_run import open_oracles
from bilevel.layout import Variables, named_leaves, rebuild
from bilevel.modules import FunctionalModule, functional
from bilevel.problems._base import Task
from bilevel.problems._datasets import Part
from bilevel.problems._linear import Judge
from bilevel.solvers.metagradient import Metagradient
from bilevel.status import InvalidProblem
from bilevel.training import Training


def tanh_network(seed: int, inputs: Tensor, hidden: int, classes: int = 10) -> FunctionalModule:
    """Return a network with one hidden layer of tanh units, which is smooth: gradients through training mean more."""
    layers = nn.Linear(inputs.shape[1], hidden), nn.Linear(hidden, classes)
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1]).to(inputs.dtype)
    with torch.no_grad():
        for parameter, value in zip(
            net.parameters(), redrawn(dict(net.named_parameters()), seed).values(), strict=True
        ):
            parameter.copy_(value)
    return functional(net)


def redrawn(y: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return another start: matrices by Glorot and Bengio's rule, vectors 0."""
    generator = torch.Generator().manual_seed(seed)
    fresh = {}
    for name, leaf in y.items():
        fresh[name] = torch.zeros_like(leaf, requires_grad=False)
        if leaf.dim() > 1:
            nn.init.xavier_normal_(fresh[name], generator=generator)
    return fresh


def loss_of(model: FunctionalModule, y: dict[str, Tensor], part: Any) -> Tensor:
    """Return the mean cross-entropy of some examples."""
    return F.cross_entropy(model(y, part[0]), part[1])


def judge(model: FunctionalModule, test: Part) -> Judge:
    """Return what says how well a network does on examples that no solver has seen."""

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        with torch.no_grad():
            scores = model(y, test.inputs)
            accuracy = (scores.argmax(-1) == test.targets).double().mean()
            return {"test_accuracy": float(accuracy), "test_loss": float(F.cross_entropy(scores, test.targets))}

    return evaluate


def retrained(task: Task, x: Variables, seed: int | None = None) -> Any:
    """Train at x as the task's own solver does, and return the weights.

    A solver trains from one start again and again. Whether what it found is of use for other starts, and other orders
    of the examples, is seen by training with another seed.

    Args:
        task: one whose `solver` is a `Metagradient`.
        x: upper variables.
        seed: of another start, and of other batches; None: the training that the solver saw, with its seed 0.

    Raises:
        InvalidProblem: the task has no such solver.

    Cost:
        One training.
    """
    solver = task.solver
    if not isinstance(solver, Metagradient):
        raise InvalidProblem(f"{task.name!r} has no Metagradient as its solver, so that no training belongs to it.")
    y0: Any = task.y0 if seed is None else redrawn(cast(dict[str, Tensor], task.y0), seed)
    oracles, flat_x, y = open_oracles(task.problem, x, y0, seed=seed or 0, needs_hvp=False, trains=True)
    training = Training(oracles, solver.lower, flat_x)
    state = training.start(y)
    for step in range(solver.lower_steps):
        state = training.advance(step, state)
    return rebuild(task.y0, iter([leaf.clone() for _, leaf in named_leaves(oracles.y_layout.unflatten(state.y))]))
