"""What training carries from step to step, and its derivatives: forward a tangent, backward a cotangent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor


class TrainingState(NamedTuple):
    """Where training stands: the weights and the optimizer's state, counters included.

    Random numbers inside the objective are seeded by the step, and buffers of modules are functional, so that neither
    is part of the state.
    """

    y: Tensor
    optimizer: Any


class Cotangent(NamedTuple):
    """The derivative of the upper objective in a training state, and what has come out for x so far.

    Args:
        y: in the weights.
        optimizer: in the tensors of the optimizer's state, in order.
        x: in x, direct and through the steps visited, `[p]`.
        largest: the largest norm of `y` so far, 0-dim.
        contribution: norm of what the step visited last added to `x`, 0-dim.
    """

    y: Tensor
    optimizer: tuple[Tensor, ...]
    x: Tensor
    largest: Tensor
    contribution: Tensor


class Tangent(NamedTuple):
    """The derivative of a training state along one direction of x: in the weights, in the optimizer's tensors, and x.

    `x` is the direction itself, `[p]`.
    """

    y: Tensor
    optimizer: tuple[Tensor, ...]
    x: Tensor


def tensors_of(optimizer_state: Any) -> list[Tensor]:
    """Return the tensors of an optimizer's state (a NamedTuple, perhaps of others), in order."""
    found: list[Tensor] = []
    for field in optimizer_state:
        if isinstance(field, Tensor):
            found.append(field)
        elif isinstance(field, tuple):
            found += tensors_of(field)
    return found


def with_tensors(optimizer_state: Any, tensors: Iterable[Tensor]) -> Any:
    """Return an optimizer's state with other tensors, in order."""
    rest = iter(tensors)

    def rebuilt(state: Any) -> Any:
        return type(state)(
            *(next(rest) if isinstance(f, Tensor) else rebuilt(f) if isinstance(f, tuple) else f for f in state)
        )

    return rebuilt(optimizer_state)
