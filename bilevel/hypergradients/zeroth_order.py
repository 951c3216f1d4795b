"""Hypergradients from values alone: antithetic evolution strategies, and persistent ones for long training runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.data._seeding import mixed
from bilevel.hypergradients._base import Certificate, Estimate
from bilevel.hypergradients._trained import Trained, TrainedState
from bilevel.oracles import Counts, Oracles
from bilevel.status import InvalidProblem, Status
from bilevel.training import TrainingState


@dataclass(frozen=True)
class _Sampled(Trained):
    """Estimators that draw pairs x + e, x - e with `e ~ N(0, sigma^2 I)`."""

    pairs: int = 8
    sigma: float = 0.1

    def __post_init__(self) -> None:
        self.check()
        if self.pairs < 1 or not 0 < self.sigma < math.inf:
            raise InvalidProblem(
                f"{type(self).__name__} needs pairs >= 1 and sigma > 0, got {self.pairs} and {self.sigma}."
            )

    def drawn(self, oracles: Oracles, x: Tensor, upper_step: int) -> Tensor:
        """Return the perturbations of this upper step, `[pairs, p]`."""
        generator = torch.Generator().manual_seed(mixed("perturbations", oracles.seed, upper_step))
        noise = torch.randn(self.pairs, len(x), generator=generator, dtype=x.dtype).to(x.device)
        return self.sigma * noise

    def summed_up(
        self, oracles: Oracles, x: Tensor, y: Tensor, rows: Tensor, value: Tensor, before: Counts
    ) -> Estimate:
        """Return the mean of `rows`, one estimate a pair, with its standard error."""
        mean = rows.mean(0)
        error = (rows - mean).square().sum().div(max(len(rows) - 1, 1) * len(rows)).sqrt()
        error = error if len(rows) > 1 else torch.full_like(error, torch.inf)
        lower_value, lower_gradient = oracles.lower_gradient(x, y)
        certificate = Certificate.unsolved(
            Status.APPROXIMATE,
            lower_gradient.norm(),
            oracles.counts - before,
            error_estimate=error,
        )
        return Estimate(mean, value, lower_value, y, certificate)


@dataclass(frozen=True)
class ZerothOrder(_Sampled):
    """Estimate the gradient of `F(x) = f(x, y_T(x))` from values of F at pairs of points around x.

        h = 1 / (2 N sigma^2) sum_i (F(x + e_i) - F(x - e_i)) e_i,    e_i ~ N(0, sigma^2 I)

    It is unbiased for F smoothed by the Gaussian; its variance is about (p + 1) / N times its squared length. Neither
    objective need be differentiable in x.

    Args:
        lower: see `Unrolled`.
        steps: see `Unrolled`.
        restart: see `Unrolled`; each point trains from the same start, and without restarts the next start is where
            training at x itself ends.
        fresh: see `Unrolled`.
        pairs: N, drawn anew for each upper step.
        sigma: > 0, in units of x: the scale at which F is smoothed.

    Raises:
        InvalidProblem: an option is out of range.

    Cost:
        2 N + 1 training runs. Memory: two states.

    References:
        Nesterov and Spokoiny, "Random gradient-free minimization of convex functions", Foundations of Computational
        Mathematics 17, 2017. Salimans, Ho, Chen, Sidor, Sutskever, 2017, arXiv 1703.03864, for pairs.

    Example:
        >>> import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, batch: y, lower=lambda x, y, batch: 0.5 * (y - x).square())
        >>> estimator = ZerothOrder(lower=bilevel.SGD(0.5), steps=2, pairs=1)
        >>> h = bilevel.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), estimator=estimator)
        >>> bool(h.gradient > 0)  # 0.75 e^2 / sigma^2
        True
    """

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
        """Return the hypergradient around x, with y trained at x itself, and the next state."""
        before = oracles.counts
        reached, after = self._trained(oracles, x, y, state, upper_step, lower_step)
        value = oracles.upper_value(x, reached.y, upper_step)
        rows = []
        for e in self.drawn(oracles, x, upper_step):
            ends = [self._trained(oracles, x + sign * e, y, state, upper_step, lower_step)[0] for sign in (1, -1)]
            up, down = (oracles.upper_value(x + s * e, end.y, upper_step) for s, end in zip((1, -1), ends, strict=True))
            rows.append((up - down) / (2 * self.sigma**2) * e)
        estimate = self.summed_up(oracles, x, reached.y, torch.stack(rows), value, before)
        return estimate, after._replace(optimizer=reached.optimizer)

    def _trained(
        self, oracles: Oracles, x: Tensor, y: Tensor, state: TrainedState, upper_step: int, lower_step: int
    ) -> tuple[TrainingState, TrainedState]:
        training, now, after = self.begin(oracles, x, y, state, upper_step, lower_step)
        for step in range(self.steps):
            now = training.advance(step, now)
        return now, after


class Particles(NamedTuple):
    """What persists of `PES` from one window to the next; each field has one row a particle (a pair has two).

    Args:
        y: weights `[2 N, *]`.
        optimizer: states of the lower optimizer.
        noise: sums of the perturbations since the training began, `[2 N, p]`.
        window: windows made in this training.
    """

    y: Tensor
    optimizer: tuple[tuple[object, ...], ...]
    noise: Tensor
    window: int


@dataclass(frozen=True)
class PES(_Sampled):
    """Persistent evolution strategies: a window of steps at a time, with no bias from cutting training into windows.

        e_i ~ N(0, sigma^2 I);   train each particle `steps` further at x + e_i;   s_i += e_i
        h = 1 / (2 N sigma^2) sum_i s_i f(x + e_i, y_i)

    over pairs of particles with opposite noise. Summed over the windows of a training it is unbiased for the sum of f
    at the ends of the windows, smoothed by the Gaussian.

    Args:
        lower: see `Unrolled`.
        steps: of one window: each upper step sees one.
        restart: not used: particles go on until the horizon is reached.
        fresh: see `Unrolled`.
        pairs: N.
        sigma: > 0, in units of x.
        horizon: steps of a training, after which the particles start anew; a multiple of `steps`.

    Raises:
        InvalidProblem: an option is out of range.

    Cost:
        2 N windows of steps; memory: 2 N states.

    References:
        Vicol, Metz, Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs with persistent
        evolution strategies", ICML 2021 (Algorithm 2).
    """

    horizon: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon < self.steps or self.horizon % self.steps:
            raise InvalidProblem(f"PES(horizon={self.horizon}) must be a multiple of steps={self.steps}.")

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
        """Return this window's part of the hypergradient, and the next state; y is the first particle's."""
        before = oracles.counts
        old: Particles | None = state.memory
        if old is None or old.window * self.steps >= self.horizon:
            old = self._fresh(oracles, x, state)
        noise = self.drawn(oracles, x, upper_step).repeat_interleave(2, 0)
        noise[1::2] *= -1
        sums = old.noise + noise
        ends, values = [], []
        for i in range(2 * self.pairs):
            training = self.training(oracles, x + noise[i], lower_step + old.window * self.steps, state)
            now = TrainingState(old.y[i], old.optimizer[i])
            for step in range(self.steps):
                now = training.advance(step, now)
            ends.append(now)
            values.append(oracles.upper_value(x + noise[i], now.y, upper_step))
        value = torch.stack(values)
        rows = (sums * value[:, None] / self.sigma**2).view(self.pairs, 2, -1).mean(1)
        estimate = self.summed_up(oracles, x, ends[0].y, rows, value.mean(), before)
        particles = Particles(
            torch.stack([end.y for end in ends]), tuple(end.optimizer for end in ends), sums, old.window + 1
        )
        return estimate, state._replace(memory=particles, age=state.age + 1)

    def _fresh(self, oracles: Oracles, x: Tensor, state: TrainedState) -> Particles:
        y = state.y
        if oracles.problem.lower_init is not None:
            y = oracles.y_layout.flatten(oracles.problem.lower_init(oracles.x_layout.unflatten(x)))
        start = self.training(oracles, x, 0, state).start(y)
        count = 2 * self.pairs
        return Particles(torch.stack([y] * count), (start.optimizer,) * count, x.new_zeros(count, len(x)), 0)
