"""ProxF2SA: F2SA with sets on both levels, and proximal points in place of lower solutions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.optimizers import Adam, Optimizer
from bilevel.optimizers._base import at
from bilevel.optimizers.schedules import Power
from bilevel.oracles import Oracles
from bilevel.penalty import Curvature, Gap, Schedule, check_schedule, lower_batches, moved, wanted_at
from bilevel.solvers._base import (
    Metrics,
    Solver,
    check_lower_steps,
    check_upper,
    moved_x,
    projected_gradient,
    projected_lower_gradient,
)
from bilevel.status import InvalidProblem


class ProxF2SAState(NamedTuple):
    """Where the method stands.

    Args:
        x: upper variables `[p]`.
        y: prox center of the lower problem with f / penalty added, `[d]` or `[m, d]`.
        value: prox center of the lower problem alone (the paper's z), likewise.
        near_y: approximate proximal point of y (the paper's w_y).
        near_value: approximate proximal point of `value` (the paper's w_z).
        pull: 1 / ρ, 0-dim.
        step: upper steps made.
        upper: state of the upper optimizer.
        curvature: largest curvatures in y.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    value: Tensor
    near_y: Tensor
    near_value: Tensor
    pull: Tensor
    step: int
    upper: Any
    curvature: Curvature
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class ProxF2SA(Solver[ProxF2SAState]):
    """Minimize `f(x, y) + λ (g(x, y) - min_Y g(x, .))` over X and Y by steps toward proximal points.

        T times:  u <- P_Y( u - γ [dg/dy(x, u) + (u - z) / ρ] )
                  w <- P_Y( w - γ [dg/dy(x, w) + df/dy(x, w) / λ + (w - y) / ρ] )
        z <- (1 - β) z + β u,   y <- (1 - β) y + β w
        x <- P_X( x - τ h ),    h = df/dx(x, y) + λ [dg/dx(x, y) - dg/dx(x, z)]

    The paper's σ is 1 / λ. Neither level need be convex in y: h is right up to O(1 / λ) where the distance to the
    solutions of both lower problems is bounded by their proximal residuals (as under the Polyak-Lojasiewicz condition).
    With `prox=inf`, `averaging=1` and no lower set this is `F2SA`.

    Args:
        upper: optimizer of x; `SGD(τ)` is the paper's.
        penalty: λ > 0; a number, or a schedule of the step.
        lower_lr: γ > 0, a number, or a schedule of the step. It must be below `2 / (curvature of g + f / λ, plus
            1 / ρ)`; that is measured at the start and followed, and longer steps are cut. None: 0.8 in place of 2.
        lower_steps: T >= 1.
        prox: ρ > 0; in theory below 1 / (most negative curvature of g + f / λ in y); inf where both are convex. None:
            T / (largest curvature of g at the start), about as far as T steps go.
        averaging: β in (0, 1].
        shared_batches: whether y and z see the same lower batches.

    Raises:
        InvalidProblem: an option is out of its range; at `init`, also a `lower_lr` that is not stable.

    Cost:
        Per step: T + 1 upper and 2 (T + 1) lower gradients, 1 lower gradient for the curvature, 2 T projections on Y,
        0 HVPs. At the start: 16 upper and 17 lower gradients. Memory: six vectors like y.

    Notes:
        The answer's y is the penalized one: where the lower solutions are many, it is the one that f prefers.
        Metrics: `stationarity` is the norm of `(x - P_X(x - h), z - P_Y(z - dg/dy), y - P_Y(y - dg/dy - df/dy / λ))`.
        Fails where flat regions separate the solutions of g (the penalized objective is then not continuous in x).
        The paper's momentum is left out: it is that of `F3SA`.

    References:
        Kwon, Kwon, Wright and Nowak (2024), "On penalty methods for nonconvex bilevel optimization and first-order
        stochastic approximation", ICLR, arXiv 2309.01753.

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.scalar()
        >>> solution = bilevel.solve(task.problem, ProxF2SA(), task.x0, task.y0, steps=300)
        >>> task.x_error(solution.x) < 1e-2, solution.counts.hvps
        (True, 0)
    """

    needs_hvp: ClassVar[bool] = False
    handles_lower_set: ClassVar[bool] = True

    upper: Optimizer[Any] = field(default_factory=lambda: Adam(Power(0.1, -0.5, offset=30.0)))
    penalty: Schedule = field(default_factory=lambda: Power(10.0, 1 / 3, limit=1e3))
    lower_lr: Schedule | None = None
    lower_steps: int = 10
    prox: float | None = None
    averaging: float = 1.0
    shared_batches: bool = True

    def __post_init__(self) -> None:
        check_upper(self.upper)
        check_lower_steps(self.lower_steps)
        if self.prox is not None and not self.prox > 0:
            raise InvalidProblem(f"prox must be > 0 (inf: none), got {self.prox}.")
        if not 0 < self.averaging <= 1:
            raise InvalidProblem(f"averaging must be in (0, 1], got {self.averaging}.")
        check_schedule("penalty", self.penalty)
        check_schedule("lower_lr", self.lower_lr, optional=True)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> ProxF2SAState:
        """Return the state before the first step; measures curvatures."""
        self.refuse(oracles.problem)
        y = oracles.project_y(y)
        curvature = Curvature.measure(oracles, x, y)
        pull = (
            curvature.lower / self.lower_steps if self.prox is None else torch.full_like(curvature.lower, 1 / self.prox)
        )
        curvature.check(wanted_at(self.lower_lr, 0), at(self.penalty, None, 0), pull)
        return ProxF2SAState(x, y, y, y, y, pull, 0, self.upper.init(x), curvature, None)

    def step(self, oracles: Oracles, state: ProxF2SAState) -> ProxF2SAState:
        """Return the state after `lower_steps` steps toward proximal points, two averages and one step of x."""
        x, y, z, w, u = state.x, state.y, state.value, state.near_y, state.near_value
        penalty, first = at(self.penalty, None, state.step), state.step * (self.lower_steps + 1)
        curvature = state.curvature
        wanted = wanted_at(self.lower_lr, state.step)
        for t in range(self.lower_steps):  # over T and not over batches: a compiled step then serves them all
            k = first + t
            y_step, z_step = lower_batches(k, shared=self.shared_batches)
            in_u = oracles.lower_gradient(x, u, z_step)[1]
            in_w = moved(oracles.lower_gradient(x, w, y_step)[1], oracles.upper_gradient(x, w, k).y, 1 / penalty)
            if t == 0:
                curvature = curvature.followed(oracles, x, u, in_u, z_step)
                lr = curvature.step(penalty, wanted, state.pull)
            u = oracles.project_y(moved(torch.lerp(u, z, lr * state.pull), in_u, -lr))
            w = oracles.project_y(moved(torch.lerp(w, y, lr * state.pull), in_w, -lr))
        z, y = torch.lerp(z, u, self.averaging), torch.lerp(y, w, self.averaging)

        last = first + self.lower_steps
        gap = Gap.at(oracles, x, y, z, last, *lower_batches(last, shared=self.shared_batches))
        h = gap.direction(penalty)
        x_next, upper = moved_x(oracles, self.upper, x, h, state.upper)
        in_y, in_z = gap.residuals(penalty)
        in_y, in_z = projected_lower_gradient(oracles, y, in_y), projected_lower_gradient(oracles, z, in_z)
        return ProxF2SAState(
            x=x_next,
            y=y,
            value=z,
            near_y=w,
            near_value=u,
            pull=state.pull,
            step=state.step + 1,
            upper=upper,
            curvature=curvature,
            metrics=Metrics.unsolved(
                gap.upper.value, gap.value.value, in_z, (projected_gradient(oracles, x, h), in_y, in_z)
            ),
        )

    def backtracked(self, factor: float) -> ProxF2SA:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))
