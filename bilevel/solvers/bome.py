"""BOME: descend on f, and no faster than the value gap of the lower level lets one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.joint import joint_smoothness
from bilevel.oracles import Oracles
from bilevel.penalty import Gap, moved
from bilevel.smoothness import check_curved, check_lr, smoothness
from bilevel.solvers._base import (
    Metrics,
    Solver,
    check_lower_steps,
    check_nonnegative,
    check_positive,
    projected_gradient,
)

SAFE = 0.8
"""Steps of z, in units of 1 / curvature; 2 is the limit."""


class Curvatures(NamedTuple):
    """Largest curvatures where they were measured: the larger of f's and g's in (x, y), and g's in y."""

    joint: Tensor
    lower: Tensor


class BOMEState(NamedTuple):
    """Where BOME stands.

    Args:
        x: upper variables `[p]`.
        y: lower variables `[d]` or `[m, d]`.
        step: steps made, which is also the index of the next upper batch.
        multiplier: lambda of the last step, 0-dim.
        curvatures: for the step lengths.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    multiplier: Tensor
    curvatures: Curvatures
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class BOME(Solver[BOMEState]):
    """Step along the direction nearest to the gradient of f that still lowers the gap q of the lower level.

        z: T steps on g from y;   q = g(x, y) - g(x, z), z taken as constant;   (x, y) <- (x, y) - xi (df + lambda dq)
        lambda = max(0, eta - <df, dq> / ‖dq‖^2),   or with `value_control`  max(0, (eta q - <df, dq>) / ‖dq‖^2)

    There is no penalty to choose: lambda adapts, and grows as the gap closes. It needs T large enough for z to come
    near a minimizer of g; with small T it answers wrongly, without a sign. With steps that do not fall (`decay=0`) it
    stops at an error that is proportional to them.

    Args:
        lower_steps: T >= 1.
        lr: > 0, xi at the first step; None takes 1 / (curvature of f and g in (x, y)), measured.
        decay: >= 0, xi falls as `k^-decay`.
        eta: > 0, how fast the gap must close.
        value_control: let the gap close in proportion to its value (`eta q`) instead of its squared gradient.
        lower_lr: > 0, of z; None takes 0.8 / (curvature of g), measured.
        upper_factor: > 0, multiplies x's step, measured or not.
        measure_every: measure curvatures again after so many steps; 0 never.

    Cost:
        Per step: T + 2 gradients of g, one of f. A measurement: 48 gradients.

    Notes:
        Metrics: `stationarity` is the root of the authors' measure `‖df + lambda dq‖^2 + q`, x's part projected. It
        falls with the root of xi only, so as k^-1/4 by default; with `value_control` faster, though x does not.
        The lower batch of the last step on z also serves q.

    References:
        Ye, Liu, Wright, Stone, Liu, "BOME! Bilevel optimization made easy: a simple first-order approach",
        NeurIPS 2022, arXiv 2209.08709 (Algorithm 1).

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.scalar()
        >>> solution = bilevel.solve(task.problem, BOME(), task.x0, task.y0, steps=1000)
        >>> abs(float(solution.x) - float(task.problem.reference)) < 1e-2
        True
    """

    needs_hvp: ClassVar[bool] = False
    contract_steps: ClassVar[int] = 1200

    lower_steps: int = 20
    lr: float | None = None
    decay: float = 0.5
    eta: float = 0.5
    value_control: bool = False
    lower_lr: float | None = None
    upper_factor: float = 1.0
    measure_every: int = 500

    def __post_init__(self) -> None:
        check_lower_steps(self.lower_steps)
        check_positive(lr=self.lr, eta=self.eta, lower_lr=self.lower_lr, upper_factor=self.upper_factor)
        check_nonnegative(decay=self.decay, measure_every=self.measure_every)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> BOMEState:
        """Return the state before the first step; measures curvatures.

        Raises:
            InvalidProblem: the problem has a part that this solver cannot treat, g has no curvature in y, or a step
                length is too large for it.
        """
        self.refuse(oracles.problem)
        curvatures = self._curvatures(oracles, x, y, 0)
        check_curved(curvatures.lower, torch.finfo(y.dtype).eps)
        check_lr("lr", self.lr, curvatures.joint)
        check_lr("lower_lr", self.lower_lr, curvatures.lower)
        return BOMEState(x, y, 0, y.new_zeros(()), curvatures, None)

    def step(self, oracles: Oracles, state: BOMEState) -> BOMEState:
        """Return the state after T steps of z and one joint step of x and y."""
        x, y, k = state.x, state.y, state.step
        first, last = k * self.lower_steps, (k + 1) * self.lower_steps - 1
        curvatures = state.curvatures
        if self.measure_every and k and k % self.measure_every == 0:
            curvatures = self._curvatures(oracles, x, y, k)
        xi = (1 / curvatures.joint if self.lr is None else self.lr) * (k + 1) ** -self.decay
        s_z = SAFE / curvatures.lower if self.lower_lr is None else self.lower_lr

        z = y
        for j in range(first, last + 1):
            z = moved(z, oracles.lower_gradient(x, z, j)[1], -s_z)
        f, at_y, at_z = Gap.at(oracles, x, y, z, k, last, last)
        q_x, q_y = at_y.x - at_z.x, at_y.y

        squared = _dot(q_x, q_x) + _dot(q_y, q_y)
        along = _dot(f.x, q_x) + _dot(f.y, q_y)
        q = at_y.value - at_z.value
        wanted = self.eta * (q if self.value_control else squared)
        # Both vanish together at a solution; lambda dq stays bounded, and is 0 where dq is.
        multiplier = ((wanted - along) / squared.clamp_min(torch.finfo(y.dtype).tiny)).clamp_min(0)
        d_x, d_y = moved(f.x, q_x, multiplier), moved(f.y, q_y, multiplier)

        residuals = projected_gradient(oracles, x, d_x), d_y, q.clamp_min(0).sqrt()
        return BOMEState(
            x=oracles.project_x(moved(x, d_x, -self.upper_factor * xi)),
            y=moved(y, d_y, -xi),
            step=k + 1,
            multiplier=multiplier,
            curvatures=curvatures,
            metrics=Metrics.unsolved(f.value, at_y.value, at_y.y, residuals),
        )

    def backtracked(self, factor: float) -> BOME:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper_factor=factor * self.upper_factor)

    def _curvatures(self, oracles: Oracles, x: Tensor, y: Tensor, k: int) -> Curvatures:
        """Measure, by differences of gradients on the batches of step k."""
        last, tiny = (k + 1) * self.lower_steps - 1, torch.finfo(y.dtype).eps
        upper = joint_smoothness(lambda u, v: oracles.upper_gradient(u, v, k)[1:], x, y)
        gap = joint_smoothness(lambda u, v: oracles.lower_gradients(u, v, last)[1:], x, y)
        lower = smoothness(lambda v: oracles.lower_gradient(x, v, last)[1], y)
        return Curvatures(torch.maximum(upper, gap).clamp_min(tiny), lower.clamp_min(tiny))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())
