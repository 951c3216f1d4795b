"""V-PBGD: gradient descent on f plus a penalty on the value gap of the lower level."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.joint import joint_smoothness, natural_unit
from bilevel.optimizers._base import at
from bilevel.oracles import Oracles
from bilevel.penalty import Gap, Schedule, check_schedule, moved
from bilevel.smoothness import check_curved, check_lr, smoothness
from bilevel.solvers._base import (
    Metrics,
    Solver,
    check_lower_steps,
    check_nonnegative,
    check_positive,
    projected_gradient,
    projected_lower_gradient,
)

SAFE = 0.8
"""Steps of z in units of 1 / curvature; 2 is the limit."""
JOINT = 1.2
"""Steps of x and y, likewise."""
RESPONSE = 10
"""Steps of z while the curvature of the gap is measured: z follows x, and that adds curvature in x."""
COUPLED = 0.5**0.5
"""Curvature between x and y over that in y, in the unit of x: the joint one, C + B^2 / C, is then 3/2 of that in y."""


class Curvatures(NamedTuple):
    """Largest curvatures where they were measured: of f and of the gap in (x / unit, y), of g in y; and that unit."""

    upper: Tensor
    gap: Tensor
    lower: Tensor
    unit: Tensor


class VPBGDState(NamedTuple):
    """Where V-PBGD stands.

    Args:
        x: upper variables `[p]`.
        y: lower variables of the penalized problem, `[d]` or `[m, d]`.
        z: lower variables that minimize g alone, shaped like y.
        step: steps made, which is also the index of the next upper batch.
        curvatures: for the step lengths.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    step: int
    curvatures: Curvatures
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class VPBGD(Solver[VPBGDState]):
    """Descend on `f(x, y) + penalty (g(x, y) - min_z g(x, z))` in x and y together, z following by steps on g.

    It needs a lower objective without local minima that trap z: convex, or with a Polyak-Lojasiewicz inequality; it
    need not be strongly convex. Lower sets are projected on. The answer is biased by O(1 / penalty), and the number of
    steps grows with the penalty, because x and y share a step of the order 1 / penalty.

    Args:
        penalty: γ > 0; a number, or a schedule of the step (the authors' code lets it grow linearly).
        lower_steps: >= 1, steps on z before each step of x and y.
        lr: > 0; x and y take steps of `lr / (1 + penalty)`. None takes 1.2 / (curvature of the penalized function) in
            y, and that times the square of x's natural unit in x, both measured.
        upper_lr: > 0, for x alone; None takes `lr`.
        lower_lr: > 0, of z; None takes 0.8 / (curvature of g), measured.
        upper_factor: > 0, multiplies x's step, measured or not.
        measure_every: measure curvatures again after so many steps; 0 never.

    Cost:
        Per step: `lower_steps` + 2 gradients of g, one of f. A measurement: 240 gradients.

    Notes:
        Metrics: `stationarity` is the norm of the projected gradients of the penalized function in (x, y) and of g at
        z; else g is seen at y, where its gradient is of the order 1 / penalty at best. The lower batch of a step's
        last step on z also serves the gap, at y and at z.

    References:
        Shen, Chen, "On penalty-based bilevel gradient descent method", ICML 2023, arXiv 2302.05185 (V-PBGD).

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.scalar()
        >>> solution = bilevel.solve(task.problem, VPBGD(penalty=10.0), task.x0, task.y0, steps=1000)
        >>> abs(float(solution.x) - float(task.problem.reference)) < 1e-2
        True
    """

    needs_hvp: ClassVar[bool] = False
    handles_lower_set: ClassVar[bool] = True
    contract_steps: ClassVar[int] = 3000

    penalty: Schedule = 20.0
    lower_steps: int = 1
    lr: float | None = None
    upper_lr: float | None = None
    lower_lr: float | None = None
    upper_factor: float = 1.0
    measure_every: int = 1000

    def __post_init__(self) -> None:
        check_schedule("penalty", self.penalty)
        check_lower_steps(self.lower_steps)
        check_positive(lr=self.lr, upper_lr=self.upper_lr, lower_lr=self.lower_lr, upper_factor=self.upper_factor)
        check_nonnegative(measure_every=self.measure_every)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> VPBGDState:
        """Return the state before the first step, with z = y; measures curvatures.

        Raises:
            InvalidProblem: the problem has a part that this solver cannot treat, g has no curvature in y, or a step
                length is too large for it.
        """
        self.refuse(oracles.problem)
        y = oracles.project_y(y)
        curvatures = self._curvatures(oracles, x, y, y, 0)
        check_curved(curvatures.lower, torch.finfo(y.dtype).eps)
        check_lr("lr", self.lr, torch.maximum(curvatures.upper, curvatures.gap))
        check_lr("lower_lr", self.lower_lr, curvatures.lower)
        return VPBGDState(x, y, y, 0, curvatures, None)

    def step(self, oracles: Oracles, state: VPBGDState) -> VPBGDState:
        """Return the state after `lower_steps` steps of z and one joint step of x and y."""
        x, y, z, k = state.x, state.y, state.z, state.step
        first, last = k * self.lower_steps, (k + 1) * self.lower_steps - 1
        curvatures = state.curvatures
        if self.measure_every and k and k % self.measure_every == 0:
            curvatures = self._curvatures(oracles, x, y, z, k)
        penalty = at(self.penalty, None, k)
        safe = JOINT / (curvatures.upper + penalty * curvatures.gap)
        s_y = safe if self.lr is None else self.lr / (1 + penalty)
        s_x = s_y * curvatures.unit.square() if self.upper_lr is None else self.upper_lr / (1 + penalty)
        s_z = SAFE / curvatures.lower if self.lower_lr is None else self.lower_lr

        for j in range(first, last + 1):
            z = oracles.project_y(moved(z, oracles.lower_gradient(x, z, j)[1], -s_z))
        gap = Gap.at(oracles, x, y, z, k, last, last)
        d_x = gap.direction(penalty)
        d_y = moved(gap.upper.y, gap.lower.y, penalty)

        residuals = (
            projected_gradient(oracles, x, d_x),
            projected_lower_gradient(oracles, y, d_y),
            projected_lower_gradient(oracles, z, gap.value.y),
        )
        return VPBGDState(
            x=oracles.project_x(moved(x, d_x, -self.upper_factor * s_x)),
            y=oracles.project_y(moved(y, d_y, -s_y)),
            z=z,
            step=k + 1,
            curvatures=curvatures,
            metrics=Metrics.unsolved(gap.upper.value, gap.lower.value, gap.lower.y, residuals),
        )

    def backtracked(self, factor: float) -> VPBGD:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper_factor=factor * self.upper_factor)

    def _curvatures(self, oracles: Oracles, x: Tensor, y: Tensor, z: Tensor, k: int) -> Curvatures:
        """Measure, by differences of gradients on the batches of step k."""
        last, tiny = (k + 1) * self.lower_steps - 1, torch.finfo(y.dtype).eps
        lower = smoothness(lambda v: oracles.lower_gradient(x, v, last)[1], z).clamp_min(tiny)
        penalty = at(self.penalty, None, k)

        def both(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            f, g = oracles.upper_gradient(u, v, k), oracles.lower_gradients(u, v, last)
            return g.x + f.x / penalty, g.y + f.y / penalty

        unit = natural_unit(both, x, y, coupled=COUPLED) if self.lr is None else torch.ones_like(lower)

        def gap(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            follower = z
            for _ in range(RESPONSE):
                follower = oracles.project_y(follower - SAFE / lower * oracles.lower_gradient(u, follower, last)[1])
            at_y = oracles.lower_gradients(u, v, last)
            return at_y.x - oracles.lower_gradients(u, follower, last).x, at_y.y

        upper = joint_smoothness(lambda u, v: oracles.upper_gradient(u, v, k)[1:], x, y, unit=unit)
        return Curvatures(upper, joint_smoothness(gap, x, y, steps=6, unit=unit).clamp_min(tiny), lower, unit)
