"""LV-HBA: single-loop steps on a penalized proximal Lagrangian value function, for coupled lower constraints."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.feasibility import due, inspect_multipliers, warn_at_bound
from bilevel.moreau import FLAT, SAFE, Curvatures, check_runaway
from bilevel.multipliers import Scale, clipped, constraint_terms
from bilevel.optimizers._base import at
from bilevel.optimizers.schedules import Power
from bilevel.oracles import Oracles
from bilevel.penalty import Schedule, check_schedule, moved
from bilevel.smoothness import check_lr
from bilevel.solvers._base import Metrics, Solver, check_positive
from bilevel.status import InvalidProblem

FLATTEST = 1e-6
"""Curvature of g up to which it counts as linear."""
LINEAR = 1e-3
"""What then stands for it in γ."""


class LVHBAState(NamedTuple):
    """Where LV-HBA stands.

    Args:
        x: upper variables `[p]`.
        y: lower variables `[d]` or `[m, d]`.
        step: steps made.
        theta: the lower copy in the saddle point problem of the value function, shaped like y.
        multiplier: its multipliers, of c then of h, in the user's units, `[n]` or `[m, n]`.
        tracker: z, what the multipliers are held close to, shaped like them.
        scale: of the constraints.
        touched: the first step after which a multiplier was at its bound, -1 if none was; 0-dim.
        curvature: what the measured steps rest on.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    theta: Tensor
    multiplier: Tensor
    tracker: Tensor
    scale: Scale
    touched: Tensor
    curvature: Curvatures
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class LVHBA(Solver[LVHBAState]):
    """Descend on f and a penalty on how far g lies above the proximal Lagrangian value function; no second derivatives.

        v(x, y, z) = min_t max_l  g(x, t) + <l, c(x, t)> + ‖t - y‖² / 2 γ - ‖l - z‖² / 2 γ',    t in Y, l >= 0
        min f(x, y)  s.t.  g(x, y) <= v(x, y, z),  (x, y) in C = {c <= 0, h = 0},  z in [0, r]

        θ <- P_Y( θ - η [dg/dy(x, θ) + <λ, dc/dy(x, θ)> + (θ - y) / γ] )
        λ <- [ λ + η (c(x, θ) - (λ - z) / γ') ]_+                                      both at the old θ and λ
        (x, y) <- P_C( (x, y) - α [df / c_k + dg(x, y) - (dg/dx(x, θ) + <λ, dc/dx(x, θ)>, (y - θ) / γ)] )
        z <- P( z + β (λ - z) / γ' )

    with the new θ and λ in the last two lines. Equations h are treated like c, with multipliers of either sign in
    [-r, r]. g and c are convex in y (g need not have a unique minimizer) and smooth. Constraints are scaled so that
    their gradients in y are as long at the start as g is curved; γ', η and β refer to that scale.

    Args:
        gamma: γ > 0, in units of 1 / (curvature of g). With a large one θ and λ nearly rotate, and lr must be tiny.
            None: 1 / (largest curvature seen), ten times that without constraints.
        multiplier_gamma: γ' > 0, on the scale of the multipliers. None: γ.
        penalty: c_k > 0; a number, or a schedule of the step. The paper's grows with an exponent in (0, 1/2).
        bound: r > 0, in the user's units, well above every multiplier: a warning says so when one touches it.
        lr: η > 0, of θ and λ, stable below `2 a / (a² + b²)` for a in [1 / γ, curvature + 1 / γ] and b the length of
            the scaled constraints. None: 0.4 of that.
        upper_lr: α > 0, of a step along 1 / c_k times a hypergradient; None: η / 2, or 0.8 / (curvature
            of g + f / c_k in (x, y)) if that is less.
        tracker_lr: β > 0. None: η / 2.
        upper_factor: of `upper_lr`, > 0, measured or not.

    Raises:
        InvalidProblem: an option is out of its range, breaks the stability at the start, or constraints come without a
            joint set.

    Cost:
        Per step: 3 lower gradients, 1 upper one, 2 gradients of each of c and h, 1 joint projection; no HVP. Memory: 2
        copies of y. At the start 48 gradients, 16 of the constraints together and 2 of each.

    Notes:
        `stationarity` is `c_k` times the moves of (x, y, z, θ, λ), each over its step: an estimate of the paper's
        residual that also sees how far (θ, λ) is from the saddle point.

    References:
        Yao, Yu, Zeng, Zhang, "Constrained bi-level optimization: proximal Lagrangian value function approach and
        Hessian-free algorithm", ICLR 2024, arXiv 2401.16164 (Algorithm 1).

    Example:
        >>> import bilevel, torch
        >>> from bilevel import JointHalfspace
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, b: 0.5 * (x - 2) ** 2 + 0.5 * (y - 1) ** 2, lower=lambda x, y, b: 0.5 * (y - 3) ** 2,
        ...     constraint=lambda x, y, b: (x + y - 2).reshape(1), joint_set=JointHalfspace(1.0, 1.0, offset=2.0))
        >>> solution = bilevel.solve(problem, LVHBA(), torch.tensor(0.0), torch.tensor(0.0), steps=2000)
        >>> round(float(solution.x), 2), round(float(solution.y), 2)
        (1.5, 0.5)
    """

    needs_hvp: ClassVar[bool] = False
    handles_lower_set: ClassVar[bool] = True
    handles_constraints: ClassVar[bool] = True
    contract_steps: ClassVar[int] = 2000

    gamma: float | None = None
    multiplier_gamma: float | None = None
    penalty: Schedule = field(default_factory=lambda: Power(1.0, 0.49))
    bound: float = 1e3
    lr: float | None = None
    upper_lr: float | None = None
    tracker_lr: float | None = None
    upper_factor: float = 1.0

    def __post_init__(self) -> None:
        check_positive(
            gamma=self.gamma,
            multiplier_gamma=self.multiplier_gamma,
            bound=self.bound,
            lr=self.lr,
            upper_lr=self.upper_lr,
            tracker_lr=self.tracker_lr,
            upper_factor=self.upper_factor,
        )
        check_schedule("penalty", self.penalty)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> LVHBAState:
        """Return the state before the first step, with θ = y and multipliers 0; measures curvatures and constraints."""
        self.refuse(oracles.problem)
        problem = oracles.problem
        if problem.joint_set is None and problem.constrained:
            raise InvalidProblem(
                "LVHBA projects on {(x, y): c <= 0, h = 0}: pass Problem(joint_set=...), such as JointHalfspace or "
                "JointPolyhedron. Where that is too hard, BLOCC needs no projection."
            )
        scale = Scale.measure(oracles, x, y)
        curvature = Curvatures.measure(oracles, x, y, declared=True, scaled=False)
        none = torch.zeros_like(scale.norms)
        state = LVHBAState(
            x, y, 0, y, none, none, scale, torch.full((), -1, device=x.device), curvature, None,
        )  # fmt: skip
        self._check_rates(state)
        return state

    def step(self, oracles: Oracles, state: LVHBAState) -> LVHBAState:
        """Return the state after one step of θ and λ, then of x, y and z."""
        x, y, k, q = state.x, state.y, state.step, state.scale.inequalities
        z, norms, penalty = state.tracker, state.scale.norms / _stretch(state), at(self.penalty, None, k)
        gamma, dual_gamma = self._gammas(state)
        lr, upper_lr, tracker_lr = self._rates(state, penalty)

        # Multipliers in the user's units: scaling the constraint by 1 / norm scales its slope in λ by 1 / norm².
        at_old = oracles.lower_gradient(x, state.theta, k)[1]
        coupled = constraint_terms(oracles, x, state.theta, state.multiplier, q, k)
        in_multiplier = coupled.value / norms.square() - (state.multiplier - z) / dual_gamma
        theta = oracles.project_y(moved(torch.lerp(state.theta, y, lr / gamma), at_old + coupled.y, -lr))
        multiplier = clipped(state.multiplier + lr * in_multiplier, self.bound, q)

        upper, lower = oracles.upper_gradient(x, y, k), oracles.lower_gradients(x, y, k)
        value, pull = oracles.lower_gradients(x, theta, k), constraint_terms(oracles, x, theta, multiplier, q, k)
        in_x = upper.x / penalty + lower.x - value.x - pull.x
        in_y, lifted = moved(lower.y, upper.y, 1 / penalty), torch.lerp(y, theta, -upper_lr / gamma)
        x_next, y_next = oracles.project_jointly(moved(x, in_x, -upper_lr), moved(lifted, in_y, -upper_lr))
        tracker = clipped(z + tracker_lr * (multiplier - z) / dual_gamma, self.bound, q)

        residuals = [
            (x - x_next).norm() / upper_lr, (y - y_next).norm() / upper_lr, (norms * (z - tracker)).norm() / tracker_lr,
            (state.theta - theta).norm() / lr, (norms * (state.multiplier - multiplier)).norm() / lr,
        ]  # fmt: skip
        metrics = Metrics.unsolved(
            upper_value=upper.value,
            lower_value=lower.value,
            lower_gradient=value.y + pull.y,
            residuals=[penalty * residual for residual in residuals],
        )
        at_bound = (multiplier.abs() >= self.bound).any() & (state.touched < 0)
        return LVHBAState(
            x_next, y_next, k + 1, theta, multiplier, tracker,
            state.scale.followed(pull.value - coupled.value, theta - state.theta),
            torch.where(at_bound, torch.full_like(state.touched, k + 1), state.touched),
            state.curvature.followed(lower, value, y - theta), metrics,
        )  # fmt: skip

    def inspect(self, oracles: Oracles, state: LVHBAState) -> None:
        """Warn where a multiplier touches its bound; raise where iterates or multipliers run away.

        Multipliers are looked at closely at steps 64, 128, 256... and where one meets its bound.
        """
        advice = (
            "lower gamma, lr and upper_lr, or leave them None: with a large gamma θ and λ rotate, and spiral outward."
        )
        check_runaway(
            state.curvature.size,
            state.step,
            advice,
            x=state.x,
            y=state.y,
            theta=state.theta,
            multiplier=state.multiplier,
        )
        if state.multiplier.numel() and due(state.step, state.touched):
            inspect_multipliers(oracles, state.x, state.y, state.multiplier, state.scale, state.step - 1)
        warn_at_bound(state.touched, state.step, self.bound, "LVHBA(bound=...)")

    def backtracked(self, factor: float) -> LVHBA:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper_factor=factor * self.upper_factor)

    def _gammas(self, state: LVHBAState) -> tuple[Tensor, Tensor]:
        like = state.curvature.lower
        width = FLAT if state.multiplier.shape[-1] == 0 else 1.0
        measured = width / torch.where(like > FLATTEST, like, torch.full_like(like, LINEAR))
        gamma = measured if self.gamma is None else torch.full_like(like, self.gamma)
        return gamma, gamma if self.multiplier_gamma is None else torch.full_like(like, self.multiplier_gamma)

    def _limit(self, state: LVHBAState) -> Tensor:
        """Return the largest stable η: `2 Re m / |m|²` over the eigenvalues m of the saddle point problem."""
        gamma, dual_gamma = self._gammas(state)
        least = torch.minimum(1 / gamma, 1 / dual_gamma)
        bent = state.scale.curvature(state.multiplier)
        most = torch.maximum(state.curvature.lower + bent + 1 / gamma, 1 / dual_gamma)
        square = (_stretch(state) * state.scale.coupling).square()
        return torch.minimum(2 * least / (least.square() + square), 2 * most / (most.square() + square))

    def _rates(self, state: LVHBAState, penalty: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        limit = self._limit(state)
        lr = 0.5 * SAFE * limit if self.lr is None else torch.full_like(limit, self.lr)
        bent = state.scale.curvature(state.multiplier)
        joint = SAFE / (state.curvature.joint + bent + state.curvature.upper / penalty)
        upper_lr = torch.minimum(0.5 * lr, joint) if self.upper_lr is None else torch.full_like(limit, self.upper_lr)
        tracker_lr = 0.5 * lr if self.tracker_lr is None else torch.full_like(limit, self.tracker_lr)
        return lr, self.upper_factor * upper_lr, tracker_lr

    def _check_rates(self, state: LVHBAState) -> None:
        """Refuse steps that are unstable at the start."""
        check_lr("lr", self.lr, 2 / self._limit(state))
        check_lr("upper_lr", self.upper_lr, state.curvature.joint + state.curvature.upper / at(self.penalty, None, 0))
        check_lr("tracker_lr", self.tracker_lr, 1 / self._gammas(state)[1])


def _stretch(state: LVHBAState) -> Tensor:
    """Return the length to which gradients of constraints are scaled: the curvature of g, so that units drop out."""
    lower = state.curvature.lower
    return torch.where(lower > FLATTEST, lower, torch.ones_like(lower))
