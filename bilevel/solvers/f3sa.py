"""F3SA: F2SA in a single loop, with recursive momentum in all six of its gradients."""

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
from bilevel.solvers._base import Metrics, Solver, check_upper, moved_x, projected_gradient
from bilevel.status import InvalidProblem


class Gradients(NamedTuple):
    """The six gradients of a step, or their running estimates: dg/dy at z and y, df/dy, df/dx, dg/dx at y and z."""

    g_y_at_z: Tensor
    g_y_at_y: Tensor
    f_y: Tensor
    f_x: Tensor
    g_x_at_y: Tensor
    g_x_at_z: Tensor


class F3SAState(NamedTuple):
    """Where the method stands.

    Args:
        x: upper variables `[p]`.
        y: the solution of the lower problem (the paper's z), `[d]` or `[m, d]`.
        relaxed: the solution of the lower problem with f / penalty added (the paper's y), likewise.
        before: x, y and relaxed one step ago.
        estimates: of the six gradients.
        step: steps made.
        upper: state of the upper optimizer.
        curvature: largest curvatures in y.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    relaxed: Tensor
    before: tuple[Tensor, Tensor, Tensor]
    estimates: Gradients
    step: int
    upper: Any
    curvature: Curvature
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class F3SA(Solver[F3SAState]):
    """Take F2SA's steps along estimates in place of gradients, each corrected for the move since the last step.

        estimate <- G(now; batch) + (1 - η) [estimate - G(before; batch)]      for each of six gradients G
        z <- z - γ est[dg/dy(x, z)]
        y <- y - γ (est[dg/dy(x, y)] + est[df/dy(x, y)] / λ)
        x <- P_X( x - τ (est[df/dx(x, y)] + λ (est[dg/dx(x, y)] - est[dg/dx(x, z)])) )

    Both G see the same batch, so that the estimate's error shrinks by 1 - η a step and grows only with the move. λ
    stays outside the estimates, since it changes from step to step. Without noise, or with η = 1, this is `F2SA` with
    `lower_steps=1`, bit for bit.

    Args:
        upper: optimizer of x; `SGD(τ)` is the paper's. With one lower step for each upper one τ must be small; Adam's
            steps must shrink.
        penalty: λ > 0; a number, or a schedule of the step.
        lower_lr: γ > 0, a number, or a schedule of the step. It must be below `2 / (curvature of g + f / λ)`; that
            curvature is measured at the start and followed, and longer steps are cut. None: 0.8 / that curvature.
        renewal: η in (0, 1]; a number, or a schedule of the step. The first step always takes 1.
        shared_batches: whether y and z see the same lower batches.

    Raises:
        InvalidProblem: an option is out of its range; at `init`, also a `lower_lr` that is not stable.

    Cost:
        Per step: 4 upper and 8 lower gradients, twice those of F2SA with T = 1, 1 lower gradient for the curvature, 1
        upper value, 0 HVPs. At the start: 16 upper and 17 lower gradients. Memory: eight vectors like y, five like x.

    Notes:
        Metrics as of F2SA, with estimates in place of gradients. On a noisy quadratic at equal constant steps the
        squared hypergradient ended 2 to 11 times smaller than F2SA's (η = 0.05, the noise the same at every point); on
        equal decaying schedules the two were alike, and F2SA costs half.

    References:
        Kwon, Kwon, Wright and Nowak (2023), "A fully first-order method for stochastic bilevel optimization", ICML,
        arXiv 2301.10945 (F3SA).

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.scalar()
        >>> solution = bilevel.solve(task.problem, F3SA(), task.x0, task.y0, steps=300)
        >>> task.x_error(solution.x) < 1e-2, solution.counts.hvps
        (True, 0)
    """

    needs_hvp: ClassVar[bool] = False
    contract_steps: ClassVar[int] = 1000

    upper: Optimizer[Any] = field(default_factory=lambda: Adam(Power(0.05, -1.0, offset=100.0)))
    penalty: Schedule = field(default_factory=lambda: Power(10.0, 1 / 3, limit=1e3))
    lower_lr: Schedule | None = None
    renewal: Schedule = field(default_factory=lambda: Power(1.0, -0.8, offset=100.0))
    shared_batches: bool = True

    def __post_init__(self) -> None:
        check_upper(self.upper)
        check_schedule("penalty", self.penalty)
        check_schedule("renewal", self.renewal)
        if not callable(self.renewal) and self.renewal > 1:
            raise InvalidProblem(f"renewal must be in (0, 1], got {self.renewal!r}.")
        check_schedule("lower_lr", self.lower_lr, optional=True)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> F3SAState:
        """Return the state before the first step; measures curvatures."""
        self.refuse(oracles.problem)
        curvature = Curvature.measure(oracles, x, y)
        curvature.check(wanted_at(self.lower_lr, 0), at(self.penalty, None, 0))
        none = Gradients(*(torch.zeros_like(v) for v in (y, y, y, x, x, x)))
        return F3SAState(x, y, y, (x, y, y), none, 0, self.upper.init(x), curvature, None)

    def step(self, oracles: Oracles, state: F3SAState) -> F3SAState:
        """Return the state after one step of each of z, y and x."""
        x, y, z = state.x, state.relaxed, state.y
        old_x, old_z, old_y = state.before
        penalty, k = at(self.penalty, None, state.step), 2 * state.step
        keep = 0.0 if state.step == 0 else 1 - at(self.renewal, None, state.step)
        old = state.estimates

        now = self._in_y(oracles, x, y, z, k)
        in_z, in_y, in_f = (
            moved(a, b - c, keep)
            for a, b, c in zip(now, old[:3], self._in_y(oracles, old_x, old_y, old_z, k), strict=True)
        )
        curvature = state.curvature.followed(oracles, x, z, now[0], lower_batches(k, shared=self.shared_batches)[1])
        lr = curvature.step(penalty, wanted_at(self.lower_lr, state.step))
        new_z, new_y = moved(z, in_z, -lr), moved(y, moved(in_y, in_f, 1 / penalty), -lr)

        gap = Gap.at(oracles, x, new_y, new_z, k + 1, *lower_batches(k + 1, shared=self.shared_batches))
        # One step ago this point was (x, y, z) with that step's x, and its new y and z: today's.
        past = Gap.at(oracles, old_x, y, z, k + 1, *lower_batches(k + 1, shared=self.shared_batches))
        f_x, g_x_at_y, g_x_at_z = (
            moved(a, b - c, keep) for a, b, c in zip(_in_x(gap), old[3:], _in_x(past), strict=True)
        )
        h = moved(f_x, g_x_at_y - g_x_at_z, penalty)
        x_next, upper = moved_x(oracles, self.upper, x, h, state.upper)
        residuals = projected_gradient(oracles, x, h), *gap.residuals(penalty)
        return F3SAState(
            x=x_next,
            y=new_z,
            relaxed=new_y,
            before=(x, z, y),
            estimates=Gradients(in_z, in_y, in_f, f_x, g_x_at_y, g_x_at_z),
            step=state.step + 1,
            upper=upper,
            curvature=curvature,
            metrics=Metrics.unsolved(oracles.upper_value(x, new_z, k + 1), gap.value.value, gap.value.y, residuals),
        )

    def backtracked(self, factor: float) -> F3SA:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))

    def _in_y(self, oracles: Oracles, x: Tensor, y: Tensor, z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        y_step, z_step = lower_batches(k, shared=self.shared_batches)
        in_z = oracles.lower_gradient(x, z, z_step)[1]
        return in_z, oracles.lower_gradient(x, y, y_step)[1], oracles.upper_gradient(x, y, k).y


def _in_x(gap: Gap) -> tuple[Tensor, Tensor, Tensor]:
    return gap.upper.x, gap.lower.x, gap.value.x
