"""BDA: unroll steps along the average of both objectives, and differentiate through them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.aggregated import Aggregated
from bilevel.optimizers import Adam, Optimizer
from bilevel.oracles import Oracles
from bilevel.smoothness import check_curved, check_lr, smoothness
from bilevel.solvers._base import (
    Metrics,
    Solver,
    check_lower_steps,
    check_nonnegative,
    check_positive,
    check_upper,
    moved_x,
    projected_gradient,
)
from bilevel.status import InvalidProblem

SAFE = 0.8
"""Lower steps, in units of 1 / curvature; 2 is the limit."""


class BDAState(NamedTuple):
    """Where BDA stands.

    Args:
        x: upper variables `[p]`.
        y: lower variables after the last unrolled steps, `[d]` or `[m, d]`.
        start: where unrolled steps begin.
        step: upper steps made, which is also the index of the next upper batch.
        upper: state of the upper optimizer.
        curvatures: largest of f and of g in y.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    start: Tensor
    step: int
    upper: Any
    curvatures: tuple[Tensor, Tensor]
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class BDA(Solver[BDAState]):
    """Descend along the gradient of `f(x, y_T(x))`, y_T reached by T steps that both objectives steer.

        y_t+1 = y_t - s (mu_t df/dy + (1 - mu_t) dg/dy),   mu_t = mu (t + 1)^-decay,   t = 0 .. T - 1

    It is for convex lower objectives with many minimizers: g alone says nothing about where in the set of its
    minimizers y should go, f does. The answer has a bias of the order of the last mu.

    Args:
        upper: optimizer of x.
        lower_steps: T >= 1.
        mu: 0 <= mu <= 1, weight of f at the first unrolled step; 0 is plain unrolling.
        decay: >= 0, of mu over the unrolled steps.
        lr: > 0, s; None takes 0.8 / (curvature of the average), measured.
        restart: begin each time where the solve began, as the authors do; the answer then depends on that point, the
            more the fewer the steps. Else begin at the last y_T, and the gradient ignores how that depends on x.
        measure_every: measure curvatures again after so many upper steps; 0 never.

    Cost:
        Per step: T + 1 gradients of f, T of g, T HVPs and T cross products, and memory for T graphs. A measurement:
        32 gradients.

    Notes:
        Metrics: `stationarity` is the norm of the unrolled gradient, projected; g is seen at the last unrolled point.

    References:
        Liu, Mu, Yuan, Zeng, Zhang, "A generic first-order algorithmic framework for bi-level programming beyond
        lower-level singleton", ICML 2020.

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.quadratic()
        >>> solution = bilevel.solve(task.problem, BDA(), task.x0, task.y0, steps=150)
        >>> task.x_error(solution.x) < 1e-2
        True
    """

    needs_hvp: ClassVar[bool] = True

    upper: Optimizer[Any] = field(default_factory=lambda: Adam(lr=0.1))
    lower_steps: int = 20
    mu: float = 0.3
    decay: float = 1.0
    lr: float | None = None
    restart: bool = False
    measure_every: int = 500

    def __post_init__(self) -> None:
        check_upper(self.upper)
        check_lower_steps(self.lower_steps)
        if not 0 <= self.mu <= 1:
            raise InvalidProblem(f"mu must lie in [0, 1], got {self.mu}.")
        check_nonnegative(decay=self.decay, measure_every=self.measure_every)
        check_positive(lr=self.lr)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> BDAState:
        """Return the state before the first step; measures curvatures.

        Raises:
            InvalidProblem: the problem has a part that this solver cannot treat, g has no curvature in y, or `lr` is
                too large for it.
        """
        self.refuse(oracles.problem)
        of_f, of_g = curvatures = _curvatures(oracles, x, y, 0, 0)
        check_curved(of_g, torch.finfo(y.dtype).eps)
        aggregated = self.mu * of_f + (1 - self.mu) * of_g
        check_lr("lr", self.lr, torch.maximum(aggregated, of_g) if self.decay > 0 else aggregated)
        return BDAState(x, y, y, 0, self.upper.init(x), curvatures, None)

    def step(self, oracles: Oracles, state: BDAState) -> BDAState:
        """Return the state after T unrolled lower steps, their reverse sweep and one upper step."""
        x, k, first = state.x, state.step, state.step * self.lower_steps
        of_f, of_g = curvatures = state.curvatures
        if self.measure_every and k and k % self.measure_every == 0:
            of_f, of_g = curvatures = _curvatures(oracles, x, state.y, k, first)

        y = state.start if self.restart else state.y
        passed: list[tuple[Aggregated, float | Tensor]] = []
        for t in range(self.lower_steps):
            mu = self.mu * (t + 1) ** -self.decay
            s = SAFE / (mu * of_f + (1 - mu) * of_g) if self.lr is None else self.lr
            psi = Aggregated(oracles, x, y, mu, upper_step=k, lower_step=first + t)
            y = y - s * psi.gradient
            passed.append((psi, s))

        f = oracles.upper_gradient(x, y, k)
        h, p = f.x, f.y
        for psi, s in reversed(passed):
            h = h - s * psi.cross(p)
            p = p - s * psi.hvp(p)
        x_next, upper = moved_x(oracles, self.upper, x, h, state.upper)
        lower_value, lower_gradient = oracles.lower_gradient(x, y, first + self.lower_steps - 1)
        metrics = Metrics.unsolved(f.value, lower_value, lower_gradient, [projected_gradient(oracles, x, h)])
        return BDAState(x_next, y, state.start, k + 1, upper, curvatures, metrics)

    def backtracked(self, factor: float) -> BDA:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))


def _curvatures(oracles: Oracles, x: Tensor, y: Tensor, upper_step: int, lower_step: int) -> tuple[Tensor, Tensor]:
    """Measure those of f and g in y, by differences of gradients."""
    tiny = torch.finfo(y.dtype).eps
    of_f = smoothness(lambda v: oracles.upper_gradient(x, v, upper_step).y, y).clamp_min(tiny)
    of_g = smoothness(lambda v: oracles.lower_gradient(x, v, lower_step)[1], y).clamp_min(tiny)
    return of_f, of_g
