"""RCIG: implicit gradients of a linearized network whose head is a ridge regression."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from bilevel.data._seeding import mixed
from bilevel.hypergradients._base import Certificate, Estimate
from bilevel.layout import Layout
from bilevel.linear import LinearSolver, Operator
from bilevel.optimizers import Adam, Optimizer
from bilevel.oracles import Linearization, Oracles
from bilevel.problem import Problem
from bilevel.problems.distillation.adabelief import AdaBelief
from bilevel.problems.distillation.networks import Network, Parameters
from bilevel.problems.distillation.pool import Member, Pool
from bilevel.problems.distillation.rates import Rate, RateControl, adam_on_quadratic
from bilevel.problems.distillation.ridge_head import ridge_head
from bilevel.problems.distillation.synthetic import balanced_targets
from bilevel.regularizers import L2
from bilevel.solution import Solution
from bilevel.solvers._base import Metrics, Solver, check_upper
from bilevel.status import InvalidProblem, NonFinite, Status


class RCIGState(NamedTuple):
    """Where the descent stands.

    Args:
        x: upper variables `[p]`.
        y: weights of the network that the last step used.
        step: upper steps made.
        upper: states of the optimizers of x and of its temperature.
        pool: the networks.
        average: running mean of x, to evaluate.
        rates: learning rates of the inner solve and of the linear system.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    upper: tuple[Any, Any]
    pool: tuple[Member, ...]
    average: Tensor
    rates: tuple[Rate, Rate]
    metrics: Metrics | None


@dataclass(frozen=True)
class RCIG(Solver[RCIGState]):
    """Distil by implicit gradients where they are cheap: on a network linearized in its body, with a closed-form head.

    With weights w of one network of the pool, features F of its body and the head's weight V, for a direction d:

        out(x) = (dF/dw d) V^T,   alpha = (F_s F_s^T + l2 I)^-1 (targets - out_s),   pred(x) = out(x) + F(x) F_s^T alpha
        g(x, d) = [‖targets - pred_s‖^2 + l2 (‖F_s^T alpha‖^2 + ‖d‖^2)] / (2 n C)
        f(x, d) = cross-entropy of exp(log_temperature) pred on real images - mean min(top - second target, 1 / (2 C))
        h = df/dx - J^T v,   H v = df/dd   (each leaf of the implicit part no longer than that of the direct part)

    g is a quadratic in d, so H does not depend on d, and the implicit function theorem holds. Then that network is
    trained a little on x, or replaced if it is old.

    Args:
        network: the architecture, with weights in its body; the problem has loss "mse", learned targets and
            temperature in the paper.
        l2: > 0, a synthetic image; 5e-4 in the paper, 5e-2 for deep networks.
        lower_steps: Adam steps for d, from 0.
        linear_steps: Adam steps for v.
        linear: solves both systems instead of Adam: `CG(max_steps=20)` gets farther with as many products. Not in the
            paper.
        rates: how Adam's two learning rates are found.
        clip: whether the implicit part is clipped, leaf by leaf, to the norm of the direct part.
        flip: whether every image also stands in its mirror image, as in the paper for photographs.
        subset: synthetic images, drawn anew each step, that x's gradient is taken for; the others are constants then.
            For large sets. All if None.
        pool: how networks live.
        upper: optimizer of images and targets.
        temperature: optimizer of the temperature.
        average: in [0, 1), of the running mean of x; in its first steps t at most (1 + t) / (10 + t).
        seed: of the subsets.

    Raises:
        InvalidProblem: an option is out of its range.

    Cost:
        Per step: `lower_steps + linear_steps` products with H on the synthetic images, two graphs of the gradient of g,
        one gradient of f, and the pool's training steps.

    References:
        Loo, Hasani, Lechner, Rus, "Dataset distillation with convexified implicit gradients", ICML 2023, arXiv
        2302.06755.

    Example:
        >>> import bilevel
        >>> from bilevel.problems import distillation as dd
        >>> train = bilevel.problems.Part(torch.tensor([[[[-1.0]]], [[[1.0]]]]), torch.tensor([0, 1]))
        >>> network = dd.mlp(8, shape=(1, 1, 1), classes=2)
        >>> task = dd.distillation(train, network, loss="mse", learn_temperature=True, batch_size=None)
        >>> solver = RCIG(network, linear=bilevel.CG(), upper=bilevel.Adam(0.01), pool=dd.Pool(1))
        >>> solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=20)
        >>> before, after = (solution.history["upper_value"][k] for k in (0, -1))
        >>> (after < before, len(task.synthetic(RCIG.averaged(solution)).images))
        (True, 2)
    """

    needs_hvp: ClassVar[bool] = True

    network: Network
    l2: float = 5e-4
    lower_steps: int = 20
    linear_steps: int = 20
    linear: LinearSolver | None = None
    rates: RateControl = field(default_factory=RateControl)
    clip: bool = True
    flip: bool = False
    subset: int | None = None
    pool: Pool = field(default_factory=lambda: Pool(30, (1, 15), 100, Adam(lr=5e-5)))
    upper: Optimizer[Any] = field(default_factory=lambda: AdaBelief(3e-3))
    temperature: Optimizer[Any] = field(default_factory=lambda: AdaBelief(3e-2))
    average: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        check_upper(self.upper)
        check_upper(self.temperature)
        if not any(name.startswith("body.") for name in self.network.start(0)):
            raise InvalidProblem("RCIG linearizes the network's body, and this one has no weights: use FRePo.")
        if not self.l2 > 0 or min(self.lower_steps, self.linear_steps, 1 if self.subset is None else self.subset) < 1:
            raise InvalidProblem(
                f"RCIG: l2 must be > 0, and lower_steps, linear_steps and subset at least 1, got {self.l2}, "
                f"{self.lower_steps}, {self.linear_steps} and {self.subset}."
            )
        if not 0 <= self.average < 1:
            raise InvalidProblem(f"RCIG(average=...) must be in [0, 1), got {self.average}.")

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> RCIGState:
        """Return the state before the first step; tunes the learning rates of Adam.

        Raises:
            InvalidProblem: the problem has a part that this would ignore.
        """
        self.refuse(oracles.problem)
        pool = self.pool.init(oracles, self.network, x.dtype)
        upper = (self.upper.init(x), self.temperature.init(x))
        return RCIGState(x, y, 0, upper, pool, x, self._tuned(oracles, x, pool[0].y), None)

    def step(self, oracles: Oracles, state: RCIGState) -> RCIGState:
        """Return the state after one upper step and some training of one network.

        Raises:
            NonFinite: the direct part of the gradient is not finite.
        """
        place = self.pool.draw(state.step)
        member = state.pool[place]
        estimate, rates = self.estimate(oracles, state.x, member.y, state.rates, state.step)
        x, upper = self._moved(oracles, state, estimate.gradient)
        keep = min(self.average, (1 + state.step) / (10 + state.step)) if self.average > 0 else 0.0
        return RCIGState(
            x=x,
            y=member.y,
            step=state.step + 1,
            upper=upper,
            pool=self.pool.advanced(oracles, self.network, state.pool, place, x, state.step),
            average=keep * state.average + (1 - keep) * x,
            rates=rates,
            metrics=Metrics.of(oracles, state.x, estimate),
        )

    def estimate(
        self, oracles: Oracles, x: Tensor, y: Tensor, rates: tuple[Rate, Rate], upper_step: int = 0
    ) -> tuple[Estimate, tuple[Rate, Rate]]:
        """Return the hypergradient at a network's weights y, and the learning rates after it.

        Raises:
            NonFinite: the direct part of the gradient is not finite.
        """
        before, inner = oracles.counts, self.opened(oracles, y, upper_step)
        zero = x.new_zeros(inner.y_layout.size)
        first = inner.linearize_lower(x, zero)
        d, inner_rate, _, _ = self._solved(first, -first.gradient, rates[0], self.lower_steps)
        upper = inner.upper_gradient(x, d, upper_step)
        if not bool(upper.x.isfinite().all()):
            raise NonFinite(f"the direct part of the gradient is not finite at upper step {upper_step}.")
        last = inner.linearize_lower(x, d)
        v, linear_rate, residual, status = self._solved(last, upper.y, rates[1], self.linear_steps)
        implicit = -last.cross(v).nan_to_num(0.0, 0.0, 0.0)
        gradient = upper.x + (clipped(oracles.x_layout, implicit, upper.x) if self.clip else implicit)
        spent = inner.counts
        oracles.count(gradients=spent.gradients, hvps=spent.hvps, crosses=spent.crosses)
        certificate = Certificate(
            status, residual, last.gradient.norm(), None, None, None, None, oracles.counts - before
        )
        return Estimate(gradient, upper.value, last.value, y, certificate), (inner_rate, linear_rate)

    def opened(self, oracles: Oracles, y: Tensor, upper_step: int = 0) -> Oracles:
        """Return the oracles of the linearized problem, whose lower variables are the direction d."""
        weights: Parameters = oracles.y_layout.unflatten(y)
        body = {name: value for name, value in weights.items() if name.startswith("body.")}
        problem = self.linearized_problem(oracles.problem, weights, upper_step)
        return Oracles(problem, oracles.x_layout, Layout.of(body, name="d"), seed=oracles.seed)

    def linearized_problem(self, problem: Problem, weights: Parameters, upper_step: int = 0) -> Problem:
        """Return the problem of the network linearized at some weights; its lower level is a quadratic in d."""
        network, classes, head = self.network, self.network.classes, weights["head.weight"]

        def fitted(x: dict[str, Tensor], d: Parameters) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Return features, outputs, targets and alpha on the synthetic images."""
            images, targets = self._shown(x, upper_step)
            features, along = network.linearized(weights, d, images)
            out = along @ head.T
            return features, out, targets, ridge_head(features, targets - out, self.l2 * len(images))

        def lower(x: dict[str, Tensor], d: Parameters, batch: None) -> Tensor:
            features, out, targets, alpha = fitted(x, d)
            weight = features.T @ alpha
            misfit = (targets - out - features @ weight).square().sum()
            return 0.5 * (misfit + self.l2 * len(features) * weight.square().sum()) / targets.numel()

        def upper(x: dict[str, Tensor], d: Parameters, batch: tuple[Tensor, Tensor]) -> Tensor:
            features, _, _, alpha = fitted(x, d)
            real, along = network.linearized(weights, d, batch[0])
            found = along @ head.T + real @ (features.T @ alpha)
            if "log_temperature" in x:
                found = found * x["log_temperature"].exp()
            return F.cross_entropy(found, batch[1]) - margin(x.get("targets"), classes)

        # l2 n / (n C) = l2 / C, however many images there are.
        return Problem(
            upper=upper, lower=lower, upper_data=problem.upper_data, upper_set=problem.upper_set,
            regularizer=L2(self.l2 / classes),
        )  # fmt: skip

    @staticmethod
    def averaged(solution: Solution) -> Any:
        """Return the running mean of x at the end of a solve, structured like x."""
        return Layout.of(solution.x, name="x").unflatten(solution.state.average)

    def backtracked(self, factor: float) -> RCIG:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor), temperature=self.temperature.scaled(factor))

    def _solved(self, lower: Linearization, b: Tensor, rate: Rate, steps: int) -> tuple[Tensor, Rate, Tensor, Status]:
        """Return the solution of H v = b, the next rate, the relative residual, and how it ended."""
        if self.linear is not None:
            solution = self.linear.solve(Operator(lower.hvp, diagonal=lower.diagonal), b)
            return solution.value, rate, solution.residual.max(), solution.status
        found = adam_on_quadratic(lower.hvp, b, rate.lr, steps)
        residual = (b - found.product).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny)
        status = Status.APPROXIMATE if bool(residual.isfinite()) else Status.NON_FINITE
        return found.value, self.rates.followed(rate, rose=found.rose), residual, status

    def _tuned(self, oracles: Oracles, x: Tensor, y: Tensor) -> tuple[Rate, Rate]:
        if self.linear is not None:
            return Rate(self.rates.start), Rate(self.rates.start)
        inner = self.opened(oracles, y)
        lower = inner.linearize_lower(x, x.new_zeros(inner.y_layout.size))
        first = self.rates.tuned(
            lambda lr: not adam_on_quadratic(lower.hvp, -lower.gradient, lr, self.lower_steps).rose
        )
        d = adam_on_quadratic(lower.hvp, -lower.gradient, first.lr, self.lower_steps).value
        b = inner.upper_gradient(x, d).y
        return first, self.rates.tuned(lambda lr: not adam_on_quadratic(lower.hvp, b, lr, self.linear_steps).rose)

    def _shown(self, x: dict[str, Tensor], upper_step: int) -> tuple[Tensor, Tensor]:
        """Return images and targets, those outside the step's subset detached, with mirror images if asked for."""
        images = x["images"]
        targets = x["targets"] if "targets" in x else balanced_targets(images, self.network.classes)
        if self.subset is not None and self.subset < len(images):
            generator = Generator().manual_seed(mixed("subset", self.seed, upper_step))
            order = torch.randperm(len(images), generator=generator)
            live, rest = order[: self.subset], order[self.subset :]
            images = torch.cat([images[live], images[rest].detach()])
            targets = torch.cat([targets[live], targets[rest].detach()])
        return (torch.cat([images, images.flip(-1)]), torch.cat([targets, targets])) if self.flip else (images, targets)

    def _moved(self, oracles: Oracles, state: RCIGState, gradient: Tensor) -> tuple[Tensor, tuple[Any, Any]]:
        nested = oracles.x_layout.unflatten(state.x)
        x, upper = self.upper.update(state.x, gradient, state.upper[0], nested)
        other, temperature = self.temperature.update(state.x, gradient, state.upper[1], nested)
        views = zip(oracles.x_layout.names, oracles.x_layout.views(x), oracles.x_layout.views(other), strict=True)
        leaves = [b if name == "log_temperature" else a for name, a, b in views]
        return oracles.project_x(oracles.x_layout.concat(leaves)), (upper, temperature)


def clipped(layout: Layout, implicit: Tensor, direct: Tensor) -> Tensor:
    """Return the implicit part with each leaf scaled down to the norm of the direct part's leaf, `[p]`."""
    leaves = []
    for leaf, bound in zip(layout.views(implicit), layout.views(direct), strict=True):
        size = leaf.norm()
        leaves.append(leaf * (bound.norm() / size.clamp_min(torch.finfo(leaf.dtype).tiny)).clamp(max=1.0))
    return layout.concat(leaves)


def margin(targets: Tensor | None, classes: int) -> Tensor | float:
    """Return the mean of min(largest - second target, 1 / (2 C)), which keeps learned targets decided."""
    if targets is None:
        return 0.0
    top = targets.topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]).clamp(max=1 / (2 * classes)).mean()
