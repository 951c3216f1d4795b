"""Hypergradients through training itself: reverse mode over all lower steps, or over the last ones."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.hypergradients._base import Certificate, Estimate
from bilevel.hypergradients._trained import Trained, TrainedState, rounding
from bilevel.linearization import gradients, join, leaves_of
from bilevel.oracles import Oracles, UpperGradient
from bilevel.replay import Memory, Schedule, Sqrt, Store, Visited, reverse
from bilevel.status import Chaotic, InvalidProblem, Status
from bilevel.training import Cotangent, Training, TrainingState, tensors_of

CHAOTIC = 1e3
"""Growth of the cotangent from which on the derivative is hardly of use."""


class Visit(NamedTuple):
    """What one visit of a training run gives, on flat vectors.

    Args:
        x: the gradient in x, `[p]`.
        upper: f and its partial gradients at the trained weights.
        last: the trained state.
        initial: the cotangent of the first state that was visited; its gradients are in the initial weights and in the
            initial moments of the optimizer.
        growth: the largest norm of the cotangent over that at the end, 0-dim.
        visited: what the visit took.
    """

    x: Tensor
    upper: UpperGradient
    last: TrainingState
    initial: Cotangent
    growth: Tensor
    visited: Visited


def visit(
    training: Training,
    state: TrainingState,
    steps: int,
    *,
    first: int = 0,
    upper_step: int = 0,
    truncate: int | None = None,
    schedule: Schedule | None = None,
    store: Store | None = None,
    verify: bool = True,
) -> Visit:
    """Train from a state for some steps, and differentiate the upper objective at the end through them.

    The part of x that the start contributes is not in it; it follows from `initial`.

    Args:
        training: the lower steps at one x.
        state: before the first step.
        steps: T.
        first: number of the first step.
        upper_step: which upper batch.
        truncate: visit the last so many steps only.
        schedule: which states to store.
        store: where to.
        verify: that states computed again are the same.
    """
    oracles, x, stop = training.oracles, training.x, first + steps
    if truncate is not None and truncate < steps:
        for step in range(first, stop - truncate):
            state = training.advance(step, state)
        first = stop - truncate
    end: list[tuple[UpperGradient, TrainingState]] = []

    def head(last: TrainingState) -> Cotangent:
        upper = oracles.upper_gradient(x, last.y, upper_step)
        end.append((upper, last))
        norm = upper.y.norm()
        buffers = tuple(torch.zeros_like(t) for t in tensors_of(last.optimizer))
        return Cotangent(upper.y, buffers, upper.x, norm, norm.new_zeros(()))

    a, visited = reverse(
        training, state, stop - first, head, first=first, schedule=schedule, store=store, verify=verify,
        fingerprint=_fingerprint(training, upper_step),
    )  # fmt: skip
    if not end:  # resumed after the head: train on from here to know where it ended
        last = state
        for step in range(first, stop):
            last = training.advance(step, last)
        end.append((oracles.upper_gradient(x, last.y, upper_step), last))
    upper, last = end[0]
    growth = a.largest / upper.y.norm().clamp_min(torch.finfo(a.y.dtype).tiny)
    return Visit(a.x, upper, last, a, growth, visited)


def _fingerprint(training: Training, upper_step: int) -> str:
    x = hashlib.sha256(training.x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{x.hexdigest()}|{training.oracles.seed}|{training.first_batch}|{training.microbatches}|{upper_step}"


@dataclass(frozen=True)
class Unrolled(Trained):
    """Estimate `d f(x, y_T(x)) / dx`, where y_T is what T lower steps make of the start: reverse mode through training.

        a = df/dy at y_T;   for t = T-1 .. 0:  u = cotangent of the lower gradient in step t, from a
                                               h += J_t^T u + (x in the optimizer);   a = (rest of the step) + H_t u

    It is exact to rounding for the training run as it is, whatever the lower objective's shape. x may enter the lower
    objective, the hyperparameters of `lower`, and `Problem(lower_init=...)`.

    Args:
        lower: optimizer of y; `SGD(lr=None)` takes 0.95 / (largest curvature), measured at the start.
        steps: T >= 1.
        restart: start each training from `lower_init(x)`, or from the first y where there is none; then the batches of
            each training are the same, too. If not, train on from the last y, and the gradient stops there. None:
            restart where the problem has a lower_init.
        fresh: give trainings that start anew the next lower batches each time: those of upper step u are u T to
            u T + T - 1. If not, all trainings see the first T, so that F is one function.
        truncate: K: visit the last K steps only; x does not act through the start then. Biased, by a factor
            (1 - lr mu)^K for mu-strongly convex objectives.
        schedule: which states to hold; `Sqrt()` by default.
        store: where to hold them.
        microbatches: parts of each batch that are differentiated one by one.
        verify: that steps run again give the same states.

    Raises:
        InvalidProblem: an option is out of range.

    Cost:
        T steps forward, T products with the lower Hessian, and what the schedule repeats; memory that of the schedule.

    Notes:
        Where the cotangent grows more than a thousandfold, a `Chaotic` warning says so: the gradient is exact, but it
        holds over a tiny neighborhood only.

    References:
        Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible learning", ICML
        2015. Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based hyperparameter optimization",
        ICML 2017 (Algorithm 1). Shaban, Cheng, Hatch, Boots, "Truncated back-propagation for bilevel optimization",
        AISTATS 2019, for `truncate`. Engstrom et al., 2025, arXiv 2503.13751, for stored and repeated states.

    Example:
        >>> import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, batch: y, lower=lambda x, y, batch: 0.5 * (y - x).square())
        >>> estimator = Unrolled(lower=bilevel.SGD(0.5), steps=2, restart=True)
        >>> h = bilevel.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), estimator=estimator)
        >>> float(h.gradient)  # 1 - (1 - 0.5)^2
        0.75
    """

    replays: ClassVar[bool] = True

    truncate: int | None = None
    schedule: Schedule = field(default_factory=Sqrt)
    store: Store = field(default_factory=Memory)
    microbatches: int = 1
    verify: bool = True

    def __post_init__(self) -> None:
        self.check()
        if self.truncate is not None and self.truncate < 1:
            raise InvalidProblem(f"Unrolled(truncate=...) must be at least 1 or None, got {self.truncate}.")
        if self.microbatches < 1:
            raise InvalidProblem(f"Unrolled(microbatches=...) must be at least 1, got {self.microbatches}.")

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
        """Return the hypergradient after training from y (or from the start), and the next state.

        Raises:
            NonFinite: a derivative is not finite.
            ReplayMismatch: a step run again gave another state.
        """
        training, start, after = self.begin(oracles, x, y, state, upper_step, lower_step)
        through_start, anew = self.through_start(oracles), self.restarts(oracles.problem)
        estimate, found = self._differentiate(
            training, start, upper_step, through_start=through_start, anew=anew, certify=certify
        )
        return estimate, after._replace(optimizer=found.last.optimizer)

    def differentiate(
        self, oracles: Oracles, x: Tensor, y: Tensor, state: TrainedState, upper_step: int, *, through_start: bool
    ) -> tuple[Estimate, Visit]:
        """Train from y, which came from `lower_init` if `through_start`; return all that the visit found."""
        training = self.training(oracles, x, 0, state)
        return self._differentiate(
            training, training.start(y), upper_step, through_start=through_start, anew=True, certify=True
        )

    def training(self, oracles: Oracles, x: Tensor, first: int, state: TrainedState) -> Training:
        """Return the lower steps at x, the first on the lower batch `first`."""
        return replace(super().training(oracles, x, first, state), microbatches=self.microbatches)

    def _differentiate(
        self,
        training: Training,
        start: TrainingState,
        upper_step: int,
        *,
        through_start: bool,
        anew: bool,
        certify: bool,
    ) -> tuple[Estimate, Visit]:
        oracles, x, before = training.oracles, training.x, training.oracles.counts
        found = self._visit(training, start, self.steps, upper_step)
        gradient = (
            found.x if not (through_start and self._whole) else found.x + through_init(oracles, x, found.initial.y)
        )
        if float(found.growth) > CHAOTIC:
            warnings.warn(
                f"the cotangent grew {float(found.growth):.2g}-fold on its way through {self.steps} lower steps: the "
                "training is chaotic here, and its gradient holds for tiny steps of x only. Shorten the lower steps, "
                "truncate, or give Adam eps_root.",
                Chaotic,
                stacklevel=3,
            )
        error = self._error(training, start, found, gradient, upper_step, anew=anew) if certify else None
        lower_value, lower_gradient = oracles.lower_gradient(x, found.last.y, training.batch_after(self.steps))
        certificate = Certificate.unsolved(
            Status.CONVERGED if self._whole else Status.APPROXIMATE,
            lower_gradient.norm(),
            oracles.counts - before,
            error_estimate=error,
            growth=found.growth,
        )
        return Estimate(gradient, found.upper.value, lower_value, found.last.y, certificate), found

    @property
    def _whole(self) -> bool:
        return self.truncate is None or self.truncate >= self.steps

    def _visit(self, training: Training, start: TrainingState, steps: int, upper_step: int) -> Visit:
        return visit(
            training, start, steps, upper_step=upper_step, truncate=self.truncate, schedule=self.schedule,
            store=self.store, verify=self.verify,
        )  # fmt: skip

    def _error(
        self,
        training: Training,
        start: TrainingState,
        found: Visit,
        gradient: Tensor,
        upper_step: int,
        *,
        anew: bool,
    ) -> Tensor:
        """Estimate the distance to the derivative of the training run, or of its limit where training goes on."""
        error: Tensor = rounding(gradient, self.steps) * found.growth.clamp_min(1.0)
        if not anew:
            longer = self._visit(training, start, 2 * self.steps, upper_step)
            error = error + 1.25 * (longer.x - gradient).norm()
        if not anew or self._whole:
            return error
        # Contributions of earlier steps shrink like the cotangent did on its way here: a geometric series.
        assert self.truncate is not None
        tiny = torch.finfo(gradient.dtype).tiny
        rate: Tensor = (found.initial.y.norm() / found.upper.y.norm().clamp_min(tiny)) ** (1 / self.truncate)
        tail = found.initial.contribution * rate / (1 - rate)
        bounded: Tensor = torch.where(rate < 1, error + tail, torch.inf)
        return bounded


def through_init(oracles: Oracles, x: Tensor, cotangent: Tensor) -> Tensor:
    """Return what the start `lower_init(x)` contributes: its derivative, transposed, applied to the cotangent."""
    init = oracles.problem.lower_init
    assert init is not None
    xs = leaves_of(oracles.x_layout, x)
    with torch.enable_grad():
        leaves = oracles.y_layout.leaves(init(oracles.x_layout.nest(xs)))
        found = gradients(leaves, xs, oracles.y_layout.views(cotangent))
    return join(oracles.x_layout, found, (), x)
