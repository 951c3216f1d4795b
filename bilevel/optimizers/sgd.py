"""Stochastic gradient descent with momentum: the values of `torch.optim.SGD`, and its true derivative."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel.optimizers._base import Hyperparameter, Linearized, Optimizer, Pulled
from bilevel.optimizers._hyperparameters import check, check_flag, is_zero, plus, resolve, scale
from bilevel.status import InvalidProblem


class SGDState(NamedTuple):
    """Steps made, and the momentum buffer: shaped like y, or of size 0 where momentum is the number 0."""

    step: int
    buffer: Tensor


@final
@dataclass(frozen=True)
class SGD(Optimizer[SGDState]):
    """Gradient descent with momentum.

        h = ±gradient + weight_decay y          (minus if `maximize`)
        b = h at the first step, afterwards momentum b + (1 - dampening) h
        y = y - lr (h + momentum b if `nesterov`, else b)

    The first buffer is h itself, undamped, as in `torch.optim.SGD`; unlike there, its derivative is kept. Every
    hyperparameter but the flags is a number, a tensor that broadcasts against y, or a function of `(x, step)`.

    Args:
        lr: step length >= 0, in units of 1 / curvature; the iteration is stable below 2 / (largest curvature) without
            momentum. None leaves it to the solver, which supplies 1 / (largest curvature of the lower objective).
        momentum: in [0, 1]; the number 0 keeps no buffer.
        dampening: in [0, 1].
        nesterov: look ahead along the buffer; needs momentum, without dampening.
        weight_decay: >= 0, the weight of ‖y‖²/2 added to the objective.
        maximize: step along the gradient instead of against it.

    Raises:
        InvalidProblem: an option is out of its range, of a wrong type, or contradicts another.

    Cost:
        One vector the size of y as state with momentum, none without.

    References:
        Polyak (1964); Sutskever, Martens, Dahl, Hinton (2013), "On the importance of initialization and momentum in
        deep learning", for the Nesterov form.

    Example:
        >>> optimizer = SGD(0.1, momentum=0.9)
        >>> y = torch.tensor([1.0, -2.0])
        >>> y, state = optimizer.update(y, gradient=y, state=optimizer.init(y))
        >>> y, state.step
        (tensor([ 0.9000, -1.8000]), 1)
    """

    lr: Hyperparameter | None
    momentum: Hyperparameter = 0.0
    _: KW_ONLY
    dampening: Hyperparameter = 0.0
    nesterov: bool = False
    weight_decay: Hyperparameter = 0.0
    maximize: bool = False

    def __post_init__(self) -> None:
        if self.lr is not None:
            check("lr", self.lr, 0.0, math.inf)
        check("momentum", self.momentum, 0.0, 1.0)
        check("dampening", self.dampening, 0.0, 1.0)
        check("weight_decay", self.weight_decay, 0.0, math.inf)
        check_flag("nesterov", self.nesterov)
        check_flag("maximize", self.maximize)
        if self.nesterov and (is_zero(self.momentum) or not is_zero(self.dampening)):
            raise InvalidProblem("nesterov=True needs momentum above 0 and dampening=0")

    @property
    def needs_lr(self) -> bool:
        """Whether `lr` is None."""
        return self.lr is None

    def init(self, y: Tensor) -> SGDState:
        """Return step 0 and a buffer of zeros."""
        return SGDState(0, y.new_zeros(0) if is_zero(self.momentum) else torch.zeros_like(y))

    def update(self, y: Tensor, gradient: Tensor, state: SGDState, x: Any = None) -> tuple[Tensor, SGDState]:
        """Return the next y and state; see the class for the formula."""
        lr, momentum, decay = self._factors(y, state, x)
        direction, buffer = self._direction(y, gradient, state, x, momentum, decay)
        return plus(y, lr, direction, -1), SGDState(state.step + 1, buffer)

    def linearized(self, y: Tensor, gradient: Tensor, state: SGDState, x: Any = None) -> Linearized | None:
        """Return the update with its derivative by formula; None with dampening, or with a rate for each entry."""
        with torch.enable_grad():
            factors = self._factors(y, state, x)
        if not is_zero(self.dampening) or any(isinstance(factor, Tensor) and factor.dim() > 0 for factor in factors):
            return None
        lr, momentum, decay = (f.detach() if isinstance(f, Tensor) else f for f in factors)
        with torch.no_grad():
            direction, buffer = self._direction(y, gradient, state, x, momentum, decay)
            after = plus(y, lr, direction, -1)
        learned = [f for f in factors if isinstance(f, Tensor) and f.requires_grad]
        wanted = [isinstance(f, Tensor) and f.requires_grad for f in factors]
        # What `pull` names it keeps alive.
        decayed = y if wanted[2] else None

        def pull(a: Tensor, buffers: tuple[Tensor, ...]) -> Pulled:
            # c: cotangent of the buffer; h: of the gradient with its decay; -lr a: of the direction.
            slopes = [-_dot(a, direction)] if wanted[0] else []
            if is_zero(self.momentum):
                h, before = a * -lr, buffers[0]
            else:
                c = plus(buffers[0], lr * momentum if self.nesterov else lr, a, -1)
                h = plus(c, lr, a, -1) if self.nesterov else c
                before = c * momentum if state.step > 0 else torch.zeros_like(c)
                if wanted[1]:
                    slope = _dot(c, state.buffer) if state.step > 0 else a.new_zeros(())
                    slopes.append(slope - lr * _dot(a, buffer) if self.nesterov else slope)
            if decayed is not None:
                slopes.append(_dot(h, decayed))
            in_y = a if is_zero(self.weight_decay) else plus(a, decay, h)
            return Pulled(in_y, -h if self.maximize else h, (before,), tuple(slopes))

        return Linearized(after, SGDState(state.step + 1, buffer), tuple(learned), pull)

    def _factors(self, y: Tensor, state: SGDState, x: Any) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
        lr = resolve("lr", self._rate(), x, state.step, y)
        momentum = 0.0 if is_zero(self.momentum) else resolve("momentum", self.momentum, x, state.step, y)
        decay = 0.0 if is_zero(self.weight_decay) else resolve("weight_decay", self.weight_decay, x, state.step, y)
        return lr, momentum, decay

    def _direction(
        self, y: Tensor, gradient: Tensor, state: SGDState, x: Any, momentum: float | Tensor, decay: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the direction of the step, and the next buffer."""
        h = -gradient if self.maximize else gradient
        if not is_zero(self.weight_decay):
            h = plus(h, decay, y)
        if is_zero(self.momentum):
            return h, state.buffer
        buffer = plus(self._damped(h, state.step, x, y), momentum, state.buffer) if state.step > 0 else h
        return (plus(h, momentum, buffer) if self.nesterov else buffer), buffer

    def _damped(self, direction: Tensor, step: int, x: Any, y: Tensor) -> Tensor:
        if is_zero(self.dampening):
            return direction
        return (1 - resolve("dampening", self.dampening, x, step, y)) * direction

    def with_lr(self, lr: Hyperparameter) -> SGD:
        """Return this optimizer with the step length `lr`."""
        return replace(self, lr=lr)

    def scaled(self, factor: float) -> SGD:
        """Return this optimizer with its step length multiplied by `factor` >= 0."""
        return replace(self, lr=scale(self._rate(), factor))

    def sensitivity(self, gradient: Tensor, state: SGDState, x: Any = None, y: Tensor | None = None) -> Tensor:
        """Return -d(update)/d(gradient), which does not depend on the gradient.

        It is lr without momentum, lr (1 - dampening) with it (lr at the first step), lr (1 + momentum) with Nesterov;
        negative if `maximize`.
        """
        factor = resolve("lr", self._rate(), x, state.step, gradient)
        if self.nesterov:
            factor = factor * (1 + resolve("momentum", self.momentum, x, state.step, gradient))
        elif state.step > 0 and not is_zero(self.momentum):
            factor = factor * (1 - resolve("dampening", self.dampening, x, state.step, gradient))
        return torch.full_like(gradient, -1.0 if self.maximize else 1.0) * factor

    def _rate(self) -> Hyperparameter:
        if self.lr is None:
            raise InvalidProblem(
                "SGD(lr=None) takes its step length, 1 / (largest curvature of the lower objective), from a solver "
                "that measures it; here none was supplied: give lr, or call with_lr"
            )
        return self.lr


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))
