"""What a solver is: a frozen value with two pure functions, `init` and `step`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import inf
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from bilevel.hypergradients._base import Estimate
from bilevel.optimizers import LBFGS, Optimizer
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.status import InvalidProblem, Status


class Metrics(NamedTuple):
    """What one step saw, at its own start: x before the step, y after its lower steps. All 0-dim tensors.

    Args:
        upper_value: f(x, y).
        stationarity: `‖x - P(x - h)‖` with the hypergradient h and the projection P on the upper set.
        lower_value: g(x, y).
        lower_gradient_norm: `‖dg/dy‖`.
        residual: relative residual of the linear solve, nan for solvers without one.
        error_estimate: of the hypergradient, nan where it was not certified.
        status: of the linear solve; CONVERGED for solvers without one.
    """

    upper_value: Tensor
    stationarity: Tensor
    lower_value: Tensor
    lower_gradient_norm: Tensor
    residual: Tensor
    error_estimate: Tensor
    status: Status

    @classmethod
    def of(cls, oracles: Oracles, x: Tensor, estimate: Estimate) -> Metrics:
        """Return what a hypergradient at x says about a step."""
        certificate = estimate.certificate
        missing = torch.full_like(estimate.upper_value, float("nan"))
        return cls(
            upper_value=estimate.upper_value,
            stationarity=projected_gradient(oracles, x, estimate.gradient).norm(),
            lower_value=estimate.lower_value,
            lower_gradient_norm=certificate.lower_gradient_norm,
            residual=certificate.residual,
            error_estimate=missing if certificate.error_estimate is None else certificate.error_estimate,
            status=certificate.status,
        )

    @classmethod
    def unsolved(
        cls, upper_value: Tensor, lower_value: Tensor, lower_gradient: Tensor, residuals: Sequence[Tensor]
    ) -> Metrics:
        """Return what a step without a linear solve says; `stationarity` is the norm of all residuals together."""
        missing = torch.full_like(upper_value, float("nan"))
        return cls(
            upper_value=upper_value,
            stationarity=torch.stack([torch.linalg.vector_norm(residual) for residual in residuals]).norm(),
            lower_value=lower_value,
            lower_gradient_norm=torch.linalg.vector_norm(lower_gradient),
            residual=missing,
            error_estimate=missing,
            status=Status.CONVERGED,
        )


def check_upper(upper: Any) -> None:
    """Refuse what cannot step x: anything but an optimizer that takes one gradient at a time.

    Raises:
        InvalidProblem: so it is.
    """
    if isinstance(upper, LBFGS) or not isinstance(upper, Optimizer):
        raise InvalidProblem(f"upper must be an Optimizer such as SGD(lr=0.1), not LBFGS, got {upper!r}.")


def check_positive(**options: float | None) -> None:
    """Refuse options that are not in (0, inf); None passes.

    Raises:
        InvalidProblem: so it is.
    """
    for name, value in options.items():
        if value is not None and not 0 < value < inf:
            raise InvalidProblem(f"{name} must be > 0, got {value}.")


def check_nonnegative(**options: float | None) -> None:
    """Refuse options that are not in [0, inf); None passes.

    Raises:
        InvalidProblem: so it is.
    """
    for name, value in options.items():
        if value is not None and not 0 <= value < inf:
            raise InvalidProblem(f"{name} must be >= 0, got {value}.")


def check_lower_steps(lower_steps: int) -> None:
    """Refuse less than one lower step.

    Raises:
        InvalidProblem: so it is.
    """
    if lower_steps < 1:
        raise InvalidProblem(f"lower_steps must be >= 1, got {lower_steps}.")


def moved_x(oracles: Oracles, upper: Optimizer[Any], x: Tensor, h: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return x after a step of the upper optimizer along h, projected on the upper set, and the optimizer's state."""
    x_next, after = upper.update(x, h, state, oracles.x_layout.unflatten(x))
    return oracles.project_x(x_next), after


def projected_gradient(oracles: Oracles, x: Tensor, h: Tensor) -> Tensor:
    """Return `x - P(x - h)`, `[p]`, with the projection P on the upper set; h itself without one."""
    return h if oracles.problem.upper_set is None else x - oracles.project_x(x - h)


def projected_lower_gradient(oracles: Oracles, y: Tensor, d: Tensor) -> Tensor:
    """Return `y - P(y - d)`, shaped like y, with the projection P on the lower set; d itself without one."""
    return d if oracles.problem.lower_set is None else y - oracles.project_y(y - d)


S = TypeVar("S")
"""A solver's state: a NamedTuple with at least `x`, `y`, `step` and `metrics`, replaced and never mutated."""


class Solver(ABC, Generic[S]):
    """Minimizes a bilevel problem by steps. Implementations are frozen dataclasses."""

    needs_hvp: ClassVar[bool] = True
    handles_lower_set: ClassVar[bool] = False
    handles_constraints: ClassVar[bool] = False
    handles_nonsmooth: ClassVar[bool] = False
    contract_steps: ClassVar[int] = 300
    """Upper steps that the defaults need on the reference quadratic; comparisons scale a task's steps likewise."""

    @property
    def replays(self) -> bool:
        """Whether it differentiates through training steps, so that x may act through the start or the optimizer."""
        return False

    def adapts(self, problem: Problem) -> int | None:
        """Return how many lower steps each upper step takes from a new start; None where y goes on instead."""
        return None

    def refuse(self, problem: Problem) -> None:
        """Raise InvalidProblem if the problem has a part that this solver cannot treat.

        A wrong answer without a word would be the alternative: an implicit hypergradient ignores active constraints.
        """
        self._refuse_tasks(problem)
        facts = {
            "lower_set": "handles_lower_set", "constraint": "handles_constraints", "equality": "handles_constraints",
            "regularizer": "handles_nonsmooth",
        }  # fmt: skip
        for part in problem.beyond_smooth:
            fact = facts[part]
            if getattr(self, fact):
                continue
            able = [kind.__name__ for kind in Solver.__subclasses__() if getattr(kind, fact)]
            choice = f"Use {' or '.join(sorted(able))}" if able else f"Use a solver whose {fact} is True"
            raise InvalidProblem(
                f"{type(self).__name__} does not handle Problem({part}=...): it would ignore "
                f"{'its kinks' if part == 'regularizer' else 'it'} and answer wrongly. {choice}, or state a smooth, "
                "unconstrained lower level (a penalty, an L2 regularizer)."
            )

    def _refuse_tasks(self, problem: Problem) -> None:
        held = None if problem.lower_data is None else problem.lower_data.held
        steps = self.adapts(problem)
        if held is None or steps == held:
            return
        if steps is None:
            raise InvalidProblem(
                f"{type(self).__name__} does not start every lower solve anew, but each lower batch holds tasks of its "
                "own: one task's y would pass for the next one's. Use maml(...), reptile(...) or imaml(...), and state "
                "where adaptation starts (lower_init)."
            )
        raise InvalidProblem(
            f"the lower data hold each batch of tasks for {held} steps, and {type(self).__name__} takes {steps} lower "
            "steps from each start: tasks would change within an adaptation. Give both the same lower_steps."
        )

    @abstractmethod
    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> S:
        """Return the state before the first step at `(x, y)`.

        Raises:
            InvalidProblem: the problem has a part that this solver cannot treat.
        """

    @abstractmethod
    def step(self, oracles: Oracles, state: S) -> S:
        """Return the state after one upper step."""

    @abstractmethod
    def backtracked(self, factor: float) -> Solver[S]:
        """Return this solver with upper steps `factor` times as long."""

    def inspect(self, oracles: Oracles, state: S) -> None:
        """Warn or raise about a state between two steps; unlike `step` it may wait for the device.

        Raises:
            Diverged: the iterates run away.
            Infeasible: the lower level has no feasible point at the state's x.
            MultipliersUnbounded: the multipliers of its constraints run away.
        """

    def certify(self, oracles: Oracles, state: S) -> Estimate | None:
        """Return the certified hypergradient at the state's x and its own y, None for solvers that form none."""
        return None

    def skipped(self, state: S) -> S:
        """Return the state with the same x and y that will see the next batches."""
        known: Any = state
        after: S = known._replace(step=known.step + 1)
        return after
