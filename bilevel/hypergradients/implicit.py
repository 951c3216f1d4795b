"""Hypergradients by the implicit function theorem."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.hypergradients._base import Certificate, Estimate, Estimator
from bilevel.hypergradients._levels import Curved, Levels
from bilevel.linear import CG, LinearSolution, LinearSolver, Operator
from bilevel.oracles import Counts, Oracles, UpperGradient
from bilevel.status import InvalidProblem, LinearSolveFailed, NonFinite, Status

TINY = 1e-30
MARGIN = 1.25
REMEASURE = 10
FAILURES = {Status.NEGATIVE_CURVATURE, Status.SINGULAR, Status.DIVERGED, Status.BREAKDOWN}


class ImplicitState(NamedTuple):
    """What one estimate leaves to the next.

    Args:
        w: the last solution of the linear system, None before the first.
        shift: by how much the linear system moves for each unit of lower gradient, from the last certificate; None
            before the first.
        largest: the largest curvature, for linear solvers whose step length depends on it; measured again every
            `REMEASURE` estimates.
        age: estimates made.
    """

    w: Tensor | None
    shift: Tensor | None
    largest: Tensor | None
    age: int


@dataclass(frozen=True)
class Implicit(Estimator):
    """Estimate `dF/dx = df/dx - J^T w` with `H w = df/dy`, where `H = d2g/dy2` and `J = d2g/dxdy` at y near y*(x).

    It holds where y*(x) is an interior minimum at which H is positive definite.

    Args:
        linear: solver of `H w = df/dy`.
        warm_start: start the linear solver from the last w. Cold starts of truncated solves converge to a wrong x.
        polish: take the hypergradient at `y - delta` with `H delta = dg/dy`: one Newton step, which squares the error
            of the lower solve for one more linear solve and two gradients.
        balance: stop the linear solve at the residual that the inaccuracy of y causes in it anyway, by the constant
            of the last certificate; beyond that, products are wasted.
        truncate: use the last iterate of a linear solve that met negative curvature or its step limit with a residual
            above 0.5, and only flag it in the certificate, instead of raising LinearSolveFailed.
        strong_convexity: mu > 0 with `H >= mu I` everywhere, if the user certifies one (the L2 weight of a convex
            loss); the certificate then carries bounds.
        check: solver of the two correction systems behind `error_estimate`, and of the Newton step of `polish`.

    Cost:
        One upper gradient, one graph of the lower gradient, the linear solver's products, one cross product. Memory:
        the graph, and a few vectors of length d. A certificate adds two correction solves and two gradients.

    References:
        Bengio, "Gradient-based optimization of hyperparameters", Neural Computation 2000. Pedregosa, "Hyperparameter
        optimization with approximate gradient", ICML 2016.
    """

    linear: LinearSolver = field(default_factory=CG)
    warm_start: bool = True
    polish: bool = False
    balance: bool = False
    truncate: bool = False
    strong_convexity: float | None = None
    check: LinearSolver = field(default_factory=lambda: CG(max_steps=100))

    def __post_init__(self) -> None:
        if self.strong_convexity is not None and not self.strong_convexity > 0:
            raise InvalidProblem(f"Implicit(strong_convexity=...) must be > 0, got {self.strong_convexity}.")

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> ImplicitState:
        """Return the state without a warm start.

        Raises:
            InvalidProblem: the lower level is constrained or has kinks, where the implicit function theorem says less.
        """
        self.refuse_beyond_smooth(
            oracles.problem,
            "it holds at unconstrained minima of smooth lower objectives, and would answer wrongly elsewhere. Use "
            "ActiveSet (kinks, boxes) or ImplicitKKT (constraints), or state a penalty or a smooth regularizer (L2).",
        )
        return ImplicitState(None, None, None, 0)

    def estimate(
        self,
        oracles: Levels,
        x: Tensor,
        y: Tensor,
        state: ImplicitState,
        *,
        upper_step: int = 0,
        lower_step: int = 0,
        step_diagonal: Callable[[], Tensor] | None = None,
        certify: bool = False,
    ) -> tuple[Estimate, ImplicitState]:
        """Return the hypergradient at `(x, y)`; see `Estimator.estimate`.

        Raises:
            LinearSolveFailed: the linear solve failed, unless `truncate`.
            NonFinite: an objective or a derivative is not finite.
        """
        before = oracles.counts
        if self.polish:
            lower = oracles.linearize_lower(x, y, lower_step)
            y = y - self.check.solve(_operator(lower), lower.gradient).value
        known = state.largest if state.age % REMEASURE else None
        point = _Point.at(oracles, x, y, upper_step, lower_step, step_diagonal=step_diagonal, largest=known)
        start = state.w if self.warm_start else None
        solution = self.linear.solve(point.operator, point.upper.y, start, tol=self._balanced_tol(point, state))
        self._judge(solution, point, upper_step)
        gradient = point.hypergradient(solution.value)
        error, shift = self._estimate_error(oracles, point, solution, gradient) if certify else (None, state.shift)
        certificate = self._certificate(point, solution, error, oracles.counts - before)
        estimate = Estimate(gradient, point.upper.value, point.lower.value, point.y, certificate)
        largest = solution.curvature[1] if known is None and solution.curvature is not None else known
        return estimate, ImplicitState(solution.value, shift, largest, state.age + 1)

    def _balanced_tol(self, point: _Point, state: ImplicitState) -> float | None:
        if not self.balance or state.shift is None:
            return None
        tol = float(state.shift * point.lower.gradient.norm() / point.upper.y.norm().clamp_min(TINY))
        return min(max(tol, 1e-12), 0.1)

    def _judge(self, solution: LinearSolution, point: _Point, step: int) -> None:
        if solution.status is Status.NON_FINITE:
            raise NonFinite(
                f"the linear system of the hypergradient is not finite at upper step {step}: the upper objective is "
                f"{float(point.upper.value):.3g}, the lower {float(point.lower.value):.3g}; shorten the steps."
            )
        residual = float(solution.residual.max())
        hopeless = solution.status is Status.STEP_LIMIT and residual > 0.5
        if solution.status not in FAILURES and not hopeless:
            return
        if self.truncate and bool(solution.value.isfinite().all()):
            return
        curvature = ""
        if solution.curvature is not None:
            low, high = (float(c) for c in solution.curvature)
            curvature = f", curvature between {low:.3g} and {high:.3g}"
        raise LinearSolveFailed(
            f"the linear system of the hypergradient failed at upper step {step} after {solution.steps} iterations: "
            f"{solution.status.value} (relative residual {residual:.2g}{curvature}). Implicit(truncate=True) uses the "
            "last iterate and flags it.",
            status=solution.status,
        )

    def _estimate_error(
        self, oracles: Levels, point: _Point, solution: LinearSolution, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compare with the hypergradient after one Newton step in y and one correction of w.

        A residual of rho leaves a relative error of up to rho times the condition number, so that is what the two
        correction solves aim at; an error of a tenth of a correction is within the margin.
        """
        tol = self._aim(solution)
        delta = self.check.solve(point.operator, point.lower.gradient, tol=tol)
        near = _Point.at(oracles, point.x, point.y - delta.value, point.upper_step, point.lower_step)
        residual = point.upper.y - point.lower.hvp(solution.value)
        moved_residual = near.upper.y - near.lower.hvp(solution.value)
        correction = self.check.solve(near.operator, moved_residual, tol=tol)
        better = near.hypergradient(solution.value + correction.value)
        undone = torch.maximum(delta.residual.max(), correction.residual.max()) / tol / 10
        error = MARGIN * (better - gradient).norm() / (1 - undone.clamp(0.0, 0.9))
        # A number of norm h carries a rounding error of a few eps h, whatever the corrections say.
        error = error + 10 * torch.finfo(gradient.dtype).eps * gradient.norm()
        if delta.status in FAILURES or correction.status in FAILURES or not bool(error.isfinite()):
            error = torch.full_like(error, math.inf)
        # The lower solve's inaccuracy shifts the linear system by this much for each unit of lower gradient.
        shift = (moved_residual - residual).norm() / point.lower.gradient.norm().clamp_min(TINY)
        return error, shift

    def _aim(self, solution: LinearSolution) -> float:
        if solution.curvature is None:
            return 1e-4
        low, high = (abs(float(c)) for c in solution.curvature)
        return min(max(0.1 * low / max(high, TINY), 1e-8), 1e-2)

    def _certificate(
        self, point: _Point, solution: LinearSolution, error: Tensor | None, counts: Counts
    ) -> Certificate:
        mu, gradient_norm = self.strong_convexity, point.lower.gradient.norm()
        residual = solution.residual * point.upper.y.norm(dim=-1)
        return Certificate(
            status=solution.status,
            residual=solution.residual.max(),
            lower_gradient_norm=gradient_norm,
            curvature=solution.curvature,
            error_estimate=error,
            lower_distance_bound=None if mu is None else gradient_norm / mu,
            linear_distance_bound=None if mu is None else residual.norm() / mu,
            counts=counts,
        )


@dataclass(frozen=True)
class _Point:
    """Both levels differentiated at one (x, y)."""

    x: Tensor
    y: Tensor
    upper_step: int
    lower_step: int
    upper: UpperGradient
    lower: Curved
    operator: Operator

    @classmethod
    def at(cls, oracles: Levels, x: Tensor, y: Tensor, upper_step: int, lower_step: int, **known: Any) -> _Point:
        upper = oracles.upper_gradient(x, y, upper_step)
        lower = oracles.linearize_lower(x, y, lower_step)
        return cls(x, y, upper_step, lower_step, upper, lower, _operator(lower, **known))

    def hypergradient(self, w: Tensor) -> Tensor:
        return self.upper.x - self.lower.cross(w)


def _operator(lower: Curved, **known: Any) -> Operator:
    return Operator(
        apply=lower.hvp, apply_many=lower.hvps, diagonal=lower.diagonal, gradients=lower.sample_gradients, **known
    )
