"""A learning rate that descends its own hypergradient, one step at a time."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel.optimizers._base import Hyperparameter, Optimizer
from bilevel.optimizers._hyperparameters import check, check_flag, is_number
from bilevel.status import InvalidProblem


class OnlineRateState(NamedTuple):
    """Steps made, the rate, the direction of the last step (that of rate 1), and the state of the base."""

    step: int
    lr: Tensor
    direction: Tensor
    base: Any


@final
@dataclass(frozen=True)
class OnlineRate(Optimizer[OnlineRateState]):
    """Descend the learning rate of an optimizer online, along the hypergradient of one step.

        lr = lr - beta <gradient at y, d>,    y = y + lr' d',    d: the step that rate 1 would have taken before

    `<gradient, d>` is the derivative in the rate of the objective after the last step: with beta 0 it is the base. The
    rate never falls below 0. With `relative` the step of the rate is `beta lr cos(gradient, d)`, whatever the scale.

    Args:
        base: SGD, Adam, AdamW; its own rate is not used.
        lr: initial rate > 0, a number.
        beta: >= 0, the rate of the rate. In units of lr² / objective, so about 1e-4 for SGD and 1e-7 for Adam; with
            `relative` a pure number such as 0.02.
        relative: scale-free steps.

    Raises:
        InvalidProblem: an option is out of range.

    Cost:
        One vector more than the base.

    Notes:
        It looks one step ahead, and favors small rates where objectives are noisy or ill-conditioned.

    References:
        Baydin, Cornish, Martinez Rubio, Schmidt, Wood, "Online learning rate adaptation with hypergradient descent",
        ICLR 2018 (Algorithms 4 and 6).

    Example:
        >>> from bilevel.optimizers import SGD
        >>> optimizer = OnlineRate(SGD(None), lr=0.1, beta=0.1)
        >>> y = torch.tensor([1.0])
        >>> state = optimizer.init(y)
        >>> for _ in range(2):
        ...     y, state = optimizer.update(y, y, state)  # the gradient of y² / 2
        >>> state.lr  # 0.1 + 0.1 * 0.9 * 1.0
        tensor(0.1900)
    """

    base: Optimizer[Any]
    lr: float = 0.01
    _: KW_ONLY
    beta: float = 1e-4
    relative: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.base, Optimizer):
            raise InvalidProblem(f"OnlineRate(base=...) must be an Optimizer such as SGD(0.1), got {self.base!r}.")
        if not is_number(self.lr) or not 0 < self.lr < math.inf:
            raise InvalidProblem(f"OnlineRate(lr={self.lr!r}) must be a number > 0.")
        if not is_number(self.beta):
            raise InvalidProblem(f"OnlineRate(beta={self.beta!r}) must be a number >= 0.")
        check("beta", self.beta, 0.0, math.inf)
        check_flag("relative", self.relative)

    def init(self, y: Tensor) -> OnlineRateState:
        """Return step 0, the initial rate and no direction."""
        return OnlineRateState(0, y.new_full((), self.lr), torch.zeros_like(y), self.base.init(y))

    def update(
        self, y: Tensor, gradient: Tensor, state: OnlineRateState, x: Any = None
    ) -> tuple[Tensor, OnlineRateState]:
        """Return the next y and state; the rate moves first."""
        slope = (gradient * state.direction).sum()
        if self.relative:
            size = gradient.detach().norm() * state.direction.detach().norm()
            slope = state.lr * slope / size.clamp_min(torch.finfo(y.dtype).tiny)
        lr = (state.lr - self.beta * slope).clamp_min(0.0)
        ahead, base = self.base.with_lr(1.0).update(y, gradient, state.base, x)
        direction = ahead - y
        return y + lr * direction, OnlineRateState(state.step + 1, lr, direction, base)

    def with_lr(self, lr: Hyperparameter) -> OnlineRate:
        """Return this optimizer with another initial rate."""
        if not is_number(lr):
            raise InvalidProblem("OnlineRate takes a number as its initial rate.")
        return replace(self, lr=lr)  # type: ignore[arg-type]

    def scaled(self, factor: float) -> OnlineRate:
        """Return this optimizer with its initial rate multiplied by `factor` > 0."""
        return replace(self, lr=self.lr * factor)

    def sensitivity(self, gradient: Tensor, state: OnlineRateState, x: Any = None, y: Tensor | None = None) -> Tensor:
        """Return that of the base at the current rate; how the rate itself depends on the gradient is left out."""
        return state.lr * self.base.with_lr(1.0).sensitivity(gradient, state.base, x, y)
