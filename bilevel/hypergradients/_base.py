"""What a hypergradient comes with: a certificate of how far it can be trusted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.layout import Variables
from bilevel.oracles import Counts, Oracles
from bilevel.problem import Problem
from bilevel.replay import Visited
from bilevel.status import InvalidProblem, Status


@dataclass(frozen=True)
class Certificate:
    """How far a hypergradient can be trusted.

    `error_estimate` estimates `‖h - dF/dx‖`, the distance to the true hypergradient of the batch at hand (the sampling
    error of a mini-batch is not part of it). It is an estimate, no bound: the constants in it are measured along the
    directions that matter, and the smallest Ritz value lies above the true least curvature. Bounds that hold for
    certain are there only where the user certifies `strong_convexity`.

    Args:
        status: of the linear solve.
        residual: relative residual `‖b - (H + damping I) w‖ / ‖b‖` of the linear solve, the largest over rows.
        lower_gradient_norm: `‖dg/dy‖` at the y used.
        curvature: smallest and largest curvature of H seen, None if none was.
        error_estimate: of the whole hypergradient, in its units; None if it was not asked for.
        lower_distance_bound: `‖y - y*‖ <= ‖dg/dy‖ / mu`, only with a certified mu.
        linear_distance_bound: `‖w - H^-1 b‖ <= ‖b - H w‖ / mu`, only with a certified mu.
        counts: what the hypergradient with its certificate cost.
        margin: where the lower level has kinks, bounds or constraints: how far its solution is from touching or leaving
            one, in units of the lower gradient. The hypergradient holds while the same ones are active; at 0 that is
            for steps of x to one side only. None where there are none.
        growth: through training steps: the largest norm of the cotangent on its way back, over that at the end. Far
            above 1 the training is chaotic, and the derivative exact but useless. None for implicit hypergradients.
    """

    status: Status
    residual: Tensor
    lower_gradient_norm: Tensor
    curvature: tuple[Tensor, Tensor] | None
    error_estimate: Tensor | None
    lower_distance_bound: Tensor | None
    linear_distance_bound: Tensor | None
    counts: Counts
    margin: Tensor | None = None
    growth: Tensor | None = None

    @classmethod
    def unsolved(
        cls,
        status: Status,
        lower_gradient_norm: Tensor,
        counts: Counts,
        *,
        error_estimate: Tensor | None = None,
        growth: Tensor | None = None,
    ) -> Certificate:
        """Return what can be said of a gradient that took no linear solve, such as one through training steps.

        Args:
            status: CONVERGED for a derivative that is exact but for rounding, APPROXIMATE for others.
            lower_gradient_norm: `‖dg/dy‖` at the y used.
            counts: what it cost.
            error_estimate: as above.
            growth: as above.
        """
        return cls(
            status=status,
            residual=torch.full_like(lower_gradient_norm, float("nan")),
            lower_gradient_norm=lower_gradient_norm,
            curvature=None,
            error_estimate=error_estimate,
            lower_distance_bound=None,
            linear_distance_bound=None,
            counts=counts,
            growth=growth,
        )

    def __str__(self) -> str:
        error = "not estimated" if self.error_estimate is None else f"{float(self.error_estimate):.2e}"
        curvature = "not seen"
        if self.curvature is not None:
            curvature = f"in [{float(self.curvature[0]):.2e}, {float(self.curvature[1]):.2e}]"
        return (
            f"error estimate {error}; linear residual {float(self.residual):.1e} ({self.status.name.lower()}); "
            f"lower gradient norm {float(self.lower_gradient_norm):.1e}; curvature {curvature}; "
            f"{self.counts.gradients} gradients, {self.counts.hvps} HVPs{self._margin()}"
            + ("" if self.growth is None else f"; cotangent growth {float(self.growth):.2g}")
        )

    def _margin(self) -> str:
        if self.margin is None:
            return ""
        if float(self.margin) > 0:
            return f"; margin {float(self.margin):.1e}"
        return "; margin 0: strict complementarity fails, so this is a one-sided derivative at best"


@dataclass(frozen=True)
class TrainingRun:
    """A training run that was differentiated.

    Args:
        value: f at the trained weights.
        y: the trained weights, structured like y.
        initial: df/dy0, the gradient in the weights at the start (of the steps visited), structured like y.
        optimizer: the gradients in the optimizer's state there, structured like it; counters stand as they are.
        visited: what the visit took.
    """

    value: Tensor
    y: Variables
    initial: Variables
    optimizer: Any
    visited: Visited


@dataclass(frozen=True)
class Hypergradient:
    """The gradient of `F(x) = f(x, y*(x))`, structured like x, with its certificate.

    Args:
        gradient: structured like x, detached.
        certificate: how far to trust it.
        run: what else a gradient through training has to tell; None for others.
    """

    gradient: Variables
    certificate: Certificate
    run: TrainingRun | None = None


class Estimate(NamedTuple):
    """A hypergradient on flat vectors.

    Args:
        gradient: `[p]`, detached.
        upper_value: f at `(x, y)`.
        lower_value: g at `(x, y)`.
        y: where it was taken; differs from the y given only after a Newton polish.
        certificate: how far to trust it.
    """

    gradient: Tensor
    upper_value: Tensor
    lower_value: Tensor
    y: Tensor
    certificate: Certificate


class Estimator(ABC):
    """Estimates hypergradients. Implementations are frozen dataclasses; what they carry along is a separate state."""

    replays: ClassVar[bool] = False
    """Whether it differentiates through training steps; then it takes them itself, starting from the y it is given."""

    def refuse_beyond_smooth(self, problem: Problem, instead: str) -> None:
        """Refuse a lower level with a set, constraints or kinks, and say why and what to use `instead`.

        Raises:
            InvalidProblem: the lower level is more than a smooth objective.
        """
        for part in problem.beyond_smooth:
            raise InvalidProblem(f"{type(self).__name__} does not handle Problem({part}=...): {instead}")

    @abstractmethod
    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> Any:
        """Return the state before the first estimate (warm starts)."""

    @abstractmethod
    def estimate(
        self,
        oracles: Oracles,
        x: Tensor,
        y: Tensor,
        state: Any,
        *,
        upper_step: int = 0,
        lower_step: int = 0,
        step_diagonal: Callable[[], Tensor] | None = None,
        certify: bool = False,
    ) -> tuple[Estimate, Any]:
        """Return the hypergradient at `(x, y)` and the next state.

        Args:
            oracles: the problem's derivatives.
            x: `[p]`.
            y: near the lower solution, `[d]` or `[m, d]`.
            state: what `init` or the last `estimate` returned.
            upper_step: which upper batch.
            lower_step: which lower batch.
            step_diagonal: () -> that of the lower optimizer, for linear solvers that use it (SAMA).
            certify: whether to estimate the error, which costs about as much again.
        """
