"""RaT-BPTT: train a fresh network for a random time, and differentiate the last steps of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from bilevel.data._seeding import mixed
from bilevel.optimizers import LBFGS, Adam, Optimizer
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.problems.distillation._unroll import UnrolledState, window_gradient
from bilevel.problems.distillation.networks import Network
from bilevel.solvers._base import Metrics, Solver, check_upper
from bilevel.status import InvalidProblem
from bilevel.training import Training


@dataclass(frozen=True)
class RaTBPTT(Solver[UnrolledState]):
    """Distil through training: each upper step trains a fresh network on x, and differentiates a window at the end.

        y_0 = a fresh network;  T uniform in {window, .., unroll};  y_T = T lower steps;
        h = d f(x, y_T) / dx through the last `window` steps;  h = h min(1, clip n / ‖h‖);  x = P(upper step along h)

    with the running mean n of the norms of clipped hypergradients.

    Args:
        network: gives the fresh starts; `problem` is of the same one.
        unroll: U, the longest training.
        window: W <= U, steps differentiated. With W = U, every training has U steps and the gradient is exact.
        lower: optimizer of the network, `Adam(1e-3)` in the paper; its hyperparameters may be functions of x.
        upper: optimizer of x, Adam in the paper.
        clip: > 0: hypergradients longer than so many times the running mean of their norms are scaled down to that;
            None: never.
        memory: in [0, 1), of that running mean.
        seed: of starts and times.

    Raises:
        InvalidProblem: an option is out of its range.

    Cost:
        Per step: T lower gradients, W products with the lower Hessian, and W gradients again (states between
        checkpoints are computed anew).

    References:
        Feng, Vedantam, Kempe, "Embarrassingly simple dataset distillation", ICLR 2024, arXiv 2311.07025. The paper does
        not fix the constants of the clipping; these are ours.

    Example:
        >>> import bilevel
        >>> from bilevel.problems import distillation as dd
        >>> train = bilevel.problems.Part(torch.tensor([[[[-1.0]]], [[[1.0]]]]), torch.tensor([0, 1]))
        >>> network = dd.mlp(shape=(1, 1, 1), classes=2)
        >>> task = dd.distillation(train, network, start="noise", batch_size=None)
        >>> solver = RaTBPTT(network, unroll=5, window=3, lower=bilevel.Adam(0.1), upper=bilevel.Adam(0.1))
        >>> solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=40)
        >>> solution.x["images"].flatten().sign()
        tensor([-1.,  1.])
    """

    needs_hvp: ClassVar[bool] = True

    network: Network
    unroll: int = 200
    window: int = 60
    lower: Optimizer[Any] = field(default_factory=lambda: Adam(lr=1e-3))
    upper: Optimizer[Any] = field(default_factory=lambda: Adam(lr=1e-3))
    clip: float | None = 2.0
    memory: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        check_upper(self.upper)
        if isinstance(self.lower, LBFGS) or not isinstance(self.lower, Optimizer) or self.lower.needs_lr:
            raise InvalidProblem(f"RaTBPTT(lower=...) must be an Optimizer with a step length, got {self.lower!r}.")
        if not 1 <= self.window <= self.unroll:
            raise InvalidProblem(f"RaTBPTT needs 1 <= window <= unroll, got {self.window} and {self.unroll}.")
        if not (self.clip is None or self.clip > 0) or not 0 <= self.memory < 1:
            raise InvalidProblem(
                f"RaTBPTT: clip must be > 0 or None and memory in [0, 1), got {self.clip} and {self.memory}."
            )

    @property
    def replays(self) -> bool:
        """Whether it differentiates through training steps: yes."""
        return True

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> UnrolledState:
        """Return the state before the first step.

        Raises:
            InvalidProblem: the problem has a part that training steps would ignore.
        """
        self.refuse(oracles.problem)
        return UnrolledState(x, y, 0, self.upper.init(x), x.new_zeros(()), None)

    def step(self, oracles: Oracles, state: UnrolledState) -> UnrolledState:
        """Return the state after one training and one upper step."""
        number = state.step
        start = oracles.y_layout.flatten(self.network.start(mixed("fresh", self.seed, number), state.x.dtype))
        steps = self.time(number)
        training = Training(oracles, self.lower, state.x, first_batch=number * self.unroll)
        estimate = window_gradient(oracles, training, start, steps, self.window, number)
        h, norm = self._clipped(estimate.gradient, state.norm)
        x, upper = self.upper.update(state.x, h, state.upper, oracles.x_layout.unflatten(state.x))
        metrics = Metrics.of(oracles, state.x, estimate)
        return UnrolledState(oracles.project_x(x), estimate.y, number + 1, upper, norm, metrics)

    def time(self, step: int) -> int:
        """Return how long the training of an upper step takes."""
        generator = Generator().manual_seed(mixed("time", self.seed, step))
        return int(torch.randint(self.window, self.unroll + 1, (), generator=generator))

    def refuse(self, problem: Problem) -> None:
        """Refuse what fresh trainings would ignore.

        Raises:
            InvalidProblem: sets or constraints below, kinks, or a start that depends on x.
        """
        super().refuse(problem)
        if problem.lower_init is not None:
            raise InvalidProblem("RaTBPTT starts fresh networks itself: leave Problem(lower_init=...) out.")

    def backtracked(self, factor: float) -> RaTBPTT:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))

    def _clipped(self, h: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient, clipped, and the running mean of norms after it."""
        size = h.norm()
        if self.clip is not None and float(norm) > 0 and bool(size.isfinite()):
            h = h * (self.clip * norm / size).clamp(max=1.0)
            size = h.norm()
        return h, size if float(norm) == 0 else self.memory * norm + (1 - self.memory) * size
