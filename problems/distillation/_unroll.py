"""What methods share that train a fresh network at each upper step and differentiate the end of its training."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from bilevel.hypergradients._base import Certificate, Estimate
from bilevel.hypergradients.unrolled import visit
from bilevel.oracles import Oracles
from bilevel.solvers._base import Metrics
from bilevel.status import Status
from bilevel.training import Training


class UnrolledState(NamedTuple):
    """Where a descent through fresh trainings stands.

    Args:
        x: upper variables `[p]`.
        y: weights that the last training ended in.
        step: upper steps made.
        upper: state of the upper optimizer.
        norm: running mean of the norms of hypergradients, 0-dim; 0 before the first.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    upper: Any
    norm: Tensor
    metrics: Metrics | None


def window_gradient(
    oracles: Oracles, training: Training, start: Tensor, steps: int, window: int | None, upper_step: int
) -> Estimate:
    """Train for some steps from a start, and differentiate f at the end through the last `window` of them.

    Args:
        oracles: the problem's derivatives.
        training: the lower steps at one x.
        start: weights `[d]`, constant.
        steps: of training.
        window: steps to differentiate; all if None.
        upper_step: which upper batch.
    """
    before = oracles.counts
    found = visit(training, training.start(start), steps, upper_step=upper_step, truncate=window)
    lower_value, lower_gradient = oracles.lower_gradient(training.x, found.last.y, training.first_batch + steps)
    status = Status.CONVERGED if window is None or window >= steps else Status.APPROXIMATE
    certificate = Certificate.unsolved(status, lower_gradient.norm(), oracles.counts - before, growth=found.growth)
    return Estimate(found.x, found.upper.value, lower_value, found.last.y, certificate)
