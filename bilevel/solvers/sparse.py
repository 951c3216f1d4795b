"""Descend along hypergradients where the lower level has kinks or bounds: prox steps below, the active set above."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.hypergradients._base import Estimate
from bilevel.hypergradients.active_set import ActiveSet, ActiveSetState
from bilevel.lower_level import minimize_proximal
from bilevel.optimizers import Adam, Minimum, Optimizer
from bilevel.optimizers.coordinate_descent import CoordinateDescent
from bilevel.optimizers.proximal import ProximalGradient
from bilevel.oracles import Oracles
from bilevel.regularizers import L1, ElasticNet
from bilevel.solvers._base import Metrics, Solver, check_upper, moved_x
from bilevel.status import InvalidProblem


class SparseState(NamedTuple):
    """Where the descent stands.

    Args:
        x: upper variables `[p]`.
        y: lower variables `[d]` or `[m, d]`, the warm start of the next step; zeros and bounds are exact.
        step: upper steps made, which is also the index of the next batches.
        upper: state of the upper optimizer.
        estimator: state of the hypergradient estimator.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    upper: Any
    estimator: ActiveSetState
    metrics: Metrics | None


@dataclass(frozen=True)
class SparseDescent(Solver[SparseState]):
    """Alternate a proximal solve of the lower level with one upper step along the hypergradient of its active set.

        y = argmin g(x, .) + r(x, .) over Y,   h = df/dx - J_S^T H_SS^-1 df/dy_S,   x = upper step along h

    S are the entries of y at no kink of r (L1, elastic net, group and sparse group terms) and at no bound of Y. See
    `ActiveSet` for when h is a derivative; the certificate of the solution carries its margin.

    Args:
        upper: optimizer of x.
        lower: how to solve the lower level: `ProximalGradient`, or scikit-learn's `CoordinateDescent` for lassos and
            elastic nets on a data matrix.
        estimator: of the hypergradient.
        certify_every: certify every so many steps (0: never). A certificate costs about two hypergradients.

    Cost:
        Per step: one gradient a proximal step (warm starts take few) and five to measure their length, none with
        `CoordinateDescent`; and one estimate.

    Notes:
        Each upper step solves the lower level on one batch, the one with its number. F has kinks where the active set
        changes; between them it is smooth. Where a kink is a minimum, x goes back and forth across it and the margin
        of the certificate shrinks: `best_x` is the better end, and a decaying `lr` closes in. `state.estimator.free`
        is S.

    References:
        Bertrand, Klopfenstein, Massias, Blondel, Vaiter, Gramfort, Salmon, "Implicit differentiation for fast
        hyperparameter selection in non-smooth convex learning", JMLR 23, 2022.

    Example:
        >>> import bilevel
        >>> b, t = torch.tensor([3.0, 2.0, 0.5]), torch.tensor([2.5, 0.5, 0.0])
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, batch: (y - t).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - b).square().sum() / 2,
        ...     regularizer=L1(lambda x: x), upper_set=bilevel.Box(0, 5))
        >>> solution = bilevel.solve(problem, SparseDescent(), torch.tensor(2.0), torch.zeros(3), steps=200)
        >>> round(float(solution.x), 2), [round(v, 2) for v in solution.y.tolist()]
        (1.0, [2.0, 1.0, 0.0])
    """

    needs_hvp: ClassVar[bool] = True
    handles_lower_set: ClassVar[bool] = True
    handles_nonsmooth: ClassVar[bool] = True

    upper: Optimizer[Any] = field(default_factory=lambda: Adam(lr=0.1))
    lower: ProximalGradient | CoordinateDescent = field(default_factory=ProximalGradient)
    estimator: ActiveSet = field(default_factory=ActiveSet)
    certify_every: int = 0

    def __post_init__(self) -> None:
        check_upper(self.upper)
        if not isinstance(self.lower, ProximalGradient | CoordinateDescent):
            raise InvalidProblem(f"lower must be a ProximalGradient or a CoordinateDescent, got {self.lower!r}.")
        if not isinstance(self.estimator, ActiveSet):
            raise InvalidProblem(f"estimator must be an ActiveSet, got {self.estimator!r}.")

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> SparseState:
        """Return the state before the first step, with y projected on the lower set.

        Raises:
            InvalidProblem: constraints, a lower set that is no box, or coordinate descent on another lower objective.
        """
        self.refuse(oracles.problem)
        y = oracles.project_y(y)
        if isinstance(self.lower, CoordinateDescent):
            _check_stated(oracles, self.lower, x, y)
        return SparseState(x, y, 0, self.upper.init(x), self.estimator.init(oracles, x, y), None)

    def step(self, oracles: Oracles, state: SparseState) -> SparseState:
        """Return the state after one lower solve and one upper step.

        Raises:
            Diverged: the lower objective falls without end.
            NonFinite: a lower value or gradient is not finite.
            LinearSolveFailed: the linear solve of the hypergradient failed.
        """
        certify = self.certify_every > 0 and state.step % self.certify_every == 0
        estimate, estimator = self._estimate(oracles, state, certify)
        x, upper = moved_x(oracles, self.upper, state.x, estimate.gradient, state.upper)
        metrics = Metrics.of(oracles, state.x, estimate)
        return SparseState(x, estimate.y, state.step + 1, upper, estimator, metrics)

    def certify(self, oracles: Oracles, state: SparseState) -> Estimate:
        """Return the certified hypergradient at the state's x, after the lower solve that a next step would make."""
        return self._estimate(oracles, state, True)[0]

    def backtracked(self, factor: float) -> SparseDescent:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))

    def solve_lower(self, oracles: Oracles, x: Tensor, y: Tensor, step: int = 0) -> Minimum:
        """Minimize the lower level at x from y, on the lower batch of a step.

        Raises:
            Diverged: the lower objective falls without end.
            NonFinite: a lower value or gradient is not finite.
        """
        if not isinstance(self.lower, CoordinateDescent):
            return minimize_proximal(oracles, self.lower, x, y, batch=step, upper_step=step)
        return self.lower.minimize(*_weights(oracles, x, y), y)

    def _estimate(self, oracles: Oracles, state: SparseState, certify: bool) -> tuple[Estimate, ActiveSetState]:
        y = self.solve_lower(oracles, state.x, state.y, state.step).y
        return self.estimator.estimate(
            oracles, state.x, y, state.estimator, upper_step=state.step, lower_step=state.step, certify=certify
        )


def _weights(oracles: Oracles, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights (l1, l2) of a declared L1 or ElasticNet."""
    regularizer = oracles.problem.regularizer
    assert regularizer is not None
    with torch.no_grad():
        l1, *rest = regularizer.coefficients(oracles.x_layout.unflatten(x), oracles.y_layout)
    return l1, rest[0] if rest else torch.zeros_like(l1)


def _check_stated(oracles: Oracles, lower: CoordinateDescent, x: Tensor, y: Tensor) -> None:
    problem = oracles.problem
    fits = isinstance(problem.regularizer, L1 | ElasticNet) and problem.lower_set is None and problem.blocks is None
    if not fits or lower.inputs.shape[1] != oracles.y_layout.size or not problem.deterministic_lower:
        raise InvalidProblem(
            "CoordinateDescent solves one least-squares problem on one data matrix, with a declared L1 or ElasticNet "
            f"and as many columns as y has entries ({oracles.y_layout.size}), without lower_set or blocks; use "
            "ProximalGradient."
        )
    generator = torch.Generator().manual_seed(0)
    point = y + torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)
    _, stated = oracles.lower_gradient(x, point, declared=False)
    _, own = lower.value_and_gradient(point.to(lower.inputs))
    gap = (stated - own.to(stated)).norm() / stated.norm().clamp_min(torch.finfo(y.dtype).tiny)
    if not bool(gap < torch.finfo(y.dtype).eps ** 0.5):
        raise InvalidProblem(
            f"the lower objective is not ‖A y - t‖² / 2n for the inputs and targets of CoordinateDescent: gradients at "
            f"a random point differ by {float(gap):.0%}. Give it the same data, or use ProximalGradient."
        )
