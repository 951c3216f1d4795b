"""Descend along hypergradients: lower steps, a hypergradient, an upper step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.data._base import batch_after
from bilevel.hypergradients._base import Certificate, Estimate, Estimator
from bilevel.hypergradients._trained import Trained
from bilevel.hypergradients.implicit import Implicit
from bilevel.linear import Operator
from bilevel.linear.curvature import largest_curvature
from bilevel.lower_level import minimize_smooth
from bilevel.optimizers import LBFGS, SGD, Adam, Optimizer
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.solvers._base import Metrics, Solver, check_upper, moved_x
from bilevel.status import Diverged, InvalidProblem, NonFinite

RUNAWAY = 1e3
RISING = 20


class DescentState(NamedTuple):
    """Where the descent stands.

    Args:
        x: upper variables `[p]`.
        y: lower variables `[d]` or `[m, d]`, the warm start of the next step.
        step: upper steps made.
        lower_step: lower steps made, which is also the index of the next lower batch.
        upper: state of the upper optimizer.
        lower: state of the lower optimizer (None for a minimizer).
        estimator: state of the hypergradient estimator.
        largest: largest curvature of the lower objective, where the lower step length depends on it.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    lower_step: int
    upper: Any
    lower: Any
    estimator: Any
    largest: Tensor | None
    metrics: Metrics | None


@dataclass(frozen=True)
class HypergradientDescent(Solver[DescentState]):
    """Alternate `lower_steps` lower steps with one upper step along an estimated hypergradient.

    Args:
        upper: optimizer of x.
        lower: optimizer of y, or LBFGS. None chooses: LBFGS where every lower batch is the same, SGD otherwise.
            `SGD(lr=None)` takes the step 1 / (largest curvature), measured at the start and followed by the Ritz values
            of the linear solves.
        lower_steps: lower steps before each upper step (for LBFGS: at most so many iterations).
        estimator: of the hypergradient. One that differentiates through training (`Unrolled`) takes the lower steps
            itself, with its own optimizer; `lower`, `lower_steps` and `restart_lower` are not used then.
        restart_lower: start every lower solve from `problem.lower_init(x)` instead of the last y. None: where the
            problem has a lower_init.
        clip_norm: scale longer hypergradients down to this Euclidean norm.
        certify_every: certify every so many steps (0: never). A certificate costs about two hypergradients.

    Cost:
        Per step: `lower_steps` lower gradients, and one estimate.

    References:
        Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016 (Algorithm 1, HOAG).

    Example:
        >>> import bilevel
        >>> problem = bilevel.problems.scalar().problem
        >>> solution = bilevel.solve(problem, HypergradientDescent(), torch.zeros(()), torch.zeros(()), steps=100)
        >>> abs(float(solution.x) - float(problem.reference)) < 1e-2
        True
    """

    needs_hvp: ClassVar[bool] = True

    upper: Optimizer[Any] = field(default_factory=lambda: Adam(lr=0.1))
    lower: Optimizer[Any] | LBFGS | None = None
    lower_steps: int = 20
    estimator: Estimator = field(default_factory=Implicit)
    restart_lower: bool | None = False
    clip_norm: float | None = None
    certify_every: int = 0

    def __post_init__(self) -> None:
        check_upper(self.upper)
        if self.lower_steps < 0:
            raise InvalidProblem(f"lower_steps must be >= 0, got {self.lower_steps}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InvalidProblem(f"clip_norm must be > 0, got {self.clip_norm}.")

    @property
    def replays(self) -> bool:
        """Whether the estimator differentiates through training steps."""
        return self.estimator.replays

    def adapts(self, problem: Problem) -> int | None:
        """Return how many lower steps each upper step takes from a new start; None where y goes on instead."""
        if isinstance(self.estimator, Trained):
            return self.estimator.steps if self.estimator.fresh and self.estimator.restarts(problem) else None
        return self.lower_steps if self._restarts(problem) else None

    def _restarts(self, problem: Problem) -> bool:
        return self.restart_lower is not False and problem.lower_init is not None

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> DescentState:
        """Return the state before the first step; measures the lower curvature if the lower step length needs it."""
        self.refuse(oracles.problem)
        if self.restart_lower and not self.replays and oracles.problem.lower_init is None:
            raise InvalidProblem("restart_lower=True needs Problem(lower_init=...) to say where to restart.")
        lower = self._lower(oracles)
        largest = None
        if isinstance(lower, Optimizer) and lower.needs_lr and not self.replays:
            linearization = oracles.linearize_lower(x, y)
            largest = largest_curvature(Operator(linearization.hvp, diagonal=linearization.diagonal), y)
        return DescentState(
            x=x,
            y=y,
            step=0,
            lower_step=0,
            upper=self.upper.init(x),
            lower=lower.init(y) if isinstance(lower, Optimizer) else None,
            estimator=self.estimator.init(oracles, x, y),
            largest=largest,
            metrics=None,
        )

    def step(self, oracles: Oracles, state: DescentState) -> DescentState:
        """Return the state after `lower_steps` lower steps and one upper step.

        Raises:
            Diverged: the lower steps ran away.
            NonFinite: a lower value or gradient is not finite.
            LinearSolveFailed: the linear solve of the hypergradient failed.
        """
        certify = self.certify_every > 0 and state.step % self.certify_every == 0
        y, lower, diagonal = self._solve_lower(oracles, state)
        estimate, estimator = self._estimate(oracles, state, y, diagonal, certify)
        h = self._clipped(estimate.gradient)
        x, upper = moved_x(oracles, self.upper, state.x, h, state.upper)
        return DescentState(
            x=x,
            y=estimate.y,
            step=state.step + 1,
            lower_step=state.lower_step + self.lower_steps,
            upper=upper,
            lower=lower,
            estimator=estimator,
            largest=_followed(state.largest, estimate.certificate),
            metrics=Metrics.of(oracles, state.x, estimate),
        )

    def certify(self, oracles: Oracles, state: DescentState) -> Estimate:
        """Return the certified hypergradient at the state's x, after the lower steps that a next step would take."""
        y, _, diagonal = self._solve_lower(oracles, state)
        return self._estimate(oracles, state, y, diagonal, True)[0]

    def skipped(self, state: DescentState) -> DescentState:
        """Return the state with the same x and y that will see the next upper and lower batches."""
        return state._replace(step=state.step + 1, lower_step=state.lower_step + self.lower_steps)

    def backtracked(self, factor: float) -> HypergradientDescent:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))

    def _lower(self, oracles: Oracles) -> Optimizer[Any] | LBFGS:
        if self.lower is not None:
            return self.lower
        return LBFGS() if oracles.problem.deterministic_lower else SGD(lr=None)

    def _estimate(
        self, oracles: Oracles, state: DescentState, y: Tensor, diagonal: Callable[[], Tensor] | None, certify: bool
    ) -> tuple[Estimate, Any]:
        return self.estimator.estimate(
            oracles,
            state.x,
            y,
            state.estimator,
            upper_step=state.step,
            lower_step=batch_after(oracles.problem.lower_data, state.lower_step, self.lower_steps),
            step_diagonal=diagonal,
            certify=certify,
        )

    def _solve_lower(self, oracles: Oracles, state: DescentState) -> tuple[Tensor, Any, Callable[[], Tensor] | None]:
        """Return y after the lower steps, the lower optimizer's state, and () -> the diagonal of its last step."""
        lower, y = self._lower(oracles), state.y
        if self.replays:
            return y, state.lower, None
        if self._restarts(oracles.problem):
            assert oracles.problem.lower_init is not None
            y = oracles.y_layout.flatten(oracles.problem.lower_init(oracles.x_layout.unflatten(state.x)))
        if isinstance(lower, LBFGS):
            found = minimize_smooth(
                oracles, lower, state.x, y, batch=state.lower_step, upper_step=state.step, max_steps=self.lower_steps
            )
            return found.y, None, None
        if isinstance(lower, Optimizer) and lower.needs_lr:
            # 5 % below the limit of safe descent: Ritz values approach the largest curvature from below.
            assert state.largest is not None
            lower = lower.with_lr(0.95 / state.largest)
        x, optimizer_state, values = oracles.x_layout.unflatten(state.x), state.lower, []
        diagonal: Callable[[], Tensor] | None = None
        for k in range(self.lower_steps):
            value, gradient = oracles.lower_gradient(state.x, y, state.lower_step + k)
            values.append(value)
            if k == self.lower_steps - 1:
                diagonal = partial(lower.sensitivity, gradient, optimizer_state, x, y)
            y, optimizer_state = lower.update(y, gradient, optimizer_state, x)
        _check_descent(oracles, y, values, state.step, deterministic=oracles.problem.deterministic_lower)
        return y, optimizer_state, diagonal

    def _clipped(self, h: Tensor) -> Tensor:
        # A non-finite entry must reach the loop as it is: clipping would spread it over all entries.
        if self.clip_norm is None or not bool(h.isfinite().all()):
            return h
        clipped: Tensor = h * (self.clip_norm / h.norm().clamp_min(self.clip_norm))
        return clipped


def _followed(largest: Tensor | None, certificate: Certificate) -> Tensor | None:
    """Follow the largest curvature: up at once where more is seen, down slowly where less is."""
    if largest is None or certificate.curvature is None:
        return largest
    seen = certificate.curvature[1].to(largest)
    return torch.maximum(seen, 0.9 * largest + 0.1 * seen)


def _check_descent(oracles: Oracles, y: Tensor, values: list[Tensor], step: int, *, deterministic: bool) -> None:
    """Raise where the lower steps ran away; one look at all values after the last of them."""
    if not values:
        return
    trace = torch.stack(values).tolist()
    for k, value in enumerate(trace):
        if value != value or abs(value) == float("inf"):
            raise NonFinite(f"the lower objective is {value} at upper step {step}, lower step {k}; lower its lr.")
    bad = (~y.isfinite()).reshape(-1, oracles.y_layout.size).any(0).nonzero()
    if len(bad):
        leaf = oracles.y_layout.name_of(int(bad[0]))
        raise NonFinite(f"y's leaf '{leaf}' is not finite after the lower steps of upper step {step}; lower its lr.")
    # A mini-batch may start near zero by luck; the same batch may not grow a thousandfold.
    scale = abs(trace[0]) + (1e-12 if deterministic else 1e-2)
    tail = trace[-RISING - 1 :]
    rising = deterministic and len(tail) > RISING and all(a < b for a, b in pairwise(tail))
    if trace[-1] > RUNAWAY * scale or rising:
        raise Diverged(
            f"the lower objective went from {trace[0]:.3g} to {trace[-1]:.3g} within the lower steps of upper step "
            f"{step}; multiply the lower lr by 0.1 (SGD(lr=None) measures a safe one)."
        )
