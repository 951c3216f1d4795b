"""The door to gradients through training: one training run, differentiated on request."""

from __future__ import annotations

from typing import Any

from bilevel.dry_run import open_oracles
from bilevel.hypergradients._base import Hypergradient, TrainingRun
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.layout import Variables
from bilevel.problem import Problem
from bilevel.training import with_tensors


def metagradient(
    problem: Problem, x: Variables, y0: Variables | None = None, *, seed: int = 0, step: int = 0, **options: Any
) -> Hypergradient:
    """Train from y0, and differentiate the upper objective at the end in x and in the start.

        h = d f(x, y_T) / dx,    y_T = T lower steps from y0 (or from `lower_init(x)`, through which x may act too)

    It is the derivative of the training run as it is; nothing is assumed about minima.

    Args:
        problem: the statement.
        x: upper variables.
        y0: initial weights; `problem.lower_init(x)` if None.
        seed: of batches and of randomness inside the objectives.
        step: which upper batch.
        options: of `Unrolled` but `restart`: lower, steps, truncate, schedule, store, microbatches, verify.

    Returns:
        The gradient with its certificate; `run` has the trained weights, f there, the gradients in the initial weights
        and in the initial state of the optimizer, and what the visit took.

    Raises:
        InvalidProblem: and relatives, from the dry run.
        NonFinite: a derivative is not finite; the message says from which step down.
        ReplayMismatch: a step run again gave another state.
        OutOfMemory: with the bytes and a schedule that takes less.

    Cost:
        That of `Unrolled`.

    References:
        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML training with metagradient descent", 2025, arXiv
        2503.13751 (REPLAY). Those of `Unrolled`.

    Example:
        >>> import bilevel, torch
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, batch: 0.5 * (y - 1.0).square(), lower=lambda x, y, batch: 0.5 * y.square())
        >>> sgd = bilevel.SGD(lambda x, step: x[step])  # x: one rate a step
        >>> h = metagradient(problem, torch.tensor([0.5, 0.5]), torch.tensor(2.0), lower=sgd, steps=2)
        >>> h.gradient, h.run.initial  # y2 = (1 - x0) (1 - x1) y0
        (tensor([0.5000, 0.5000]), tensor(-0.1250))
    """
    # A start that is given stands: x acts through lower_init only where that gives the start.
    estimator = Unrolled(restart=y0 is None, **options)
    oracles, flat_x, flat_y = open_oracles(problem, x, y0, seed=seed, trains=True)
    state = estimator.init(oracles, flat_x, flat_y)
    found, visit = estimator.differentiate(oracles, flat_x, flat_y, state, step, through_start=y0 is None)
    run = TrainingRun(
        value=visit.upper.value,
        y=oracles.y_layout.unflatten(visit.last.y),
        initial=oracles.y_layout.unflatten(visit.initial.y),
        optimizer=with_tensors(visit.last.optimizer, list(visit.initial.optimizer)),
        visited=visit.visited,
    )
    return Hypergradient(oracles.x_layout.unflatten(found.gradient), found.certificate, run)
