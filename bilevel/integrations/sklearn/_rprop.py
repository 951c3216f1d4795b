"""Steps by the signs of a gradient, with a length of its own for each entry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel.optimizers import Optimizer
from bilevel.optimizers._base import Hyperparameter


class RpropState(NamedTuple):
    """Where Rprop stands.

    Args:
        step: updates made.
        length: of the last step of each entry, shaped like y.
        sign: of the last gradient.
    """

    step: int
    length: Tensor
    sign: Tensor


@final
@dataclass(frozen=True)
class Rprop(Optimizer[RpropState]):
    """Move each entry by a length of its own: longer while its slope keeps its sign, shorter where that changes.

    Hypergradients in log-penalties differ by orders of magnitude between features, and vanish where a penalty no longer
    matters; their signs stay right. Around a minimum the lengths shrink as a bisection's, at a kink as well.

    Args:
        lr: first length, > 0.
        grow: factor after two gradients of one sign, > 1.
        shrink: factor after a change of sign, between 0 and 1.
        longest: > 0.

    References:
        Riedmiller, Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm", ICNN
        1993; here without going back after a change of sign.

    Example:
        >>> rprop, y = Rprop(), torch.zeros(2)
        >>> y, state = rprop.update(y, torch.tensor([1e-9, -3.0]), rprop.init(y))
        >>> rprop.update(y, torch.tensor([1e-9, 2.0]), state)[0]
        tensor([-1.2500,  0.2500])
    """

    lr: float = 0.5
    grow: float = 1.5
    shrink: float = 0.5
    longest: float = 2.0

    def init(self, y: Tensor) -> RpropState:
        """Return the state before the first step."""
        return RpropState(0, torch.full_like(y, self.lr), torch.zeros_like(y))

    def update(self, y: Tensor, gradient: Tensor, state: RpropState, x: Any = None) -> tuple[Tensor, RpropState]:
        """Return the next y and state; only signs of the gradient count."""
        sign = gradient.sign()
        agreement = sign * state.sign
        factor = torch.where(agreement > 0, self.grow, torch.where(agreement < 0, self.shrink, 1.0)).to(y)
        length = (state.length * factor).clamp_max(self.longest)
        return y - length * sign, RpropState(state.step + 1, length, sign)

    def with_lr(self, lr: Hyperparameter) -> Rprop:
        """Return this optimizer with another first length."""
        assert isinstance(lr, float)
        return replace(self, lr=lr)

    def scaled(self, factor: float) -> Rprop:
        """Return this optimizer with its lengths multiplied."""
        return replace(self, lr=self.lr * factor, longest=self.longest * factor)

    def sensitivity(self, gradient: Tensor, state: RpropState, x: Any = None, y: Tensor | None = None) -> Tensor:
        """Return 0: the step does not change with the size of the gradient."""
        return torch.zeros_like(gradient)
