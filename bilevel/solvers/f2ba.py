"""F2BA: both lower problems solved in an inner loop, at one fixed penalty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, final

from torch import Tensor

from bilevel.optimizers import Adam, Optimizer
from bilevel.optimizers.schedules import Power
from bilevel.oracles import Oracles
from bilevel.penalty import Curvature, Gap, check_schedule, moved
from bilevel.solvers._base import Metrics, Solver, check_lower_steps, check_upper, moved_x, projected_gradient
from bilevel.status import InvalidProblem


class F2BAState(NamedTuple):
    """Where the method stands.

    Args:
        x: upper variables `[p]`.
        y: the solution of the lower problem (the paper's z), `[d]` or `[m, d]`.
        relaxed: the solution of the lower problem with f / penalty added (the paper's y), likewise.
        step: upper steps made.
        upper: state of the upper optimizer.
        curvature: largest curvatures in y.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    relaxed: Tensor
    step: int
    upper: Any
    curvature: Curvature
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class F2BA(Solver[F2BAState]):
    """Descend along the derivative of `min_y f(x, y) + λ (g(x, y) - min g(x, .))`, λ fixed by the accuracy wanted.

        z <- K gradient steps on g(x, .) from the last z
        y <- K gradient steps on g(x, .) + f(x, .) / λ from the last y
        x <- P_X( x - τ h ),   h = df/dx(x, y) + λ [dg/dx(x, y) - dg/dx(x, z)]

    Where g(x, .) is strongly convex with constant μ, h is within O(1 / (λ μ^3)) of the hypergradient once K is a few
    times its condition number. Both loops start warm: restarted from a common point they would be biased.

    Args:
        upper: optimizer of x; `SGD(τ)` is the paper's, with τ about 1 / (curvature of F).
        penalty: λ > 0; in float32 stay below about 1e3.
        lower_lr: > 0, below `2 / (curvature of g + f / λ)`; that curvature is measured at the start and followed, and
            longer steps are cut. None: 0.8 / that curvature.
        lower_steps: K >= 1.

    Raises:
        InvalidProblem: an option is out of its range; at `init`, also a `lower_lr` that is not stable.

    Cost:
        Per step: K + 1 upper and 2 (K + 1) lower gradients, 2 lower gradients for the curvature, 1 upper value, 0 HVPs.
        At the start: 16 upper and 17 lower gradients. Memory: four vectors like y.

    Notes:
        The iterates are those of `F2SA` with a constant penalty and T = K; the paper shows that this choice, and not
        the growing penalty, has nearly the best possible rate without noise. Metrics as of `F2SA`.

    References:
        Chen, Ma and Zhang (2025), "Near-optimal nonconvex-strongly-convex bilevel optimization with fully first-order
        oracles", JMLR, arXiv 2306.14853.

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.scalar()
        >>> solution = bilevel.solve(task.problem, F2BA(), task.x0, task.y0, steps=200)
        >>> task.x_error(solution.x) < 1e-2, solution.counts.hvps
        (True, 0)
    """

    needs_hvp: ClassVar[bool] = False

    upper: Optimizer[Any] = field(default_factory=lambda: Adam(Power(0.1, -0.5, offset=30.0)))
    penalty: float = 300.0
    lower_lr: float | None = None
    lower_steps: int = 20

    def __post_init__(self) -> None:
        check_upper(self.upper)
        check_lower_steps(self.lower_steps)
        for name in ("penalty", "lower_lr"):
            if callable(getattr(self, name)):
                raise InvalidProblem(f"F2BA's {name} is one number; F2SA takes schedules.")
        check_schedule("penalty", self.penalty)
        check_schedule("lower_lr", self.lower_lr, optional=True)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> F2BAState:
        """Return the state before the first step; measures curvatures."""
        self.refuse(oracles.problem)
        curvature = Curvature.measure(oracles, x, y)
        curvature.check(self.lower_lr, self.penalty)
        return F2BAState(x, y, y, 0, self.upper.init(x), curvature, None)

    def step(self, oracles: Oracles, state: F2BAState) -> F2BAState:
        """Return the state after both inner loops and one step of x."""
        x, first = state.x, state.step * (self.lower_steps + 1)
        last = first + self.lower_steps
        gradient = oracles.lower_gradient(x, state.y, first)[1]
        curvature = state.curvature.followed(oracles, x, state.y, gradient, first)
        lr = curvature.step(self.penalty, self.lower_lr)

        def in_z(z: Tensor, k: int) -> Tensor:
            return oracles.lower_gradient(x, z, k)[1]

        def in_y(y: Tensor, k: int) -> Tensor:
            return moved(in_z(y, k), oracles.upper_gradient(x, y, k).y, 1 / self.penalty)

        z = _descend(in_z, state.y, lr, first, self.lower_steps)
        y = _descend(in_y, state.relaxed, lr, first, self.lower_steps)
        gap = Gap.at(oracles, x, y, z, last, last, last)
        h = gap.direction(self.penalty)
        x_next, upper = moved_x(oracles, self.upper, x, h, state.upper)
        residuals = projected_gradient(oracles, x, h), *gap.residuals(self.penalty)
        metrics = Metrics.unsolved(oracles.upper_value(x, z, last), gap.value.value, gap.value.y, residuals)
        return F2BAState(x_next, z, y, state.step + 1, upper, curvature, metrics)

    def backtracked(self, factor: float) -> F2BA:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))


def _descend(gradient: Callable[[Tensor, int], Tensor], y: Tensor, lr: Tensor, first: int, steps: int) -> Tensor:
    for k in range(steps):
        y = moved(y, gradient(y, first + k), -lr)
    return y
