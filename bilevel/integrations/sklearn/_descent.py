"""Descend along hypergradients where the lower level is solved by a formula, or by a solver of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.hypergradients import ActiveSet, Implicit
from bilevel.hypergradients._base import Estimate, Estimator
from bilevel.linear import CG, Operator
from bilevel.linear.preconditioners import Preconditioner, Prepared
from bilevel.optimizers import Optimizer
from bilevel.oracles import Oracles
from bilevel.solvers._base import Metrics, Solver, moved_x

Strengths = dict[str, Tensor]
"""Upper variables: logarithms of penalties, one vector for each kind."""


class Lower(NamedTuple):
    """A solution of the lower level.

    Args:
        y: `[m, d]`.
        hessian: of the whole lower objective there, `[m, d, d]`, the identity across entries at kinks; or its diagonal
            alone, `[m, d]`.
    """

    y: Tensor
    hessian: Tensor


@dataclass(frozen=True, eq=False)
class Factored(Preconditioner):
    """The inverse of a matrix that should be the operator itself, so that CG needs one step and checks it.

    Args:
        matrix: symmetric positive (semi)definite, `[m, d, d]`; or a positive diagonal `[m, d]`.
    """

    matrix: Tensor

    def prepare(self, operator: Operator, b: Tensor, damping: float) -> Prepared:
        """Return v -> matrix^-1 v."""
        if self.matrix.shape == b.shape:
            return Prepared(lambda v: v / self.matrix)
        factor = cholesky(self.matrix)
        return Prepared(lambda v: torch.cholesky_solve(v.unsqueeze(-1), factor).squeeze(-1))


def cholesky(matrix: Tensor) -> Tensor:
    """Factor symmetric matrices `[m, d, d]`; those that rounding has made indefinite with a little more diagonal."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    shift = 10 * torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    while bool(failed.any()):
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
        factor, failed = torch.linalg.cholesky_ex(matrix + shift[:, None, None] * eye)
        shift = 100 * shift.clamp_min(torch.finfo(matrix.dtype).tiny)
    return factor


class ProfileState(NamedTuple):
    """Where the descent stands.

    Args:
        x: upper variables `[p]`.
        y: lower variables `[m, d]`, the warm start of the next step.
        step: upper steps made.
        upper: state of the upper optimizer.
        estimator: state of the hypergradient estimator.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    upper: Any
    estimator: Any
    metrics: Metrics | None


@dataclass(frozen=True)
class Profile(Solver[ProfileState]):
    """Alternate a solution of the lower level with one upper step along its implicit hypergradient.

    The Hessian that comes with the solution preconditions CG, whose residual then says whether it was right. What the
    problem may hold is for the estimator to say: kinks need `kinks`.

    Args:
        lower: (x as the user writes it, y `[m, d]` near the solution) -> `Lower`.
        upper: optimizer of x.
        kinks: whether the lower level has kinks, so that the hypergradient is that of the active set.
    """

    lower: Callable[[Any, Tensor], Lower]
    upper: Optimizer[Any]
    kinks: bool = False

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> ProfileState:
        """Return the state before the first step."""
        estimator = self._estimator(torch.ones_like(y)).init(oracles, x, y)
        return ProfileState(x, y, 0, self.upper.init(x), estimator, None)

    def step(self, oracles: Oracles, state: ProfileState) -> ProfileState:
        """Return the state after one lower solution and one upper step."""
        estimate, estimator = self._estimate(oracles, state, False)
        x, upper = moved_x(oracles, self.upper, state.x, estimate.gradient, state.upper)
        metrics = Metrics.of(oracles, state.x, estimate)
        return ProfileState(x, estimate.y, state.step + 1, upper, estimator, metrics)

    def certify(self, oracles: Oracles, state: ProfileState) -> Estimate:
        """Return the certified hypergradient at the state's x, at the lower solution there."""
        return self._estimate(oracles, state, True)[0]

    def backtracked(self, factor: float) -> Profile:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))

    def _estimate(self, oracles: Oracles, state: ProfileState, certify: bool) -> tuple[Estimate, Any]:
        y, hessian = self.lower(oracles.x_layout.unflatten(state.x), state.y)
        return self._estimator(hessian).estimate(
            oracles, state.x, y, state.estimator, upper_step=state.step, lower_step=state.step, certify=certify
        )

    def _estimator(self, hessian: Tensor) -> Estimator:
        exact = hessian.dim() == 3
        linear = CG(1e-9 if exact else 1e-6, 50 if exact else 500, preconditioner=Factored(hessian))
        implicit = Implicit(linear=linear, check=linear)
        return ActiveSet(implicit) if self.kinks else implicit
