"""G-PBGD: gradient descent on f plus a penalty on the squared gradient of the lower level."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.joint import joint_smoothness
from bilevel.optimizers._base import at
from bilevel.optimizers.schedules import Power
from bilevel.oracles import Oracles
from bilevel.penalty import Schedule, check_schedule, moved
from bilevel.smoothness import check_curved, check_lr
from bilevel.solvers._base import Metrics, Solver, check_nonnegative, check_positive, projected_gradient

SAFE = 1.2
"""Steps in units of 1 / curvature; 2 is the limit."""


class GPBGDState(NamedTuple):
    """Where G-PBGD stands.

    Args:
        x: upper variables `[p]`.
        y: lower variables `[d]` or `[m, d]`.
        step: steps made, which is also the index of the next batches.
        curvatures: largest of f and of `‖dg/dy‖^2 / 2`, both in (x, y).
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    curvatures: tuple[Tensor, Tensor]
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class GPBGD(Solver[GPBGDState]):
    """Descend on `f(x, y) + penalty ‖dg/dy‖^2 / 2` in x and y together; its gradient is one HVP and one cross product.

    It needs a Hessian of g in y that is regular, everywhere: where it is singular the penalty can be stationary though
    dg/dy is not 0, and the method stops there. `lower_gradient_norm` of the history tells: it must fall to the order
    1 / penalty. The answer is biased by O(1 / penalty).

    Args:
        penalty: γ > 0; a number, or a schedule of the step (the authors' code lets it grow linearly). It divides the
            steps, so that one which grows gets there sooner.
        lr: > 0; x and y take steps of `lr / (1 + penalty)`. None takes 1.2 / (curvature of the penalized function),
            measured.
        upper_lr: > 0, for x alone; None takes `lr`.
        upper_factor: > 0, multiplies x's step, measured or not.
        measure_every: measure curvatures again after so many steps; 0 never.

    Cost:
        Per step: one gradient of f, one of g, one HVP and one cross product. A measurement: 32 gradients, 16 HVPs and
        16 cross products.

    Notes:
        Metrics: `stationarity` is the norm of the projected gradient of the penalized function in (x, y).

    References:
        Shen, Chen, "On penalty-based bilevel gradient descent method", ICML 2023, arXiv 2302.05185 (G-PBGD).

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.scalar()
        >>> solution = bilevel.solve(task.problem, GPBGD(penalty=10.0), task.x0, task.y0, steps=1000)
        >>> abs(float(solution.x) - float(task.problem.reference)) < 1e-2
        True
    """

    needs_hvp: ClassVar[bool] = True
    contract_steps: ClassVar[int] = 4000

    penalty: Schedule = field(default_factory=lambda: Power(1.0, 0.4, limit=30.0))
    lr: float | None = None
    upper_lr: float | None = None
    upper_factor: float = 1.0
    measure_every: int = 1000

    def __post_init__(self) -> None:
        check_schedule("penalty", self.penalty)
        check_positive(lr=self.lr, upper_lr=self.upper_lr, upper_factor=self.upper_factor)
        check_nonnegative(measure_every=self.measure_every)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> GPBGDState:
        """Return the state before the first step; measures curvatures.

        Raises:
            InvalidProblem: the problem has a part that this solver cannot treat, g has no second derivatives, or `lr`
                is too large for it.
        """
        self.refuse(oracles.problem)
        of_f, of_penalty = curvatures = _curvatures(oracles, x, y, 0)
        check_curved(of_penalty, torch.finfo(y.dtype).eps)
        check_lr("lr", self.lr, torch.maximum(of_f, of_penalty))
        return GPBGDState(x, y, 0, curvatures, None)

    def step(self, oracles: Oracles, state: GPBGDState) -> GPBGDState:
        """Return the state after one joint step of x and y."""
        x, y, k = state.x, state.y, state.step
        of_f, of_penalty = curvatures = state.curvatures
        if self.measure_every and k and k % self.measure_every == 0:
            of_f, of_penalty = curvatures = _curvatures(oracles, x, y, k)
        penalty = at(self.penalty, None, k)
        s_y = SAFE / (of_f + penalty * of_penalty) if self.lr is None else self.lr / (1 + penalty)
        s_x = s_y if self.upper_lr is None else self.upper_lr / (1 + penalty)

        f, g = oracles.upper_gradient(x, y, k), oracles.linearize_lower(x, y, k)
        d_x = moved(f.x, g.cross(g.gradient), penalty)
        d_y = moved(f.y, g.hvp(g.gradient), penalty)
        return GPBGDState(
            x=oracles.project_x(moved(x, d_x, -self.upper_factor * s_x)),
            y=moved(y, d_y, -s_y),
            step=k + 1,
            curvatures=curvatures,
            metrics=Metrics.unsolved(f.value, g.value, g.gradient, (projected_gradient(oracles, x, d_x), d_y)),
        )

    def backtracked(self, factor: float) -> GPBGD:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper_factor=factor * self.upper_factor)


def _curvatures(oracles: Oracles, x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Measure those of f and of the penalty in (x, y), by differences of gradients on the batches of step k."""

    def penalty(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        g = oracles.linearize_lower(u, v, k)
        return g.cross(g.gradient), g.hvp(g.gradient)

    of_f = joint_smoothness(lambda u, v: oracles.upper_gradient(u, v, k)[1:], x, y)
    return of_f, joint_smoothness(penalty, x, y).clamp_min(torch.finfo(y.dtype).eps)
