"""FRePo: regress on the features of a pool of networks, and differentiate the regression."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.hypergradients._base import Certificate, Estimate
from bilevel.optimizers import Adam, Optimizer
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.problems.distillation.networks import Network, Parameters
from bilevel.problems.distillation.pool import Member, Pool
from bilevel.problems.distillation.ridge_head import ridge_head
from bilevel.problems.distillation.synthetic import balanced_targets, hard_targets
from bilevel.solvers._base import Metrics, Solver, check_upper
from bilevel.status import InvalidProblem, Status


class FRePoState(NamedTuple):
    """Where the descent stands.

    Args:
        x: upper variables `[p]`.
        y: weights of the network that the last step used.
        step: upper steps made.
        upper: state of the upper optimizer.
        pool: the networks.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    upper: Any
    pool: tuple[Member, ...]
    metrics: Metrics | None


@dataclass(frozen=True)
class FRePo(Solver[FRePoState]):
    """Distil with the body of each network frozen: only its head is fitted to x, in closed form.

        F = features of one network of the pool;   alpha = (F_s F_s^T + l2 I)^-1 targets;
        f = ‖F_t F_s^T alpha - t‖^2 / (2 b) on real images;   x = P(upper step along df/dx, through features and solve)

    with `l2 = ridge trace(F_s F_s^T) / n`. Then that network is trained a little on x, or replaced if it is old.

    Args:
        network: the architecture; the problem's `loss` is "mse" and it has learned targets or not.
        ridge: > 0, relative to the mean eigenvalue of the kernel.
        pool: how networks live.
        upper: optimizer of x. The paper takes LAMB at 3e-4; this is Adam.

    Raises:
        InvalidProblem: an option is out of its range.

    Cost:
        Per step: one gradient on the real batch and the synthetic images, and the pool's training steps.

    References:
        Zhou, Nezhadarya, Ba, "Dataset distillation using neural feature regression", NeurIPS 2022, arXiv 2206.00719
        (Algorithm 1).

    Example:
        >>> import bilevel
        >>> from bilevel.problems import distillation as dd
        >>> train = bilevel.problems.Part(torch.tensor([[[[-1.0]]], [[[1.0]]]]), torch.tensor([0, 1]))
        >>> network = dd.mlp(8, shape=(1, 1, 1), classes=2)
        >>> task = dd.distillation(train, network, start="noise", loss="mse", batch_size=None)
        >>> solution = bilevel.solve(task.problem, FRePo(network, upper=bilevel.Adam(0.1)), task.x0, task.y0, steps=40)
        >>> solution.x["images"].flatten().sign()
        tensor([-1.,  1.])
    """

    needs_hvp: ClassVar[bool] = False

    network: Network
    ridge: float = 1e-3
    pool: Pool = field(default_factory=Pool)
    upper: Optimizer[Any] = field(default_factory=lambda: Adam(lr=1e-2))

    def __post_init__(self) -> None:
        check_upper(self.upper)
        if not self.ridge > 0:
            raise InvalidProblem(f"FRePo(ridge=...) must be > 0, got {self.ridge}.")

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> FRePoState:
        """Return the state before the first step.

        Raises:
            InvalidProblem: the problem has a part that this would ignore.
        """
        self.refuse(oracles.problem)
        return FRePoState(x, y, 0, self.upper.init(x), self.pool.init(oracles, self.network, x.dtype), None)

    def step(self, oracles: Oracles, state: FRePoState) -> FRePoState:
        """Return the state after one upper step and some training of one network."""
        place = self.pool.draw(state.step)
        member = state.pool[place]
        estimate = self.estimate(oracles, state.x, member.y, state.step)
        nested = oracles.x_layout.unflatten(state.x)
        x, upper = self.upper.update(state.x, estimate.gradient, state.upper, nested)
        x = oracles.project_x(x)
        pool = self.pool.advanced(oracles, self.network, state.pool, place, x, state.step)
        metrics = Metrics.of(oracles, state.x, estimate)
        return FRePoState(x, member.y, state.step + 1, upper, pool, metrics)

    def estimate(self, oracles: Oracles, x: Tensor, y: Tensor, upper_step: int = 0) -> Estimate:
        """Return the gradient in x of the regression's loss at a network's weights y."""
        before = oracles.counts
        regression = Oracles(self.regression(oracles.problem), oracles.x_layout, oracles.y_layout, seed=oracles.seed)
        found = regression.upper_gradient(x, y, upper_step)
        oracles.count(gradients=regression.counts.gradients)
        nothing = torch.zeros_like(found.value)  # the regression is solved in closed form
        certificate = Certificate.unsolved(Status.CONVERGED, nothing, oracles.counts - before)
        return Estimate(found.x, found.value, oracles.lower_value(x, y, upper_step), y, certificate)

    def regression(self, problem: Problem) -> Problem:
        """Return the problem whose upper objective is that of the regression, at given weights."""

        def upper(x: dict[str, Tensor], y: Parameters, batch: tuple[Tensor, Tensor]) -> Tensor:
            targets = x["targets"] if "targets" in x else balanced_targets(x["images"], self.network.classes)
            features = self.network.features(y, x["images"])
            alpha = ridge_head(features, targets, self.ridge * features.square().sum() / len(features))
            found = self.network.features(y, batch[0]) @ (features.T @ alpha)
            wanted = hard_targets(batch[1], self.network.classes, "mse", found.dtype)
            return 0.5 * (found - wanted).square().sum(1).mean()

        return replace(problem, upper=upper)

    def backtracked(self, factor: float) -> FRePo:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))
