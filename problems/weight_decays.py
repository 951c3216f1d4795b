"""One weight decay for every weight of a network: as many hyperparameters as weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.data import Full
from bilevel.dry_run import open_oracles
from bilevel.linear import CG
from bilevel.optimizers import LBFGS
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import Parts
from bilevel.problems._networks import judge, loss_of, tanh_network
from bilevel.problems.digits import SMALL_SOURCE, small_parts
from bilevel.regularizers import L2
from bilevel.sets import Box
from bilevel.solvers import implicit
from bilevel.status import InvalidProblem

GRID = (-11.0, -10.0, -9.0, -8.0, -7.0, -6.0, -5.0, -4.0)
"""Logarithms of the single decays that are tried first."""


def weight_decays(
    seed: int = 0,
    *,
    parts: Parts | None = None,
    hidden: int = 16,
    grid: tuple[float, ...] = GRID,
    train_steps: int = 200,
) -> Task:
    """Learn the decay of every weight of a network, from the best single decay on.

        g = loss on the training data + sum_i exp(x_i) y_i^2 / 2,   f = loss on the validation data

    The start is the best of a grid of single decays by validation loss, each trained by L-BFGS. x has as many entries
    as y: f can be pressed down far below the loss on any other data. Take the x that does best on data of its own
    (`KeepBest` on `parts.check`), and look at the gap between `validation_loss` and `test_loss`.

    Args:
        seed: of the split and of the network's start.
        parts: the data; 600, 300 and 300 of scikit-learn's digits if None.
        hidden: tanh units.
        grid: logarithms of decays, at least one.
        train_steps: L-BFGS steps of each.

    Raises:
        InvalidProblem: the grid is empty, or scikit-learn is not installed.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", AISTATS 2020
        (one decay a weight, and how far it overfits the validation data).

    Example:
        >>> task = weight_decays(hidden=4, grid=(-6.0, -5.0), train_steps=50)
        >>> {name: leaf.shape for name, leaf in task.x0.items()} == {n: y.shape for n, y in task.y0.items()}
        True
    """
    if not grid:
        raise InvalidProblem("grid needs at least one logarithm of a decay, got none.")
    parts = small_parts(seed) if parts is None else parts
    model = tanh_network(seed, parts.train.inputs, hidden)

    def loss(x: Any, y: dict[str, Tensor], batch: Any) -> Tensor:
        return loss_of(model, y, batch)

    problem = Problem(
        upper=loss,
        lower=loss,
        upper_data=Full(tuple(parts.validation)),
        lower_data=Full(tuple(parts.train)),
        regularizer=L2(lambda x: {name: leaf.exp() for name, leaf in x.items()}),
        upper_set=Box(-14.0, 4.0),
    )
    tried = [_with_one_decay(problem, model.parameters(), decay, train_steps) for decay in grid]
    _, x0, y0 = min(tried, key=lambda each: each[0])
    network = judge(model, parts.test)

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        with torch.no_grad():
            said = {
                f"{name}_loss": float(loss_of(model, y, part))
                for name, part in parts._asdict().items()
                if name != "test" and len(part.targets)
            }
        said |= network(x, y)
        return said | {"gap": said["test_loss"] - said["validation_loss"]}

    # A network curves downwards here and there; damping 0.001 is more than that.
    solver = implicit(linear=CG(damping=1e-3, max_steps=50), lower_steps=50)
    return Task(
        "weight-decays", problem, x0, y0,
        steps=30, evaluate=evaluate, source=SMALL_SOURCE, solvers={"implicit": solver},
    )  # fmt: skip


def _with_one_decay(problem: Problem, start: dict[str, Tensor], decay: float, steps: int) -> tuple[float, Any, Any]:
    """Return the validation loss with one decay for all weights, that x, and the weights."""
    x = {name: torch.full_like(leaf, decay) for name, leaf in start.items()}
    oracles, flat_x, flat_y = open_oracles(problem, x, start, needs_hvp=False)
    found = LBFGS(tol=1e-6, max_steps=steps).minimize(lambda y: oracles.lower_gradient(flat_x, y), flat_y)
    return float(oracles.upper_value(flat_x, found.y)), x, oracles.y_layout.unflatten(found.y)
