"""Implicit hypergradients where the lower level has kinks or bounds: on the entries that are free of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.hypergradients._base import Certificate, Estimate, Estimator
from bilevel.hypergradients._face import Bounds, Face, FaceView, free_distance, held_slack
from bilevel.hypergradients.implicit import Implicit, ImplicitState
from bilevel.linear import CG
from bilevel.oracles import Oracles
from bilevel.sets.bounds import bounds
from bilevel.status import InvalidProblem, Status


class ActiveSetState(NamedTuple):
    """What one estimate leaves to the next.

    Args:
        free: which entries of y were free, None before the first estimate.
        w: the last solution of the linear system, 0 where not free.
        inner: state of the smooth estimator.
    """

    free: Tensor | None
    w: Tensor | None
    inner: ImplicitState


@dataclass(frozen=True)
class ActiveSet(Estimator):
    """Estimate `dF/dx = df/dx - J_S^T w` with `H_SS w = df/dy_S`, S the entries of y at no kink and no bound.

    The other entries stay where they are under small changes of x, if strict complementarity holds: 0 lies in the
    *interior* of the lower level's subdifferential there. The certificate's `margin` says by how much, in units of the
    lower gradient: for `a |y_j|` it is `a - |dg/dy_j|` at `y_j = 0`, for a group `w - ‖dg/dy_G‖`, for a bound its
    multiplier, and for the free entries their distance to the nearest kink or bound times the largest curvature seen.
    A margin that the accuracy of y cannot tell from 0 is reported as 0: the derivative is one-sided there.

    S is read off exact zeros and bounds, so y must come from a solver that uses prox and projections
    (`bilevel.optimizers.ProximalGradient`, coordinate descent), not from steps along subgradients.

    Args:
        implicit: how to estimate on S: its linear solver, warm start, Newton polish, bounds.

    Raises:
        InvalidProblem: at `init`, a lower set other than Box and NonNegative, a group regularizer with a lower set, or
            constraints.

    Cost:
        That of `implicit`, with products on S only (each costs one HVP all the same), and one more product where an
        exact warm start leaves the linear solver without any.

    References:
        Bertrand, Klopfenstein, Massias, Blondel, Vaiter, Gramfort, Salmon, "Implicit differentiation for fast
        hyperparameter selection in non-smooth convex learning", JMLR 23, 2022.

    Example:
        >>> import bilevel
        >>> from bilevel.regularizers import L1
        >>> b = torch.tensor([3.0, 0.5])
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, batch: y.sum(), lower=lambda x, y, batch: (y - b).square().sum() / 2,
        ...     regularizer=L1(lambda x: x))
        >>> y = torch.tensor([2.0, 0.0])  # the solution at x = 1
        >>> found = bilevel.hypergradient(problem, torch.tensor(1.0), y, estimator=ActiveSet())
        >>> float(found.gradient), float(found.certificate.margin)
        (-1.0, 0.5)
    """

    implicit: Implicit = field(default_factory=lambda: Implicit(linear=CG(tol=1e-6, max_steps=100)))

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> ActiveSetState:
        """Return the state without a warm start."""
        problem = oracles.problem
        if problem.constrained:
            raise InvalidProblem("ActiveSet handles kinks and bounds; for constraint= and equality= use ImplicitKKT.")
        if problem.lower_set is not None and problem.regularizer is not None and not problem.regularizer.by_entry:
            raise InvalidProblem(
                f"ActiveSet does not handle {type(problem.regularizer).__name__} together with a lower_set; use L1 or "
                "ElasticNet, or drop the set."
            )
        bounds(problem.lower_set, oracles.y_layout, y)
        return ActiveSetState(None, None, ImplicitState(None, None, None, 0))

    def estimate(
        self,
        oracles: Oracles,
        x: Tensor,
        y: Tensor,
        state: ActiveSetState,
        *,
        upper_step: int = 0,
        lower_step: int = 0,
        step_diagonal: Callable[[], Tensor] | None = None,
        certify: bool = False,
    ) -> tuple[Estimate, ActiveSetState]:
        """Return the hypergradient at `(x, y)`; see `Estimator.estimate`.

        Raises:
            LinearSolveFailed: the linear solve on S failed, unless `implicit.truncate`.
            NonFinite: an objective or a derivative is not finite.
        """
        before, box = oracles.counts, bounds(oracles.problem.lower_set, oracles.y_layout, y)
        face = Face.at(oracles.declared(x), y, box)
        view = FaceView(oracles, face)
        if face.empty:
            estimate, inner, w = _fixed(view, x, upper_step, lower_step, certify), state.inner, torch.zeros_like(y)
        else:
            found, inner = self.implicit.estimate(
                view,
                x,
                face.drop(y),
                _carried(state, face),
                upper_step=upper_step,
                lower_step=lower_step,
                step_diagonal=None if step_diagonal is None else lambda: face.drop(step_diagonal()),
                certify=certify,
            )
            assert inner.w is not None
            estimate, w = found._replace(y=oracles.project_y(face.place(found.y))), face.lift(inner.w)
        certificate = replace(_judged(view, x, estimate.certificate, box), counts=oracles.counts - before)
        return estimate._replace(certificate=certificate), ActiveSetState(face.free, w, inner)


def _carried(state: ActiveSetState, face: Face) -> ImplicitState:
    """Return the smooth estimator's state on this face: w as far as it is known, and no curvature of another face."""
    if state.free is None or state.w is None:
        return state.inner
    same = torch.equal(state.free, face.free)
    return state.inner._replace(w=face.drop(state.w), largest=state.inner.largest if same else None)


def _fixed(view: FaceView, x: Tensor, upper_step: int, lower_step: int, certify: bool) -> Estimate:
    """Return the hypergradient where no entry of y can move: the direct part alone."""
    none = view.face.drop(view.face.y)
    upper, lower = view.upper_gradient(x, none, upper_step), view.linearize_lower(x, none, lower_step)
    zero = torch.zeros_like(upper.value)
    certificate = Certificate(
        status=Status.CONVERGED,
        residual=zero,
        lower_gradient_norm=zero,
        curvature=None,
        error_estimate=10 * torch.finfo(x.dtype).eps * upper.x.norm() if certify else None,
        lower_distance_bound=None,
        linear_distance_bound=None,
        counts=view.counts,
    )
    return Estimate(upper.x, upper.value, lower.value, view.face.y, certificate)


def _judged(view: FaceView, x: Tensor, certificate: Certificate, box: Bounds) -> Certificate:
    """Add the margin, and what the lower gradient lacks at kinks and bounds."""
    if not view.oracles.problem.proximal:
        return certificate
    face, y, gradient, declared = view.face, view.face.y, view.gradient, view.oracles.declared(x)
    slack = held_slack(declared, y, gradient, box)
    margin = slack.min()
    if not face.empty:
        # A warm start that is exact leaves the linear solver nothing to do, so it sees no curvature.
        largest = view.mean_curvature() if certificate.curvature is None else certificate.curvature[1]
        margin = torch.minimum(margin, free_distance(declared, face, box) * largest)
    moving, outside = face.drop(gradient).norm(), slack.clamp_max(0).norm()
    rest = gradient - declared.add_gradient(torch.zeros_like(y), y)
    resolution = moving + 100 * torch.finfo(y.dtype).eps * (rest.abs().max() + gradient.abs().max())
    error = certificate.error_estimate
    return replace(
        certificate,
        lower_gradient_norm=torch.hypot(moving, outside),
        margin=torch.where(margin > resolution, margin, 0.0).to(y.dtype),
        # An entry that wants to leave its kink or bound is on the wrong face, of which the estimate knows nothing.
        error_estimate=None if error is None else torch.where(outside > resolution, math.inf, error),
    )
