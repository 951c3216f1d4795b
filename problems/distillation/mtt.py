"""MTT: images on which training follows the trajectories of networks trained on real data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from torch import Generator, Tensor

from bilevel.data import DataSource, Shuffled
from bilevel.data._base import Device
from bilevel.data._seeding import mixed
from bilevel.layout import Layout
from bilevel.optimizers import LBFGS, SGD, Adam, Optimizer
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.problems._datasets import Part
from bilevel.problems.distillation._unroll import UnrolledState, window_gradient
from bilevel.problems.distillation.networks import Network
from bilevel.problems.distillation.statement import check_images
from bilevel.problems.distillation.synthetic import hard_targets, training_loss
from bilevel.solvers._base import Metrics, Solver, check_upper
from bilevel.status import InvalidProblem, NonFinite
from bilevel.training import Training


@final
@dataclass(frozen=True, eq=False)
class Trajectories(DataSource):
    """Give a start and a target on the trajectory of an expert, both drawn at random: `(theta_s, theta_{s+M})`, flat.

    Args:
        experts: `[experts, epochs + 1, d]`, the weights of networks before training and after each epoch.
        ahead: M >= 1, epochs from the start to the target.
        max_start: the last epoch that may be a start; all from which a target is left if None.

    Raises:
        InvalidProblem: there is no such start, or the weights are not finite.
    """

    experts: Tensor
    ahead: int = 2
    max_start: int | None = None

    def __post_init__(self) -> None:
        if self.experts.dim() != 3 or not bool(self.experts.isfinite().all()):
            raise InvalidProblem(
                f"Trajectories need finite weights [experts, epochs + 1, d], got {self.experts.shape}."
            )
        last = self.experts.shape[1] - 1 - self.ahead
        if self.ahead < 1 or last < 0 or not (self.max_start is None or 0 <= self.max_start <= last):
            raise InvalidProblem(
                f"Trajectories: ahead must be from 1 to the {self.experts.shape[1] - 1} epochs and max_start from 0 to "
                f"{last}, got {self.ahead} and {self.max_start}."
            )

    @property
    def deterministic(self) -> bool:
        """Whether all steps give the same pair: only if there is one pair."""
        return len(self.experts) * (self._last + 1) == 1

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return `(theta_s, theta_{s+M})`, `[d]` each."""
        generator = Generator().manual_seed(mixed("trajectory", seed, step))
        expert = int(torch.randint(len(self.experts), (), generator=generator))
        epoch = int(torch.randint(self._last + 1, (), generator=generator))
        return self.experts[expert, epoch], self.experts[expert, epoch + self.ahead]

    def to(self, device: Device) -> Trajectories:
        """Return a source of the pairs on a device."""
        return Trajectories(self.experts.to(device), self.ahead, self.max_start)

    @property
    def _last(self) -> int:
        return self.experts.shape[1] - 1 - self.ahead if self.max_start is None else self.max_start


def train_experts(
    train: Part,
    network: Network,
    *,
    experts: int = 5,
    epochs: int = 10,
    lr: float = 1e-2,
    momentum: float = 0.0,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Train networks on real data by SGD, and return their weights before training and after each epoch.

    Args:
        train: images and labels.
        network: the architecture.
        experts: networks, >= 1.
        epochs: >= 1.
        lr: > 0, 1e-2 in the paper.
        momentum: in [0, 1); 0 in the paper.
        batch_size: 256 in the paper.
        seed: of starts and batches.

    Returns:
        `[experts, epochs + 1, d]`, in the layout of y.

    Raises:
        InvalidProblem: an option is out of its range.
        NonFinite: training diverged.
    """
    check_images("train_experts", train, network)
    if experts < 1 or epochs < 1 or not lr > 0 or not 0 <= momentum < 1:
        raise InvalidProblem(
            f"train_experts: experts and epochs must be >= 1, lr > 0, momentum in [0, 1), got {experts}, {epochs}, "
            f"{lr}, {momentum}."
        )
    batches = -(-len(train.targets) // batch_size)
    source = Shuffled(tuple(train), min(batch_size, len(train.targets)))
    found = []
    for expert in range(experts):
        number = mixed("expert", seed, expert)
        weights = {name: w.requires_grad_() for name, w in network.start(number, train.inputs.dtype).items()}
        layout, optimizer = Layout.of(weights, name="y"), torch.optim.SGD(weights.values(), lr, momentum)
        trajectory = [layout.flatten(weights)]
        for step in range(epochs * batches):
            images, labels = source.batch(step, number)
            targets = hard_targets(labels, network.classes, "cross_entropy", images.dtype)
            optimizer.zero_grad()
            loss = training_loss(network.logits(weights, images), targets, "cross_entropy")
            loss.backward()
            optimizer.step()
            if (step + 1) % batches == 0:
                trajectory.append(layout.flatten(weights))
        found.append(torch.stack(trajectory))
    experts_found = torch.stack(found)
    if not bool(experts_found.isfinite().all()):
        raise NonFinite(f"training of the experts diverged at lr = {lr}; lower it.")
    return experts_found


def trajectory_problem(problem: Problem, layout: Layout, trajectories: Trajectories) -> Problem:
    """Return a distillation problem whose upper objective is the distance of trained weights to an expert's.

        f(x, y) = ‖y - theta_{s+M}‖^2 / ‖theta_s - theta_{s+M}‖^2

    It is 1 where training did not move, and 0 where it arrived.

    Args:
        problem: of which the lower level is kept.
        layout: of y.
        trajectories: the upper batches.
    """

    def upper(x: Any, y: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        start, target = batch
        leaves = zip(layout.leaves(y), layout.views(start), layout.views(target), strict=True)
        parts = [((a - c).square().sum(), (b - c).square().sum()) for a, b, c in leaves]
        return torch.stack([near for near, _ in parts]).sum() / torch.stack([far for _, far in parts]).sum()

    return replace(problem, upper=upper, upper_data=trajectories)


@dataclass(frozen=True)
class MTT(Solver[UnrolledState]):
    """Distil by matching trajectories: N steps on x from an expert's weights should end where M real epochs do.

        y_0 = theta_s;   y_N = N lower steps on x;   h = d/dx ‖y_N - theta_{s+M}‖^2 / ‖theta_s - theta_{s+M}‖^2

    Args:
        trajectories: of the experts, in the layout of the problem's y.
        steps: N >= 1.
        lower: optimizer of the network: SGD in the paper, with a learned rate if the problem has one.
        upper: optimizer of images and targets. SGD with momentum 0.5 in the paper; this is Adam.
        upper_rate: optimizer of the learned log rate.

    Raises:
        InvalidProblem: an option is out of its range.

    Cost:
        Per step: 2 N lower gradients and N products with the lower Hessian, memory for about 2 sqrt(N) states.

    References:
        Cazenavette, Wang, Torralba, Efros, Zhu, "Dataset distillation by matching training trajectories", CVPR 2022,
        arXiv 2203.11932 (Algorithm 1).

    Example:
        >>> import bilevel
        >>> from bilevel.problems import distillation as dd
        >>> train = bilevel.problems.Part(torch.tensor([[[[-1.0]]], [[[1.0]]]]), torch.tensor([0, 1]))
        >>> network = dd.mlp(shape=(1, 1, 1), classes=2)
        >>> task = dd.distillation(train, network, start="noise", lr=0.1)
        >>> experts = dd.train_experts(train, network, experts=1, epochs=4, lr=0.5)
        >>> solver = MTT(dd.Trajectories(experts), steps=3, upper=bilevel.Adam(0.1))
        >>> solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=100)
        >>> float(solution.history["upper_value"][-1]) < 0.05
        True
    """

    needs_hvp: ClassVar[bool] = True

    trajectories: Trajectories
    steps: int = 20
    lower: Optimizer[Any] = field(default_factory=lambda: SGD(learned_rate))
    upper: Optimizer[Any] = field(default_factory=lambda: Adam(lr=1e-2))
    upper_rate: Optimizer[Any] = field(default_factory=lambda: Adam(lr=1e-2))

    def __post_init__(self) -> None:
        check_upper(self.upper)
        check_upper(self.upper_rate)
        if isinstance(self.lower, LBFGS) or not isinstance(self.lower, Optimizer) or self.lower.needs_lr:
            raise InvalidProblem(f"MTT(lower=...) must be an Optimizer with a step length, got {self.lower!r}.")
        if self.steps < 1:
            raise InvalidProblem(f"MTT(steps=...) must be at least 1, got {self.steps}.")

    @property
    def replays(self) -> bool:
        """Whether it differentiates through training steps: yes."""
        return True

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> UnrolledState:
        """Return the state before the first step.

        Raises:
            InvalidProblem: the problem has a part that training steps would ignore, the experts are of another
                architecture, or the learning rate is no part of x.
        """
        self.refuse(oracles.problem)
        if self.trajectories.experts.shape[2] != oracles.y_layout.size:
            raise InvalidProblem(
                f"MTT: the experts have {self.trajectories.experts.shape[2]} weights, the problem's network "
                f"{oracles.y_layout.size}; train them with the same network."
            )
        # A rate that x lacks is refused here, not at the first step.
        self.lower.update(y, torch.zeros_like(y), self.lower.init(y), oracles.x_layout.unflatten(x))
        return UnrolledState(x, y, 0, (self.upper.init(x), self.upper_rate.init(x)), x.new_zeros(()), None)

    def step(self, oracles: Oracles, state: UnrolledState) -> UnrolledState:
        """Return the state after one training and one upper step."""
        number, nested = state.step, oracles.x_layout.unflatten(state.x)
        matching = self.matching(oracles)
        start, _ = matching.batch("upper", number)
        training = Training(matching, self.lower, state.x, first_batch=number * self.steps)
        estimate = window_gradient(matching, training, start, self.steps, None, number)
        spent = matching.counts
        oracles.count(gradients=spent.gradients, hvps=spent.hvps, crosses=spent.crosses)
        x, upper = self.upper.update(state.x, estimate.gradient, state.upper[0], nested)
        other, rate = self.upper_rate.update(state.x, estimate.gradient, state.upper[1], nested)
        layout = oracles.x_layout
        views = zip(layout.names, layout.views(x), layout.views(other), strict=True)
        x = oracles.project_x(layout.concat([b if name == "log_lr" else a for name, a, b in views]))
        metrics = Metrics.of(oracles, state.x, estimate)
        return UnrolledState(x, estimate.y, number + 1, (upper, rate), state.norm, metrics)

    def matching(self, oracles: Oracles) -> Oracles:
        """Return the oracles of the problem whose upper objective is the distance to the experts."""
        problem = trajectory_problem(oracles.problem, oracles.y_layout, self.trajectories)
        return Oracles(problem, oracles.x_layout, oracles.y_layout, seed=oracles.seed, way=oracles.way)

    def backtracked(self, factor: float) -> MTT:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor), upper_rate=self.upper_rate.scaled(factor))


def learned_rate(x: Any, step: int) -> Tensor:
    """Return the learning rate that is part of x, `distillation(lr=...)`.

    Raises:
        InvalidProblem: x has none.
    """
    if "log_lr" not in x:
        raise InvalidProblem("the learning rate is no part of x: state distillation(lr=...), or pass lower=SGD(0.01).")
    rate: Tensor = x["log_lr"].exp()
    return rate
