"""Quasi-Newton steps by gradients alone, within lengths that signs of the gradient allow."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel.integrations.sklearn._rprop import Rprop, RpropState
from bilevel.optimizers import Optimizer
from bilevel.optimizers._base import Hyperparameter

DAMPED = 0.2
"""Least curvature along a step, as a fraction of what was expected."""


class SecantState(NamedTuple):
    """Where it stands.

    Args:
        step: updates made.
        lengths: state of Rprop, which bounds the steps.
        inverse: of the Hessian as known so far, `[d, d]`.
        last: y and gradient of the last update, None before the first.
    """

    step: int
    lengths: RpropState
    inverse: Tensor
    last: tuple[Tensor, Tensor] | None


@final
@dataclass(frozen=True)
class Secant(Optimizer[SecantState]):
    """Damped BFGS without a line search: a step is shortened until no entry moves by more than twice Rprop's length.

    It goes along valleys that lie across the axes (a decay and a kernel width), where Rprop goes from side to side.

    Args:
        bound: the lengths.

    References:
        Nocedal, Wright, "Numerical optimization", 2006: the damping of procedure 18.2, on the inverse.

    Example:
        >>> secant, y = Secant(), torch.tensor([3.0, 1.0])
        >>> state = secant.init(y)
        >>> for _ in range(40):
        ...     y, state = secant.update(y, torch.tensor([[1.0, 0.9], [0.9, 1.0]]) @ y, state)
        >>> bool(y.norm() < 1e-3)
        True
    """

    bound: Rprop = field(default_factory=Rprop)

    def init(self, y: Tensor) -> SecantState:
        """Return the state before the first step."""
        return SecantState(0, self.bound.init(y), torch.eye(len(y), dtype=y.dtype, device=y.device), None)

    def update(self, y: Tensor, gradient: Tensor, state: SecantState, x: Any = None) -> tuple[Tensor, SecantState]:
        """Return the next y and state; the first step is Rprop's."""
        moved, lengths = self.bound.update(y, gradient, state.lengths)
        inverse = state.inverse
        if state.last is not None:
            inverse = _updated(inverse, y - state.last[0], gradient - state.last[1], first=state.step == 1)
            direction = inverse @ gradient
            if not bool(direction @ gradient > 0):  # rounding has spoiled the inverse: begin anew
                return moved, SecantState(1, lengths, torch.eye(len(y), dtype=y.dtype), (y, gradient))
            moved = y - direction / (direction.abs() / (2 * lengths.length)).max().clamp_min(1.0)
        return moved, SecantState(state.step + 1, lengths, inverse, (y, gradient))

    def with_lr(self, lr: Hyperparameter) -> Secant:
        """Return this optimizer with another first length."""
        return replace(self, bound=self.bound.with_lr(lr))

    def scaled(self, factor: float) -> Secant:
        """Return this optimizer with its lengths multiplied."""
        return replace(self, bound=self.bound.scaled(factor))

    def sensitivity(self, gradient: Tensor, state: SecantState, x: Any = None, y: Tensor | None = None) -> Tensor:
        """Return the diagonal of the inverse."""
        return state.inverse.diagonal()


def _updated(B: Tensor, s: Tensor, z: Tensor, *, first: bool) -> Tensor:
    """Return the inverse Hessian after a change s of y and z of the gradient."""
    tiny = torch.finfo(s.dtype).tiny
    if first:
        B = B * s.norm() / z.norm().clamp_min(tiny)
    expected = z @ B @ z
    if bool(s @ z < DAMPED * expected):
        share = (1 - DAMPED) * expected / (expected - s @ z)
        s = share * s + (1 - share) * (B @ z)
    if not bool(s @ z > tiny):
        return B
    along = torch.eye(len(s), dtype=s.dtype, device=s.device) - torch.outer(s, z) / (s @ z)
    return along @ B @ along.T + torch.outer(s, s) / (s @ z)
