"""AdaBelief: Adam whose step is divided by how far gradients are from their running mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel.optimizers._base import Hyperparameter, Optimizer
from bilevel.optimizers._hyperparameters import check, resolve, scale


class BeliefState(NamedTuple):
    """Steps made, and running means of the gradient and of its squared distance to that mean."""

    step: int
    mean: Tensor
    deviation: Tensor


@final
@dataclass(frozen=True)
class AdaBelief(Optimizer[BeliefState]):
    """Step along the mean gradient, far where gradients agree and little where they do not.

        m = beta1 m + (1 - beta1) g;   s = beta2 s + (1 - beta2) (g - m)^2 + eps
        y = y - lr (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + eps)

    Args:
        lr: >= 0: a number, a tensor that broadcasts against y, or a function of `(x, step)`.
        betas: decay rates, each in [0, 1).
        eps: > 0, in units of the squared gradient and, under the root, of the gradient.

    Raises:
        InvalidProblem: an option is out of its range.

    Cost:
        Two vectors the size of y as state.

    References:
        Zhuang et al., "AdaBelief optimizer", NeurIPS 2020, Algorithm 2.

    Example:
        >>> optimizer = AdaBelief(0.1)
        >>> y = torch.tensor([1.0, -2.0])
        >>> optimizer.update(y, y, optimizer.init(y))[0]
        tensor([ 0.8889, -1.8889])
    """

    lr: Hyperparameter = 3e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16

    def __post_init__(self) -> None:
        check("lr", self.lr, 0.0, float("inf"))
        check("betas[0]", self.betas[0], 0.0, 1.0, open_high=True)
        check("betas[1]", self.betas[1], 0.0, 1.0, open_high=True)
        check("eps", self.eps, 1e-300, float("inf"))

    def init(self, y: Tensor) -> BeliefState:
        """Return step 0 and means of zero."""
        return BeliefState(0, torch.zeros_like(y), torch.zeros_like(y))

    def update(self, y: Tensor, gradient: Tensor, state: BeliefState, x: Any = None) -> tuple[Tensor, BeliefState]:
        """Return the next y and state; see the class for the formula."""
        step, (beta1, beta2) = state.step + 1, self.betas
        mean = beta1 * state.mean + (1 - beta1) * gradient
        deviation = beta2 * state.deviation + (1 - beta2) * (gradient - mean).square() + self.eps
        radius = (deviation / (1 - beta2**step)).sqrt() + self.eps
        lr = resolve("lr", self.lr, x, state.step, y)
        return y - lr * (mean / (1 - beta1**step)) / radius, BeliefState(step, mean, deviation)

    def with_lr(self, lr: Hyperparameter) -> AdaBelief:
        """Return this optimizer with the step length `lr`."""
        return replace(self, lr=lr)

    def scaled(self, factor: float) -> AdaBelief:
        """Return this optimizer with its step length multiplied by `factor` >= 0."""
        return replace(self, lr=scale(self.lr, factor))

    def sensitivity(self, gradient: Tensor, state: BeliefState, x: Any = None, y: Tensor | None = None) -> Tensor:
        """Return -d(update)/d(gradient), elementwise, by differentiating the update."""
        with torch.enable_grad():
            g = gradient.detach().requires_grad_()
            after, _ = self.update(torch.zeros_like(g), g, state, x)
            (slope,) = torch.autograd.grad(after.sum(), g)
        return -slope
