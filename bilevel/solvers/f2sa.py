"""F2SA: hypergradients from gradients alone, as the difference of two lower problems."""

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
from bilevel.solvers._base import Metrics, Solver, check_lower_steps, check_upper, moved_x, projected_gradient
from bilevel.status import InvalidProblem


class F2SAState(NamedTuple):
    """Where the method stands.

    Args:
        x: upper variables `[p]`.
        y: the solution of the lower problem (the paper's z), `[d]` or `[m, d]`.
        relaxed: the solution of the lower problem with f / penalty added (the paper's y), likewise.
        landed: where the last steps of `y` and of `relaxed` led before momentum took them on (v and u), likewise.
        step: upper steps made.
        upper: state of the upper optimizer.
        curvature: largest curvatures in y.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    relaxed: Tensor
    landed: tuple[Tensor, Tensor]
    step: int
    upper: Any
    curvature: Curvature
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class F2SA(Solver[F2SAState]):
    """Minimize `f(x, y) + λ (g(x, y) - min g(x, .))` by gradient steps in x, y and a second lower variable z.

        T times:  v, v' <- z - γ dg/dy(x, z), v                        z <- v + β (v - v')
                  u, u' <- y - γ [dg/dy(x, y) + df/dy(x, y) / λ], u    y <- u + β (u - u')
        x <- P_X( x - τ h ),   h = df/dx(x, y) + λ [dg/dx(x, y) - dg/dx(x, z)]

    h differs from the hypergradient by O(1 / λ) where g(x, .) is strongly convex and y and z are exact. The penalty λ
    divides the step of y, whose size thus does not depend on it, and y and z take the same steps on the same batches:
    their errors then cancel in h, where λ multiplies them.

    Args:
        upper: optimizer of x; `SGD(τ)` is the paper's. Adam's steps must shrink: at a constant length they outrun y
            and z, and x circles.
        penalty: λ > 0; a number, or a schedule of the step. Bias falls with it, rounding grows: in float32 stay below
            about 1e3.
        lower_lr: γ > 0, a number, or a schedule of the step. It must be below `(2 + 2 β) / (1 + 2 β)` over the
            curvature of `g + f / λ`, which is measured at the start and followed: longer steps are cut. None: 0.8
            over it.
        lower_steps: T >= 1.
        momentum: β in [0, 1), Nesterov's, carried from one upper step to the next; 0 is the paper's.
        shared_batches: whether y and z see the same lower batches. The theory draws them independently, but λ then
            multiplies their differences.

    Raises:
        InvalidProblem: an option is out of its range; at `init`, also a `lower_lr` that is not stable.

    Cost:
        Per step: T + 1 upper and 2 (T + 1) lower gradients, 1 lower gradient for the curvature, 1 upper value, 0 HVPs.
        At the start: 16 upper and 17 lower gradients. Memory: six vectors like y.

    Notes:
        Metrics: `stationarity` is the norm of `(x - P_X(x - h), dg/dy(x, z), dg/dy(x, y) + df/dy(x, y) / λ)`, since h
        alone is also small where y and z have only just started to part; `upper_value` is f(x, z).
        Deviations from the paper: momentum, one step length γ for y and z, an x step that does not shrink with λ, and
        X. Momentum is what ill-conditioned lower problems need: y and z then follow x with half the gradients.

    References:
        Kwon, Kwon, Wright and Nowak (2023), "A fully first-order method for stochastic bilevel optimization", ICML,
        arXiv 2301.10945 (F2SA).

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.scalar()
        >>> solution = bilevel.solve(task.problem, F2SA(), task.x0, task.y0, steps=200)
        >>> task.x_error(solution.x) < 1e-2, solution.counts.hvps
        (True, 0)
    """

    needs_hvp: ClassVar[bool] = False
    contract_steps: ClassVar[int] = 500

    upper: Optimizer[Any] = field(default_factory=lambda: Adam(Power(0.1, -0.5, offset=60.0)))
    penalty: Schedule = field(default_factory=lambda: Power(10.0, 1 / 3, limit=1e3))
    lower_lr: Schedule | None = None
    lower_steps: int = 5
    momentum: float = 0.9
    shared_batches: bool = True

    def __post_init__(self) -> None:
        check_upper(self.upper)
        check_lower_steps(self.lower_steps)
        if not 0 <= self.momentum < 1:
            raise InvalidProblem(f"momentum must be in [0, 1), got {self.momentum!r}.")
        check_schedule("penalty", self.penalty)
        check_schedule("lower_lr", self.lower_lr, optional=True)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> F2SAState:
        """Return the state before the first step; measures curvatures."""
        self.refuse(oracles.problem)
        curvature = Curvature.measure(oracles, x, y)
        curvature.check(wanted_at(self.lower_lr, 0), at(self.penalty, None, 0), momentum=self.momentum)
        return F2SAState(x, y, y, (y, y), 0, self.upper.init(x), curvature, None)

    def step(self, oracles: Oracles, state: F2SAState) -> F2SAState:
        """Return the state after `lower_steps` steps of y and z and one of x."""
        x, y, z, curvature = state.x, state.relaxed, state.y, state.curvature
        (v, u), beta = state.landed, self.momentum
        penalty, first = at(self.penalty, None, state.step), state.step * (self.lower_steps + 1)
        wanted = wanted_at(self.lower_lr, state.step)
        for t in range(self.lower_steps):  # over T and not over batches: a compiled step then serves them all
            k = first + t
            y_step, z_step = lower_batches(k, shared=self.shared_batches)
            in_z = oracles.lower_gradient(x, z, z_step)[1]
            in_y = moved(oracles.lower_gradient(x, y, y_step)[1], oracles.upper_gradient(x, y, k).y, 1 / penalty)
            if t == 0:
                curvature = curvature.followed(oracles, x, z, in_z, z_step)
                lr = curvature.step(penalty, wanted, momentum=beta)
            old_v, v, old_u, u = v, moved(z, in_z, -lr), u, moved(y, in_y, -lr)
            z, y = torch.lerp(old_v, v, 1 + beta), torch.lerp(old_u, u, 1 + beta)
        last = first + self.lower_steps
        gap = Gap.at(oracles, x, y, z, last, *lower_batches(last, shared=self.shared_batches))
        h = gap.direction(penalty)
        x_next, upper = moved_x(oracles, self.upper, x, h, state.upper)
        residuals = projected_gradient(oracles, x, h), *gap.residuals(penalty)
        metrics = Metrics.unsolved(oracles.upper_value(x, z, last), gap.value.value, gap.value.y, residuals)
        return F2SAState(x_next, z, y, (v, u), state.step + 1, upper, curvature, metrics)

    def backtracked(self, factor: float) -> F2SA:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))
