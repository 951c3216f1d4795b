"""MEHA: single-loop steps on a penalized Moreau envelope, for lower levels that are nonconvex or have kinks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.moreau import SAFE, Curvatures, check_runaway
from bilevel.optimizers._base import at
from bilevel.optimizers.schedules import Power
from bilevel.oracles import Oracles
from bilevel.penalty import Schedule, check_schedule, moved
from bilevel.problem import Problem
from bilevel.regularizers import L2, ElasticNet
from bilevel.sets import Box, NonNegative
from bilevel.smoothness import check_lr
from bilevel.solvers._base import Metrics, Solver, check_positive
from bilevel.status import InvalidProblem


class MEHAState(NamedTuple):
    """Where MEHA stands.

    Args:
        x: upper variables `[p]`.
        y: lower variables `[d]` or `[m, d]`.
        step: steps made.
        theta: the minimizer that the envelope at (x, y) is about, shaped like y.
        curvature: what the measured steps rest on.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    theta: Tensor
    curvature: Curvatures
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class MEHA(Solver[MEHAState]):
    """Descend on f and a penalty on how far g lies above its Moreau envelope; first derivatives only.

        v(x, y) = min_t  φ(x, t) + ‖t - y‖² / 2 γ,     φ = g + r,   r the declared regularizer and the lower set
        min f(x, y)  s.t.  φ(x, y) <= v(x, y)          by steps on  f / c_k + φ - v,   c_k growing:

        θ <- prox_{η r(x, .)}( θ - η [dg/dy(x, θ) + (θ - y) / γ] )
        x <- P_X( x - α [df/dx(x, y) / c_k + dφ/dx(x, y) - dφ/dx(x, θ)] )
        y <- prox_{β r(x, .)}( y - β [df/dy(x, y) / c_k + dg/dy(x, y) - (y - θ) / γ] )

    with the new θ and x in what follows them. g may be nonconvex in y, down to a curvature above `-1 / γ`, and need not
    have a unique minimizer; then y ends at a stationary point of g. For convex g it ends where f is least among the
    minimizers of g.

    Args:
        gamma: γ > 0, in units of 1 / (curvature of g), below 1 / (most negative curvature of g in y). Larger is more
            accurate and, where g is nonconvex, wrong beyond that bound. None: 10 / (largest curvature seen), or half
            the bound where that is less.
        penalty: c_k > 0; a number, or a schedule of the step. The paper's grows with an exponent in (0, 1/2). For three
            digits rather than two start higher and take more steps: `Power(5.0, 0.49)`.
        lr: η > 0, stable below `2 / (curvature of g + 1 / γ)`. None: 0.8 / that curvature with that of f / c_k,
            measured at the start and raised where the run sees more.
        y_lr: β > 0; likewise.
        upper_lr: α > 0, of a step along 1 / c_k times a hypergradient. None: 0.8 / (curvature of g + f / c_k in (x,
            y)), x in its natural unit, measured at the start.
        upper_factor: of `upper_lr`, > 0, measured or not.

    Raises:
        InvalidProblem: an option is out of its range, or a regularizer beside a lower set whose joint prox is unknown
            (known: L2 or ElasticNet with Box or NonNegative).

    Cost:
        Per step: 4 lower gradients, 2 upper ones, 2 proxes; no HVP. Memory: 2 copies of y. At the start 80 gradients
        (fewer in less than 8 dimensions).

    Notes:
        With mini-batches the noise of y and θ is common and x is unbiased, but keeps moving, by an amount that does not
        shrink with the steps: average the last x.
        x* is approached from below: `f(x_k, y_k) <= f*` up to rounding, with an error of about 1 / c_k.
        `stationarity` is `c_k ‖(Δx / α, Δy / β, Δθ / η)‖`, an estimate of the paper's residual
        `dist(0, d(f + c_k (φ - v)) + N)` that also sees how far θ is from its own minimum.
        Where f depends on y alone, x moves only through `φ(x, y) - φ(x, θ)`, which is small for small γ.

    References:
        Liu, Liu, Yao, Zeng, Zhang, "Moreau envelope for nonconvex bi-level optimization: a single-loop and Hessian-free
        solution strategy", ICML 2024, arXiv 2405.09927 (Algorithm 1).

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.scalar()
        >>> solution = bilevel.solve(task.problem, MEHA(), task.x0, task.y0, steps=1000)
        >>> task.x_error(solution.x) < 1e-2
        True
    """

    needs_hvp: ClassVar[bool] = False
    handles_lower_set: ClassVar[bool] = True
    handles_nonsmooth: ClassVar[bool] = True
    contract_steps: ClassVar[int] = 1000

    gamma: float | None = None
    penalty: Schedule = field(default_factory=lambda: Power(1.0, 0.49))
    lr: float | None = None
    y_lr: float | None = None
    upper_lr: float | None = None
    upper_factor: float = 1.0

    def __post_init__(self) -> None:
        check_positive(
            gamma=self.gamma, lr=self.lr, y_lr=self.y_lr, upper_lr=self.upper_lr, upper_factor=self.upper_factor,
        )  # fmt: skip
        check_schedule("penalty", self.penalty)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> MEHAState:
        """Return the state before the first step, with θ = y; measures curvatures."""
        self.refuse(oracles.problem)
        _check_prox(oracles.problem)
        curvature = Curvatures.measure(oracles, x, y, declared=False, scaled=self.upper_lr is None)
        gamma = self._gamma(curvature)
        if not float(gamma * curvature.concave) < 1:
            raise InvalidProblem(
                f"gamma={float(gamma):.3g} must be below {1 / float(curvature.concave):.3g}: g has a curvature of "
                f"{-float(curvature.concave):.3g} in y at the start, and its envelope is not smooth beyond."
            )
        check_lr("lr", self.lr, curvature.lower + 1 / gamma)
        check_lr("y_lr", self.y_lr, curvature.lower + curvature.upper / at(self.penalty, None, 0))
        return MEHAState(x, y, 0, y, curvature, None)

    def step(self, oracles: Oracles, state: MEHAState) -> MEHAState:
        """Return the state after one step of θ, x and y each, in this order."""
        x, y, k, gamma = state.x, state.y, state.step, self._gamma(state.curvature)
        penalty = at(self.penalty, None, k)
        lr, y_lr, upper_lr = self._rates(state, penalty)

        at_old = oracles.lower_gradient(x, state.theta, k, declared=False)[1]
        theta = _prox(oracles, x, moved(torch.lerp(state.theta, y, lr / gamma), at_old, -lr), lr)

        upper, lower = oracles.upper_gradient(x, y, k), oracles.lower_gradients(x, y, k, declared=False)
        envelope, declared = oracles.lower_gradients(x, theta, k, declared=False), oracles.declared(x)
        in_x = moved(lower.x - envelope.x, upper.x, 1 / penalty)
        if oracles.problem.regularizer is not None:
            in_x = in_x + declared.gradient_x(y) - declared.gradient_x(theta)
        x_next = oracles.project_x(moved(x, in_x, -upper_lr))

        in_y = oracles.lower_gradient(x_next, y, k, declared=False)[1]
        in_y = moved(in_y, oracles.upper_gradient(x_next, y, k).y, 1 / penalty)
        y_next = _prox(oracles, x_next, moved(torch.lerp(y, theta, -y_lr / gamma), in_y, -y_lr), y_lr)

        residuals = (x - x_next).norm() / upper_lr, (y - y_next).norm() / y_lr, (state.theta - theta).norm() / lr
        metrics = Metrics.unsolved(
            upper_value=upper.value,
            lower_value=lower.value + declared.value(y),
            lower_gradient=_proximal_gradient(oracles, x, y, lower.y, lr),
            residuals=[penalty * residual for residual in residuals],
        )
        curvature = state.curvature.followed(lower, envelope, y - theta)
        return MEHAState(x_next, y_next, k + 1, theta, curvature, metrics)

    def inspect(self, oracles: Oracles, state: MEHAState) -> None:
        """Raise Diverged where the iterates run away."""
        check_runaway(
            state.curvature.size, state.step, "lower lr, y_lr and upper_lr (None measures safe ones).",
            x=state.x, y=state.y, theta=state.theta,
        )  # fmt: skip

    def backtracked(self, factor: float) -> MEHA:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper_factor=factor * self.upper_factor)

    def _gamma(self, curvature: Curvatures) -> Tensor:
        return curvature.gamma() if self.gamma is None else torch.full_like(curvature.lower, self.gamma)

    def _rates(self, state: MEHAState, penalty: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        curvature, upper = state.curvature, state.curvature.upper / penalty
        measured = SAFE / (curvature.lower + 1 / self._gamma(curvature) + upper)
        lr = measured if self.lr is None else torch.full_like(measured, self.lr)
        y_lr = measured if self.y_lr is None else torch.full_like(measured, self.y_lr)
        joint = curvature.unit.square() * SAFE / (curvature.joint + upper)
        upper_lr = joint if self.upper_lr is None else torch.full_like(joint, self.upper_lr)
        return lr, y_lr, self.upper_factor * upper_lr


def _prox(oracles: Oracles, x: Tensor, v: Tensor, step: Tensor) -> Tensor:
    """Return the prox of `step` times the regularizer and the indicator of the lower set."""
    return oracles.project_y(oracles.declared(x).prox(v, step))


def _proximal_gradient(oracles: Oracles, x: Tensor, y: Tensor, gradient: Tensor, lr: Tensor) -> Tensor:
    """Return `(y - prox(y - lr gradient)) / lr`; the gradient itself where the prox is the identity."""
    if oracles.problem.regularizer is None and oracles.problem.lower_set is None:
        return gradient
    return (y - _prox(oracles, x, moved(y, gradient, -lr), lr)) / lr


def _check_prox(problem: Problem) -> None:
    """Refuse a regularizer and a set together, unless clamping the prox is their joint prox: one entry at a time."""
    regularizer, lower_set = problem.regularizer, problem.lower_set
    separable = isinstance(regularizer, L2 | ElasticNet) and isinstance(lower_set, Box | NonNegative)
    if regularizer is not None and lower_set is not None and not separable:
        raise InvalidProblem(
            f"MEHA knows no joint prox of {type(regularizer).__name__} and {type(lower_set).__name__}; use L2 or "
            "ElasticNet with Box or NonNegative, or write a smooth regularizer into the lower objective."
        )
