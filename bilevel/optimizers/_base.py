"""What an optimizer is: a pure, differentiable map from a gradient to a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from bilevel.status import Status

Hyperparameter: TypeAlias = float | Tensor | Callable[[Any, int], float | Tensor]
"""A number, a tensor that broadcasts against y, or a function of `(x, step)`: a schedule, a learned rate, or both."""


def at(value: Hyperparameter, x: Any, step: int) -> float | Tensor:
    """Evaluate a hyperparameter at x and the optimizer's step (0 for its first)."""
    return value(x, step) if callable(value) else value


class Pulled(NamedTuple):
    """Cotangents before an update: of y, of the gradient, of the state's tensors, of the learned hyperparameters."""

    y: Tensor
    gradient: Tensor
    buffers: tuple[Tensor, ...]
    learned: tuple[Tensor, ...]


class Linearized(NamedTuple):
    """An update with its derivative by formula.

    Args:
        y: after the update.
        state: after the update.
        learned: hyperparameters with a graph, 0-dim each.
        pull: (cotangent of y, those of the state's tensors) -> the cotangents before the update.
    """

    y: Tensor
    state: Any
    learned: tuple[Tensor, ...]
    pull: Callable[[Tensor, tuple[Tensor, ...]], Pulled]


S = TypeVar("S", bound=NamedTuple)


class Optimizer(ABC, Generic[S]):
    """A first-order method on flat vectors. Implementations are frozen dataclasses whose state is a NamedTuple.

    `update` is made of differentiable operations in y, gradient, state and x, so that a chain of updates can be
    differentiated; it never mutates its arguments.
    """

    @abstractmethod
    def init(self, y: Tensor) -> S:
        """Return the state before the first step at y (`[d]` or `[m, d]`); its field `step` is the int 0."""

    @abstractmethod
    def update(self, y: Tensor, gradient: Tensor, state: S, x: Any = None) -> tuple[Tensor, S]:
        """Return the next y and state.

        Args:
            y: the variables, `[d]` or `[m, d]`.
            gradient: the gradient at y.
            state: what `init` or the last `update` returned.
            x: passed to hyperparameters that are functions of `(x, step)`.
        """

    def linearized(self, y: Tensor, gradient: Tensor, state: S, x: Any = None) -> Linearized | None:
        """Return the update with its derivative by formula, which spares a graph; None where there is no formula.

        Hyperparameters that are functions of x keep their graphs in x; nothing else needs one.
        """
        return None

    @property
    def needs_lr(self) -> bool:
        """Whether the step length is still missing; then `with_lr` must supply one before `update`."""
        return False

    @abstractmethod
    def with_lr(self, lr: Hyperparameter) -> Optimizer[S]:
        """Return this optimizer with the step length `lr`; everything else is kept."""

    @abstractmethod
    def scaled(self, factor: float) -> Optimizer[S]:
        """Return this optimizer with its step length multiplied by `factor` (schedules included)."""

    @abstractmethod
    def sensitivity(self, gradient: Tensor, state: S, x: Any = None, y: Tensor | None = None) -> Tensor:
        """Return the diagonal of -d(update)/d(gradient) at `gradient`, given the state before that update.

        It is what SAMA (Choe et al., 2023) puts in place of the inverse Hessian: `lr` for plain SGD. Entries may be
        negative (Adam); the caller decides whether to clamp them. `y` is needed only where weight decay enters the
        preconditioner (Adam with `weight_decay`).
        """


@dataclass(frozen=True)
class Minimum:
    """Where a deterministic minimizer stopped.

    Args:
        y: the point, `[d]` or `[m, d]`.
        value: the objective there.
        gradient_norm: Euclidean norm of the gradient there (over all rows).
        status: CONVERGED, STEP_LIMIT, STALLED, DIVERGED or NON_FINITE.
        steps: iterations made.
        evaluations: calls of the objective with its gradient.
    """

    y: Tensor
    value: Tensor
    gradient_norm: Tensor
    status: Status
    steps: int
    evaluations: int
