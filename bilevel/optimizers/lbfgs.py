"""L-BFGS: minimize a smooth deterministic function to high accuracy."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from bilevel.optimizers._base import Minimum
from bilevel.optimizers._hyperparameters import check_count, is_number
from bilevel.optimizers._line_search import Trial, strong_wolfe
from bilevel.status import InvalidProblem, Status

Objective: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""y -> (value, gradient): a 0-dim value, or one value a row of y `[m, d]`, of which the sum counts."""

_NOISE = 10.0


@final
@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS with a strong Wolfe line search, for objectives that are smooth and not random.

        y = y - a B g,    B from the last `memory` pairs s = change of y, z = change of the gradient g

    It has converged where `‖g‖ <= tol`, g being the gradient over all rows: a bound that depends neither on the start,
    so that a warm start at the solution ends at once, nor on the value, to which a constant could be added. A `tol`
    below 10 eps of y's dtype (float32: 1.2e-6) counts as that. Where rounding keeps the norm above it (a sum over many
    examples in float32, say), the run ends STALLED, after `patience` steps in which neither the value nor the gradient
    norm fell measurably.

    The point returned has the least value found, ties within rounding (10 eps |value|) decided by the gradient norm;
    so it is never worse than the start. Rows of `[m, d]` are one point: their values are added. Dot products are
    accumulated in float64, and the run is deterministic. It is not meant to be differentiated through.

    Args:
        memory: pairs kept, at least 1.
        max_steps: >= 0.
        tol: > 0, in units of the gradient: an objective of small scale needs a smaller one.
        patience: steps without measurable progress before the run counts as stalled, at least 1. Ill-conditioned
            problems need more to drive the gradient down where the value no longer moves (condition 1e4: 40).
        max_trials: evaluations per line search, at least 1; a step rarely takes more than 2.

    Raises:
        InvalidProblem: an option is out of its range.

    Cost:
        At most 2 memory + 14 vectors the size of y; per step one evaluation, rarely more, and 4 memory operations on
        vectors.

    Notes:
        DIVERGED means that the value still fell as steeply a million times the first step length away, or that it fell
        below -max(1, |first value|) / eps²: the objective may be unbounded below. NON_FINITE means a start, or all
        trials of a line search, that are not finite. Functions that fall forever but level off (separable data without
        a regularizer) end by `tol`.

    References:
        Liu and Nocedal (1989), "On the limited memory BFGS method for large scale optimization"; Nocedal and Wright
        (2006), Algorithms 7.4 and 7.5.

    Example:
        >>> scale = torch.tensor([1.0, 100.0])
        >>> minimum = LBFGS().minimize(lambda y: ((scale * y * y).sum() / 2, scale * y), torch.ones(2))
        >>> minimum.status.name, bool(minimum.gradient_norm < 2e-6)
        ('CONVERGED', True)
    """

    memory: int = 10
    max_steps: int = 100
    tol: float = 1e-8
    patience: int = 20
    max_trials: int = 25

    def __post_init__(self) -> None:
        check_count("memory", self.memory, 1)
        check_count("max_steps", self.max_steps, 0)
        check_count("patience", self.patience, 1)
        check_count("max_trials", self.max_trials, 1)
        _check_tol(self.tol)

    def minimize(
        self, fun: Objective, y0: Tensor, *, tol: float | None = None, max_steps: int | None = None
    ) -> Minimum:
        """Minimize fun from y0.

        Args:
            fun: y -> (value, gradient); called with y detached.
            y0: where to start, `[d]` or `[m, d]`, on any device; not changed.
            tol: replaces `self.tol`.
            max_steps: replaces `self.max_steps`.

        Returns:
            The best point, detached, and how the run ended: CONVERGED, STEP_LIMIT, STALLED, DIVERGED or NON_FINITE.

        Raises:
            InvalidProblem: `tol` or `max_steps` is out of range, or the gradient is not shaped and typed like y.
        """
        tol = self.tol if tol is None else tol
        max_steps = self.max_steps if max_steps is None else max_steps
        _check_tol(tol)
        check_count("max_steps", max_steps, 0)
        return _Run(self, fun, y0, tol).to_end(max_steps)


def _check_tol(tol: float) -> None:
    if not is_number(tol) or not 0 < tol < math.inf:
        raise InvalidProblem(f"tol={tol!r} must be a number above 0")


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return torch.dot(left.flatten().double(), right.flatten().double())


def _norm(vector: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return norm


class _Pairs:
    """The inverse Hessian as remembered: the last pairs (s, z, 1 / <s, z>), and the scale <s, z> / <z, z>."""

    def __init__(self, size: int, eps: float) -> None:
        self.kept: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=size)
        self.eps = eps
        self.scale: Tensor | None = None

    def push(self, s: Tensor, z: Tensor) -> None:
        """Remember a pair, unless its curvature is negative or drowned in rounding."""
        sz, ss, zz = _dot(s, z), _dot(s, s), _dot(z, z)
        if bool(sz > self.eps * (ss * zz).sqrt()):
            self.kept.append((s, z, 1 / sz))
            self.scale = sz / zz

    def direction(self, gradient: Tensor) -> Tensor:
        """Return -B gradient by the two-loop recursion."""
        q, weights = gradient, []
        for s, z, rho in reversed(self.kept):
            weights.append(rho * _dot(s, q))
            q = q - weights[-1] * z
        q = q if self.scale is None else self.scale * q
        for (s, z, rho), weight in zip(self.kept, reversed(weights), strict=True):
            q = q + (weight - rho * _dot(z, q)) * s
        return -q


class _Run:
    """One minimization: where it is, the best point so far, and what it has cost."""

    def __init__(self, options: LBFGS, fun: Objective, y0: Tensor, tol: float) -> None:
        self.options, self.fun = options, fun
        self.eps = torch.finfo(y0.dtype).eps
        self.tol = max(tol, 10 * self.eps)
        self.pairs = _Pairs(options.memory, self.eps)
        self.steps = self.evaluations = self.idle = 0
        y = y0.detach().clone()
        self.point = self.best = self.evaluate(y, torch.zeros_like(y), 0.0)
        self.least = self.point.value
        self.mark = (self.point.value, self.point.gradient_norm)
        self.bottom = -max(1.0, abs(self.point.value)) / self.eps**2

    def to_end(self, max_steps: int) -> Minimum:
        """Step until something ends it."""
        status = None if self.point.finite else Status.NON_FINITE
        while status is None:
            if self.point.gradient_norm <= self.tol:
                self.best, status = self.point, Status.CONVERGED
            elif self.steps >= max_steps:
                status = Status.STEP_LIMIT
            else:
                status = self.step()
        value, norm = (self.best.y.new_tensor(number) for number in (self.best.value, self.best.gradient_norm))
        return Minimum(self.best.y, value, norm, status, self.steps, self.evaluations)

    def step(self) -> Status | None:
        """Move to a lower point; return a status if that ends the run."""
        noise = _NOISE * self.eps * abs(self.point.value)
        direction = self.pairs.direction(self.point.gradient)
        slope, reach, size = torch.stack(
            [_dot(direction, self.point.gradient), _norm(direction), _norm(self.point.y)]
        ).tolist()
        if not (slope < 0 and reach > 0):
            return self.forget_or(Status.STALLED)
        first = 1.0 if self.pairs.scale is not None else min(1.0, 1 / self.point.gradient_norm)
        origin = self.point
        search = strong_wolfe(
            lambda length: self.evaluate(origin.y + length * direction, direction, length),
            origin._replace(length=0.0, slope=slope),
            first,
            noise,
            self.eps * size / reach,
            self.options.max_trials,
        )
        if search.trial is None:
            if search.unbounded:
                return Status.DIVERGED
            return self.forget_or(Status.STALLED if search.finite else Status.NON_FINITE)
        self.steps += 1
        self.pairs.push(search.trial.y - origin.y, search.trial.gradient - origin.gradient)
        self.point = search.trial
        self.keep_best(noise)
        if search.unbounded or self.point.value < self.bottom:
            return Status.DIVERGED
        return Status.STALLED if self.idle >= self.options.patience else None

    def forget_or(self, status: Status) -> Status | None:
        """Forget the pairs and go on along the gradient; return the status if none were left to forget."""
        if not self.pairs.kept:
            return status
        self.pairs.kept.clear()
        return None

    def keep_best(self, noise: float) -> None:
        """Update the best point, and count the steps since value or gradient norm last fell measurably."""
        point, (value, norm) = self.point, self.mark
        if point.value < value - self.eps * abs(value) or point.gradient_norm < 0.9 * norm:
            self.mark, self.idle = (min(value, point.value), min(norm, point.gradient_norm)), 0
        else:
            self.idle += 1
        lower = point.value < self.least - noise
        self.least = min(self.least, point.value)
        if lower or (point.value <= self.least + noise and point.gradient_norm < self.best.gradient_norm):
            self.best = point

    def evaluate(self, y: Tensor, direction: Tensor, length: float) -> Trial:
        value, gradient = self.fun(y.detach())
        self.evaluations += 1
        if gradient.shape != y.shape or gradient.dtype != y.dtype:
            raise InvalidProblem(
                f"the objective returned a gradient of shape {tuple(gradient.shape)} and {gradient.dtype} for y of "
                f"shape {tuple(y.shape)} and {y.dtype}"
            )
        # A copy, for an objective may hand out a buffer that it fills anew at its next call.
        gradient = gradient.detach().clone()
        numbers = [value.detach().double().sum(), _dot(direction, gradient), _norm(gradient)]
        total, slope, gradient_norm = torch.stack(numbers).tolist()
        return Trial(length, total, slope, y, gradient, gradient_norm)
