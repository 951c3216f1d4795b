"""BLOCC: two saddle point problems in y, for coupled lower constraints that no one can project on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.feasibility import due, inspect_multipliers, warn_at_bound
from bilevel.moreau import check_runaway
from bilevel.multipliers import Scale, clipped, constraint_terms
from bilevel.optimizers import Adam, Optimizer
from bilevel.optimizers._base import at
from bilevel.optimizers.schedules import Power
from bilevel.oracles import Oracles
from bilevel.penalty import Curvature, Gap, Schedule, check_schedule, wanted_at
from bilevel.solvers._base import (
    Metrics,
    Solver,
    check_lower_steps,
    check_positive,
    check_upper,
    moved_x,
    projected_gradient,
)
from bilevel.status import InvalidProblem


class Saddle(NamedTuple):
    """A lower point and its multipliers, of c then of h.

    Args:
        y: `[d]` or `[m, d]`.
        multiplier: `[n]` or `[m, n]`, in the user's units.
    """

    y: Tensor
    multiplier: Tensor


class BLOCCState(NamedTuple):
    """Where BLOCC stands.

    Args:
        x: upper variables `[p]`.
        y: the solution of the lower problem, `[d]` or `[m, d]`.
        step: upper steps made.
        multiplier: its multipliers, `[n]` or `[m, n]`, in the user's units.
        relaxed: the lower solution with f / penalty added, and its multipliers.
        upper: state of the upper optimizer.
        scale: of the constraints.
        touched: the first step after which a multiplier was at its bound, -1 if none was; 0-dim.
        size: of the start, `1 + ‖(x, y)‖`.
        curvature: largest curvatures in y.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    multiplier: Tensor
    relaxed: Saddle
    upper: Any
    scale: Scale
    touched: Tensor
    size: Tensor
    curvature: Curvature
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class BLOCC(Solver[BLOCCState]):
    """Minimize `max min f + λ (g - v)` by primal-dual steps, v the value of the constrained lower problem.

        v(x) = max_m min_y  g(x, y) + <m, c(x, y)>,                            m >= 0, y in Y: at (z, m)
        F(x) = max_n min_y  f(x, y) + λ (g(x, y) + <n, c(x, y)> - v(x)),       n >= 0, y in Y: at (y, n)

        T times:  z <- P_Y( z - γ [dg/dy(x, z) + <m, dc/dy(x, z)>] ),                       m <- [m + σ c(x, z)]_+
                  y <- P_Y( y - γ [dg/dy(x, y) + <n, dc/dy(x, y)> + df/dy(x, y) / λ] ),     n <- [n + σ c(x, y)]_+
        x <- P_X( x - τ h )
        h = df/dx(x, y) + λ [dg/dx(x, y) + <n, dc/dx(x, y)> - dg/dx(x, z) - <m, dc/dx(x, z)>]

    Without the terms `<., dc/dx>` h would be wrong wherever a constraint that x enters is active. g is strongly convex
    in y, c convex, and a constraint qualification holds. Equations are treated like c, with multipliers of either
    sign. No projection on `{(x, y): c <= 0}` is needed, so y is feasible only in the limit.

    Args:
        upper: optimizer of x; `SGD(τ)` is the paper's.
        penalty: λ > 0; a number, or a schedule of the step. The bias of x falls like 1 / λ.
        lower_lr: γ > 0, stable below `2 / (curvature of g + <m, c> + f / λ)`; a number, or a schedule of the step.
            None: 0.8 / that curvature, measured at the start and followed (that of c: only measured). A longer one
            than is stable is cut.
        multiplier_lr: σ γ b² in (0, 2], b the length of the scaled constraints: the constraints are scaled so that
            their gradients in y have length 1 at the start.
        lower_steps: T >= 1.
        bound: of every multiplier, > 0, in the user's units: a warning says so when one touches it.

    Raises:
        InvalidProblem: an option is out of its range; at `init`, also a `lower_lr` that is not stable.

    Cost:
        Per step: T + 1 upper and 2 T + 3 lower gradients, 2 (T + 1) gradients and 2 T values of each of c and h, 1
        upper value, 0 HVPs. At the start: 17 lower gradients, 16 upper ones and 16 of the constraints together (fewer
        in less than 8 dimensions), 2 of each constraint. Memory: three vectors like y.

    Notes:
        Metrics: `stationarity` is the norm of `x - P_X(x - h)` and of the last moves of y, z, m and n, over the lengths
        of their steps; `upper_value` is f(x, z).
        Deviations from the paper: its n divided by λ, steps of y and z that are equal so that their errors cancel in h,
        plain steps of m and n (there accelerated), equations.

    References:
        Jiang, Xiao, Tenorio, Real-Rojas, Marques, Chen, "A primal-dual-assisted penalty approach to bilevel
        optimization with coupled constraints", NeurIPS 2024, arXiv 2406.10148 (Algorithm 1, with one primal step for
        each dual one).

    Example:
        >>> import bilevel, torch
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, b: 0.5 * (x - 2) ** 2 + 0.5 * (y - 1) ** 2,
        ...     lower=lambda x, y, b: 0.5 * (y - 3) ** 2, constraint=lambda x, y, b: (x + y - 2).reshape(1))
        >>> solution = bilevel.solve(problem, BLOCC(), torch.tensor(0.0), torch.tensor(0.0), steps=300)
        >>> round(float(solution.x), 1), round(float(solution.y), 1)
        (1.5, 0.5)
    """

    needs_hvp: ClassVar[bool] = False
    handles_lower_set: ClassVar[bool] = True
    handles_constraints: ClassVar[bool] = True

    upper: Optimizer[Any] = field(default_factory=lambda: Adam(Power(0.1, -0.5, offset=30.0)))
    penalty: Schedule = field(default_factory=lambda: Power(10.0, 1 / 3, limit=1e3))
    lower_lr: Schedule | None = None
    multiplier_lr: float = 0.5
    lower_steps: int = 10
    bound: float = 1e3

    def __post_init__(self) -> None:
        check_upper(self.upper)
        check_lower_steps(self.lower_steps)
        if not 0 < self.multiplier_lr <= 2:
            raise InvalidProblem(f"multiplier_lr must be in (0, 2], got {self.multiplier_lr}.")
        check_positive(bound=self.bound)
        check_schedule("penalty", self.penalty)
        check_schedule("lower_lr", self.lower_lr, optional=True)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> BLOCCState:
        """Return the state before the first step, with multipliers 0; measures curvatures and constraints."""
        self.refuse(oracles.problem)
        curvature = Curvature.measure(oracles, x, y)
        curvature.check(wanted_at(self.lower_lr, 0), at(self.penalty, None, 0))
        scale = Scale.measure(oracles, x, y)
        none, size = torch.zeros_like(scale.norms), 1 + torch.cat([x, y.flatten()]).norm()
        return BLOCCState(
            x, y, 0, none, Saddle(y, none), self.upper.init(x), scale,
            torch.full((), -1, device=x.device), size, curvature, None,
        )  # fmt: skip

    def step(self, oracles: Oracles, state: BLOCCState) -> BLOCCState:
        """Return the state after `lower_steps` primal-dual steps of both saddle points and one of x."""
        x, curvature, scale = state.x, state.curvature, state.scale
        lower, relaxed = Saddle(state.y, state.multiplier), state.relaxed
        penalty, first = at(self.penalty, None, state.step), state.step * (self.lower_steps + 1)
        moves: list[Tensor] = []
        wanted = wanted_at(self.lower_lr, state.step)
        for t in range(self.lower_steps):  # over T and not over batches: a compiled step then serves them all
            k = first + t
            in_z = oracles.lower_gradient(x, lower.y, k)[1]
            in_y = oracles.lower_gradient(x, relaxed.y, k)[1] + oracles.upper_gradient(x, relaxed.y, k).y / penalty
            if t == 0:
                curvature = curvature.followed(oracles, x, lower.y, in_z, k)
            largest = torch.maximum(lower.multiplier.abs(), relaxed.multiplier.abs())
            lr = curvature.step(penalty, wanted, scale.curvature(largest))
            lower, moved, seen = self._saddle_step(oracles, x, lower, in_z, lr, scale, k)
            relaxed, also, seen_too = self._saddle_step(oracles, x, relaxed, in_y, lr, scale, k)
            scale = scale._replace(coupling=torch.maximum(seen, seen_too))
            moves = [*moved, *also]

        last = first + self.lower_steps
        gap = Gap.at(oracles, x, relaxed.y, lower.y, last, last, last)
        pull = constraint_terms(oracles, x, relaxed.y, relaxed.multiplier, scale.inequalities, last)
        value_pull = constraint_terms(oracles, x, lower.y, lower.multiplier, scale.inequalities, last)
        h = gap.direction(penalty) + penalty * (pull.x - value_pull.x)
        x_next, upper = moved_x(oracles, self.upper, x, h, state.upper)

        residuals = projected_gradient(oracles, x, h), *moves
        metrics = Metrics.unsolved(oracles.upper_value(x, lower.y, last), gap.value.value, moves[0], residuals)
        largest = torch.maximum(lower.multiplier.abs(), relaxed.multiplier.abs())
        at_bound = (largest >= self.bound).any() & (state.touched < 0)
        return state._replace(
            x=x_next, y=lower.y, step=state.step + 1, multiplier=lower.multiplier, relaxed=relaxed,
            upper=upper, touched=torch.where(at_bound, torch.full_like(state.touched, state.step + 1), state.touched),
            scale=scale, curvature=curvature, metrics=metrics,
        )  # fmt: skip

    def inspect(self, oracles: Oracles, state: BLOCCState) -> None:
        """Warn where a multiplier touches its bound; raise where iterates or multipliers run away.

        Multipliers are looked at closely at steps 64, 128, 256... and where one meets its bound.
        """
        check_runaway(
            state.size, state.step, "lower lower_lr and multiplier_lr; g must be strongly convex in y.",
            x=state.x, y=state.y, relaxed=state.relaxed.y, multiplier=state.multiplier,
        )  # fmt: skip
        if state.multiplier.numel() and due(state.step, state.touched):
            inspect_multipliers(oracles, state.x, state.y, state.multiplier, state.scale, state.step - 1)
        warn_at_bound(state.touched, state.step, self.bound, "BLOCC(bound=...)")

    def backtracked(self, factor: float) -> BLOCC:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))

    def _saddle_step(
        self, oracles: Oracles, x: Tensor, saddle: Saddle, gradient: Tensor, lr: Tensor, scale: Scale, k: int
    ) -> tuple[Saddle, list[Tensor], Tensor]:
        """Step y down, then the multipliers up; also return both moves over their steps, and the coupling now seen."""
        before = constraint_terms(oracles, x, saddle.y, saddle.multiplier, scale.inequalities, k)
        y = oracles.project_y(saddle.y - lr * (gradient + before.y))
        # In the user's units: scaling the constraint by 1 / norm scales its slope in the multiplier by 1 / norm².
        dual_lr = self.multiplier_lr / (lr * scale.coupling.square() * scale.norms.square())
        value = constraint_terms(oracles, x, y, None, scale.inequalities, k).value
        multiplier = clipped(saddle.multiplier + dual_lr * value, self.bound, scale.inequalities)
        moves = [(saddle.y - y) / lr, (saddle.multiplier - multiplier) / (dual_lr * scale.norms)]
        seen = scale.followed(value - before.value, y - saddle.y).coupling
        return Saddle(y, multiplier), [move.flatten() for move in moves], seen
