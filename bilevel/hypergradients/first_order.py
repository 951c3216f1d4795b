"""What the end of training says about its start, without second derivatives: first-order MAML and Reptile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bilevel.hypergradients._base import Certificate, Estimate
from bilevel.hypergradients._trained import Trained, TrainedState
from bilevel.hypergradients.unrolled import through_init
from bilevel.oracles import Oracles
from bilevel.status import InvalidProblem, Status


@dataclass(frozen=True)
class FirstOrder(Trained):
    """Take training as if it moved every start alike: `dy_T / dy_0 = I`, and x acts through the start alone.

        first-order MAML:   h = df/dx + (dy_0 / dx)^T df/dy at y_T
        Reptile:            h = df/dx + (dy_0 / dx)^T (y_0 - y_T), averaged over blocks

    It is not the gradient of f(x, y_T(x)): what lacks is of the order of lr T times the curvature of the lower level.

    Args:
        lower: see `Unrolled`.
        steps: see `Unrolled`.
        restart: must not be False.
        fresh: see `Unrolled`.
        reptile: go toward the trained weights, instead of along the upper gradient there.

    Raises:
        InvalidProblem: the problem has no `lower_init`, or an option is out of range.

    Cost:
        T lower gradients and one upper gradient; no product with the Hessian. Memory: one state.

    References:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017 (section
        5.2). Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018, arXiv 1803.02999 (Algorithm 1).

    Example:
        >>> import bilevel, torch
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, batch: 0.5 * (y - 3.0).square(), lower=lambda x, y, batch: 0.5 * y.square() + 0 * x,
        ...     lower_init=lambda x: 1.0 * x)
        >>> estimator = FirstOrder(lower=bilevel.SGD(0.5), steps=1)
        >>> float(bilevel.hypergradient(problem, torch.tensor(2.0), torch.tensor(0.0), estimator=estimator).gradient)
        -2.0
    """

    reptile: bool = False

    def __post_init__(self) -> None:
        self.check()
        if self.restart is False:
            raise InvalidProblem("FirstOrder(restart=False) has no start to learn: leave restart out.")

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> TrainedState:
        """Return the state before the first training."""
        if oracles.problem.lower_init is None:
            raise InvalidProblem("FirstOrder learns the start of training: state Problem(lower_init=...).")
        return super().init(oracles, x, y)

    def estimate(
        self,
        oracles: Oracles,
        x: Tensor,
        y: Tensor,
        state: TrainedState,
        *,
        upper_step: int = 0,
        lower_step: int = 0,
        step_diagonal: Callable[[], Tensor] | None = None,
        certify: bool = False,
    ) -> tuple[Estimate, TrainedState]:
        """Return the direction after training from the start, and the next state."""
        before = oracles.counts
        training, now, after = self.begin(oracles, x, y, state, upper_step, lower_step)
        start = now.y
        for step in range(self.steps):
            now = training.advance(step, now)
        upper = oracles.upper_gradient(x, now.y, upper_step)
        blocks = oracles.problem.blocks or 1
        along = (start - now.y) / blocks if self.reptile else upper.y
        gradient = upper.x + through_init(oracles, x, along)
        lower_value, lower_gradient = oracles.lower_gradient(x, now.y, training.batch_after(self.steps))
        certificate = Certificate.unsolved(Status.APPROXIMATE, lower_gradient.norm(), oracles.counts - before)
        return Estimate(gradient, upper.value, lower_value, now.y, certificate), after
