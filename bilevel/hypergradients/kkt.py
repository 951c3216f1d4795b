"""Implicit hypergradients of constrained lower levels, through the optimality conditions of what is active."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.hypergradients._base import Certificate, Estimate, Estimator
from bilevel.hypergradients._face import Bounds, Face, FaceLinearization, free_distance, held_slack
from bilevel.linear import CG, LinearSolution, LinearSolver, Operator
from bilevel.linearization import Leaves, second_derivatives
from bilevel.multipliers import Rows, constraint_rows, names
from bilevel.oracles import Linearization, Oracles
from bilevel.sets.bounds import bounds
from bilevel.status import InvalidProblem, LinearSolveFailed, Status

SAFETY = 1.25


class KKTPoint(NamedTuple):
    """What the optimality conditions of the lower level say at one point.

    Args:
        multipliers: of `(constraint, equality)`, `[n]`, by least squares; 0 where inactive.
        active: which of them are active; all equalities are.
        multiplier_margin: the least multiplier of an active inequality times the length of its gradient: the force
            that holds it, 0-dim, inf without one.
        slack_margin: the least distance of an inactive inequality, `-c_i / ‖dc_i/dy‖`, 0-dim, inf without one.
        independence: least over largest singular value of the active gradients, each over its length, 0-dim, 1 without
            any: 0 where LICQ fails.
        w: the last solution of the tangential system, `[d]`, None before the first.
    """

    multipliers: Tensor
    active: Tensor
    multiplier_margin: Tensor
    slack_margin: Tensor
    independence: Tensor
    w: Tensor | None


@dataclass(frozen=True)
class ImplicitKKT(Estimator):
    """Estimate the hypergradient where the lower level has constraints c <= 0, equalities h = 0 and perhaps a box.

        K = [[L_yy, A^T], [A, 0]],   K (u, v) = (df/dy, 0),   dF/dx = df/dx - L_xy^T u - (dc/dx)^T v

    with the Lagrangian `L = g + <lam, c> + <nu, h>`, A the gradients of h and of the active c, and multipliers by least
    squares. u is found in the null space of A, where CG also sees whether y is a strict minimum. It holds where the
    active gradients are independent (LICQ, checked), the active multipliers positive, and L_yy positive definite on
    that null space. Entries of y at kinks or bounds are held, as in `ActiveSet`.

    The certificate's margin is the least of all that would have to vanish for the active set to change: forces of
    active constraints and bounds, and distances of inactive ones times the largest curvature seen. `examine` gives the
    parts.

    Args:
        linear: solver of the system on the null space of A.
        check: solver of the correction systems behind `error_estimate`.
        active_tol: >= 0, in units of c: c_i counts as active where `c_i >= -active_tol`.
        warm_start: start the linear solver from the last u.

    Raises:
        InvalidProblem: at `init`: blocks, or a lower set that is no box.

    Cost:
        One upper gradient, two of the lower level, one for each constraint, the linear solver's products with L_yy, one
        more product and a cross product; O(q² d) operations for q active constraints. A certificate repeats all that.

    References:
        Fiacco, "Sensitivity analysis for nonlinear programming using penalty methods", Mathematical Programming 10,
        1976. Amos, Kolter, "OptNet", ICML 2017.

    Example:
        >>> import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, b: (y - 1).square().sum() / 2, lower=lambda x, y, b: (y - 3).square().sum() / 2,
        ...     constraint=lambda x, y, b: x + y - 2)
        >>> x, y = torch.tensor([1.5]), torch.tensor([0.5])
        >>> found = bilevel.hypergradient(problem, x, y, estimator=ImplicitKKT())
        >>> found.gradient, float(found.certificate.margin)  # y* = 2 - x, multiplier 3 - y*
        (tensor([0.5000]), 2.5)
    """

    linear: LinearSolver = field(default_factory=lambda: CG(tol=1e-6, max_steps=100))
    check: LinearSolver = field(default_factory=lambda: CG(tol=1e-9, max_steps=300))
    active_tol: float = 1e-6
    warm_start: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.active_tol < math.inf:
            raise InvalidProblem(f"ImplicitKKT(active_tol=...) must be >= 0, got {self.active_tol}.")

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> KKTPoint:
        """Return the state without a warm start."""
        if oracles.problem.blocks is not None:
            raise InvalidProblem("ImplicitKKT takes no blocks; stack them into one lower problem.")
        bounds(oracles.problem.lower_set, oracles.y_layout, y)
        none, inf = y.new_zeros(0), y.new_tensor(torch.inf)
        return KKTPoint(none, none.bool(), inf, inf, y.new_ones(()), None)

    def examine(self, oracles: Oracles, x: Tensor, y: Tensor, *, lower_step: int = 0) -> KKTPoint:
        """Return multipliers, margins and independence at (x, y).

        Raises:
            LinearSolveFailed: LICQ fails.
        """
        return _Conditions.at(oracles, x, y, lower_step, self.active_tol).point(None)

    def estimate(
        self,
        oracles: Oracles,
        x: Tensor,
        y: Tensor,
        state: KKTPoint,
        *,
        upper_step: int = 0,
        lower_step: int = 0,
        step_diagonal: Callable[[], Tensor] | None = None,
        certify: bool = False,
    ) -> tuple[Estimate, KKTPoint]:
        """Return the hypergradient at `(x, y)`; see `Estimator.estimate`.

        Raises:
            LinearSolveFailed: LICQ fails, or the linear solve did.
            NonFinite: an objective or a derivative is not finite.
        """
        before = oracles.counts
        here = _Conditions.at(oracles, x, y, lower_step, self.active_tol)
        upper = oracles.upper_gradient(x, y, upper_step)
        start = state.w if self.warm_start else None
        solution = here.tangential(
            self.linear, here.face.drop(upper.y), None if start is None else here.face.drop(start)
        )
        gradient = upper.x - here.pulled(solution.value, here.face.drop(upper.y))
        error = self._error(here, gradient, upper_step) if certify else None
        point = here.point(here.face.lift(solution.value))
        margin, lacking, outside = here.margin(point, solution)
        if error is not None:
            error = torch.where(outside, math.inf, error)
        certificate = Certificate(
            status=solution.status,
            residual=solution.residual.max(),
            lower_gradient_norm=lacking,
            curvature=solution.curvature,
            error_estimate=error,
            lower_distance_bound=None,
            linear_distance_bound=None,
            counts=oracles.counts - before,
            margin=margin,
        )
        return Estimate(gradient, upper.value, here.value, y, certificate), point

    def _error(self, here: _Conditions, gradient: Tensor, upper_step: int) -> Tensor:
        """Compare with the hypergradient after one Newton step of the conditions, solved more accurately."""
        near = _Conditions.at(
            here.oracles, here.x, here.newton(self.check), here.step, active=here.active, face=here.face
        )
        upper = near.oracles.upper_gradient(near.x, near.face.y, upper_step)
        b = near.face.drop(upper.y)
        better = upper.x - near.pulled(near.tangential(self.check, b, None).value, b)
        error: Tensor = SAFETY * (better - gradient).norm() + 10 * torch.finfo(gradient.dtype).eps * gradient.norm()
        return error


@dataclass(frozen=True)
class _Conditions:
    """The optimality conditions at one (x, y), with a choice of active constraints and free entries.

    `basis` `[k, q]` and `triangle` `[q, q]` factor the active gradients along the face, `A^T = basis triangle`.
    """

    oracles: Oracles
    x: Tensor
    step: int
    face: Face
    box: Bounds
    rows: Rows
    active: Tensor
    basis: Tensor
    triangle: Tensor
    independence: Tensor
    multipliers: Tensor
    value: Tensor
    gradient: Tensor
    lagrangian: FaceLinearization

    @classmethod
    def at(
        cls, oracles: Oracles, x: Tensor, y: Tensor, step: int, tol: float = 0.0, *, active: Tensor | None = None,
        face: Face | None = None,
    ) -> _Conditions:  # fmt: skip
        """Evaluate; what is active and free is read off y unless it is given."""
        box = bounds(oracles.problem.lower_set, oracles.y_layout, y)
        face = Face.at(oracles.declared(x), y, box) if face is None else Face(y, face.free)
        rows = constraint_rows(oracles, x, y, step)
        if active is None:
            active = (rows.value >= -tol) | (torch.arange(len(rows.value), device=y.device) >= rows.inequalities)
        along = face.drop(rows.y[active])
        independence = _independence(along)
        if bool(independence <= torch.finfo(y.dtype).eps ** 0.5):
            listed = active.nonzero().flatten().tolist()
            raise LinearSolveFailed(
                f"the gradients of the active lower constraints (entries {listed} of constraint, then equality) are "
                f"linearly dependent at lower step {step}, to {float(independence):.1g}: LICQ fails, so multipliers "
                "are not unique and the hypergradient may not exist. Drop redundant constraints, or lower active_tol.",
                status=Status.CQ_FAILURE,
            )
        basis, triangle = torch.linalg.qr(along.T)
        value, gradient = oracles.lower_gradient(x, y, step)
        found = -torch.linalg.solve_triangular(triangle, (basis.T @ face.drop(gradient))[:, None], upper=True)[:, 0]
        multipliers = torch.zeros_like(rows.value).masked_scatter(active, found)
        whole = _lagrangian(oracles, x, y, step, multipliers, rows.inequalities)
        return cls(
            oracles, x, step, face, box, rows, active, basis, triangle, independence, multipliers, value,
            whole.gradient, FaceLinearization(whole, face),
        )  # fmt: skip

    def tangent(self, v: Tensor) -> Tensor:
        """Project a vector along the face on the null space of A."""
        projected: Tensor = v - self.basis @ (self.basis.T @ v)
        return projected

    def tangential(self, linear: LinearSolver, b: Tensor, start: Tensor | None) -> LinearSolution:
        """Solve `L_yy u = b` on the null space of A; across it the map is the identity, which keeps it regular.

        Raises:
            LinearSolveFailed: the solve failed.
        """
        if self.basis.shape[0] == self.basis.shape[1]:
            return LinearSolution(torch.zeros_like(b), Status.CONVERGED, b.new_zeros((), dtype=torch.float64), 0, 0)

        def apply(v: Tensor) -> Tensor:
            inside = self.tangent(v)
            return self.tangent(self.lagrangian.hvp(inside)) + v - inside

        solution = linear.solve(Operator(apply), self.tangent(b), None if start is None else self.tangent(start))
        residual = float(solution.residual.max())
        if not solution.status.ok and not (solution.status is Status.STEP_LIMIT and residual <= 0.5):
            raise LinearSolveFailed(
                f"the linear system of the constrained hypergradient failed at lower step {self.step} after "
                f"{solution.steps} iterations: {solution.status.value} (relative residual {residual:.2g}).",
                status=solution.status,
            )
        return solution

    def pulled(self, u: Tensor, b: Tensor) -> Tensor:
        """Return `L_xy^T u + (dc/dx)^T v`, where v makes up for what of `b - L_yy u` lies in the range of A^T."""
        v = torch.linalg.solve_triangular(
            self.triangle, (self.basis.T @ (b - self.lagrangian.hvp(u)))[:, None], upper=True
        )
        found: Tensor = self.lagrangian.cross(u) + self.rows.x[self.active].T @ v[:, 0]
        return found

    def newton(self, linear: LinearSolver) -> Tensor:
        """Return y after one Newton step of the conditions."""
        missed = self.rows.value[self.active]
        across = self.basis @ torch.linalg.solve_triangular(self.triangle.T, missed[:, None], upper=False)[:, 0]
        b = self.lagrangian.gradient - self.lagrangian.hvp(across)
        delta = across + self.tangential(linear, b, None).value
        return self.face.y - self.face.lift(delta)

    def point(self, w: Tensor | None) -> KKTPoint:
        """Return what is reported."""
        count, length = self.rows.inequalities, self.rows.y[: self.rows.inequalities].norm(dim=-1)
        active, inf = self.active[:count], self.rows.value.new_tensor(torch.inf)
        force = torch.where(active, self.multipliers[:count] * length, inf)
        distance = torch.where(active, inf, -self.rows.value[:count] / length.clamp_min(torch.finfo(length.dtype).tiny))
        multiplier_margin, slack_margin = (torch.cat([part, inf[None]]).min() for part in (force, distance))
        return KKTPoint(self.multipliers, self.active, multiplier_margin, slack_margin, self.independence, w)

    def margin(self, point: KKTPoint, solution: LinearSolution) -> tuple[Tensor, Tensor, Tensor]:
        """Return the margin, how far y is from a solution, and whether it is on the wrong side of some condition."""
        y, declared = self.face.y, self.oracles.declared(self.x)
        slack = held_slack(declared, y, self.gradient, self.box)
        margin = torch.minimum(slack.min(), point.multiplier_margin)
        if not self.face.empty:
            largest = self.lagrangian.mean_curvature() if solution.curvature is None else solution.curvature[1]
            near = torch.minimum(free_distance(declared, self.face, self.box), point.slack_margin)
            margin = torch.minimum(margin, near * largest)
        moving = torch.hypot(self.lagrangian.gradient.norm(), self.rows.value[self.active].norm())
        outside = torch.minimum(slack.min(), point.multiplier_margin).clamp_max(0).abs()
        forces = (self.multipliers.abs() * self.rows.y.norm(dim=-1)).sum() + self.gradient.abs().max()
        resolution = moving + 100 * torch.finfo(y.dtype).eps * forces
        return (
            torch.where(margin > resolution, margin, 0.0).to(y.dtype),
            torch.hypot(moving, outside),
            outside > resolution,
        )


def _lagrangian(
    oracles: Oracles, x: Tensor, y: Tensor, step: int, multipliers: Tensor, inequalities: int
) -> Linearization:
    """Differentiate the Lagrangian twice at (x, y); the multipliers are constants."""
    weights = {"constraint": multipliers[:inequalities], "equality": multipliers[inequalities:]}
    lower = oracles.lower_at(step)

    def evaluate(xs: Leaves, ys: Leaves) -> Tensor:
        total = lower(xs, ys)
        for name in names(oracles):
            total = total + oracles.call(name, step, list(xs), list(ys)) @ weights[name]
        return total

    oracles.count(gradients=1)
    core = second_derivatives(oracles.way, evaluate, oracles.x_layout, oracles.y_layout, x, y)
    return Linearization(oracles, core, oracles.declared(x), x, y, step)


def _independence(rows: Tensor) -> Tensor:
    """Return least over largest singular value of the rows, each over its length; 0 where there are too many."""
    if not len(rows):
        return rows.new_ones(())
    if len(rows) > rows.shape[-1]:
        return rows.new_zeros(())
    length = rows.norm(dim=-1, keepdim=True)
    values = torch.linalg.svdvals(rows / length.clamp_min(torch.finfo(rows.dtype).tiny))
    return torch.where((length > 0).all(), values[-1] / values[0].clamp_min(torch.finfo(rows.dtype).tiny), 0.0)
