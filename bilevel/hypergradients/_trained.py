"""What estimators share that take the lower steps themselves: the training run, its start, and who acts in it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.hypergradients._base import Estimate, Estimator
from bilevel.linear import Operator
from bilevel.linear.curvature import largest_curvature
from bilevel.linearization import gradients, leaves_of
from bilevel.optimizers import LBFGS, SGD, Optimizer
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.status import InvalidProblem, UnusedHyperparameter
from bilevel.training import Training, TrainingState, tensors_of

REMEASURE = 10
"""Trainings after which the largest curvature is measured again."""

LOOKED_AT = 5
"""First steps in which a leaf of x must act somewhere."""


class TrainedState(NamedTuple):
    """What one training leaves to the next.

    Args:
        y: where trainings start that start anew and have no `lower_init`.
        optimizer: state of the lower optimizer, None before the first training.
        largest: largest curvature of the lower objective, where the step length depends on it.
        age: trainings made.
        memory: of the estimator itself, None if it has none.
    """

    y: Tensor
    optimizer: Any
    largest: Tensor | None
    age: int
    memory: Any = None


@dataclass(frozen=True)
class Trained(Estimator):
    """An estimator that trains y itself; see `Unrolled` for the options."""

    replays: ClassVar[bool] = True

    lower: Optimizer[Any] = field(default_factory=lambda: SGD(lr=None))
    steps: int = 20
    restart: bool | None = None
    fresh: bool = False

    def check(self) -> None:
        """Refuse options out of range.

        Raises:
            InvalidProblem: `lower` is no differentiable optimizer, or steps < 1.
        """
        name = type(self).__name__
        if isinstance(self.lower, LBFGS) or not isinstance(self.lower, Optimizer):
            raise InvalidProblem(f"{name}(lower=...) must be an Optimizer such as SGD(0.1), got {self.lower!r}.")
        if self.steps < 1:
            raise InvalidProblem(f"{name}(steps=...) must be at least 1, got {self.steps}.")

    def restarts(self, problem: Problem) -> bool:
        """Return whether each training starts anew."""
        return problem.lower_init is not None if self.restart is None else self.restart

    def through_start(self, oracles: Oracles) -> bool:
        """Return whether x acts through the start of training."""
        return oracles.problem.lower_init is not None and self.restarts(oracles.problem)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> TrainedState:
        """Return the state before the first training.

        Raises:
            InvalidProblem: the lower level has a set, constraints or kinks.
            UnusedHyperparameter: a leaf of x acts nowhere in the first steps, the start and the upper objective.
        """
        self.refuse_beyond_smooth(
            oracles.problem, "its training steps would ignore it. State a penalty or a smooth regularizer (L2)."
        )
        state = TrainedState(y, None, self._measured(oracles, x, y), 0)
        self._check_used(oracles, x, y, state)
        return state

    @abstractmethod
    def estimate(
        self,
        oracles: Oracles,
        x: Tensor,
        y: Tensor,
        state: TrainedState,
        *,
        upper_step: int = 0,
        lower_step: int = 0,
        step_diagonal: Callable[[], Tensor] | None = None,
        certify: bool = False,
    ) -> tuple[Estimate, TrainedState]:
        """Return the hypergradient after training from y (or from the start), and the next state."""

    def begin(
        self, oracles: Oracles, x: Tensor, y: Tensor, state: TrainedState, upper_step: int, lower_step: int
    ) -> tuple[Training, TrainingState, TrainedState]:
        """Return the training, its start, and the next state but for the optimizer's."""
        anew = self.restarts(oracles.problem)
        if self.through_start(oracles):
            assert oracles.problem.lower_init is not None
            with torch.no_grad():
                y = oracles.y_layout.flatten(oracles.problem.lower_init(oracles.x_layout.unflatten(x)))
        elif anew:
            y = state.y
        if state.age and state.age % REMEASURE == 0:
            state = state._replace(largest=self._measured(oracles, x, y))
        first = lower_step if anew and not self.fresh else lower_step + upper_step * self.steps
        training = self.training(oracles, x, first, state)
        start = training.start(y, None if anew else state.optimizer)
        return training, start, state._replace(age=state.age + 1)

    def training(self, oracles: Oracles, x: Tensor, first: int, state: TrainedState) -> Training:
        """Return the lower steps at x, the first on the lower batch `first`."""
        lower = self.lower if state.largest is None else self.lower.with_lr(0.95 / state.largest)
        return Training(oracles, lower, x, first)

    def _measured(self, oracles: Oracles, x: Tensor, y: Tensor) -> Tensor | None:
        if not self.lower.needs_lr:
            return None
        lower = oracles.linearize_lower(x, y)
        return largest_curvature(Operator(lower.hvp, diagonal=lower.diagonal), y)

    def _check_used(self, oracles: Oracles, x: Tensor, y: Tensor, state: TrainedState) -> None:
        """Refuse leaves of x that act nowhere, as far as the first steps show."""
        layout = oracles.x_layout
        xs, ys = leaves_of(layout, x), leaves_of(oracles.y_layout, y)
        training, few = self.training(oracles, x, 0, state), range(min(self.steps, LOOKED_AT))
        with torch.enable_grad():
            outputs = [oracles.upper_at(0)(xs, ys), *(oracles.lower_at(k)(xs, ys) for k in few)]
            if self.through_start(oracles):
                assert oracles.problem.lower_init is not None
                outputs += oracles.y_layout.leaves(oracles.problem.lower_init(layout.nest(xs)))
            after = training.start(y)
            for _ in few:
                moved, optimizer = training.optimizer.update(
                    after.y, torch.ones_like(y), after.optimizer, layout.nest(xs)
                )
                after = TrainingState(moved, optimizer)
            outputs += [after.y, *tensors_of(after.optimizer)]
            found = gradients(outputs, xs, [torch.ones_like(output) for output in outputs])
        declared = oracles.declared(x).cross(y, torch.ones_like(y))
        for name, *traces in zip(layout.names, found, declared, strict=True):
            if all(trace is None for trace in traces):
                raise UnusedHyperparameter(
                    f"x's leaf '{name}' enters neither objective, nor the lower optimizer, nor the start of training "
                    "(was it detached, or replaced by a copy?); use it, or leave it out of x0."
                )


def rounding(gradient: Tensor, steps: int) -> Tensor:
    """Return the rounding error of a sum over so many steps."""
    error: Tensor = 10 * torch.finfo(gradient.dtype).eps * steps**0.5 * gradient.norm()
    return error
