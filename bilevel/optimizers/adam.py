"""Adam and AdamW: the values of `torch.optim`, with a derivative that is finite at a zero gradient."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor

from bilevel.optimizers._base import Hyperparameter, Optimizer
from bilevel.optimizers._hyperparameters import check, check_flag, is_zero, resolve, root, scale
from bilevel.status import InvalidProblem


class AdamState(NamedTuple):
    """Steps made, running means of the gradient and of its square, and the largest of the latter.

    All are shaped like y; `largest` has size 0 without `amsgrad`.
    """

    step: int
    mean: Tensor
    square: Tensor
    largest: Tensor


class _Moments(NamedTuple):
    """What one gradient makes of the state; the update is lr mean_weight mean / (radius + eps)."""

    state: AdamState
    mean_weight: float | Tensor
    radius: Tensor


@dataclass(frozen=True)
class _Adaptive(Optimizer[AdamState]):
    """What Adam and AdamW share: everything but where weight decay enters."""

    lr: Hyperparameter = 1e-3
    _: KW_ONLY
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: Hyperparameter = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        check("lr", self.lr, 0.0, math.inf)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise InvalidProblem(f"betas={self.betas!r} must be a tuple of two")
        check("betas[0]", self.betas[0], 0.0, 1.0, open_high=True)
        check("betas[1]", self.betas[1], 0.0, 1.0, open_high=True)
        check("weight_decay", self.weight_decay, 0.0, math.inf)
        for name, value in (("eps", self.eps), ("eps_root", self.eps_root)):
            if isinstance(value, Tensor) or callable(value):
                raise InvalidProblem(f"{name} must be a number")
            check(name, value, 0.0, math.inf)
        check_flag("amsgrad", self.amsgrad)
        check_flag("maximize", self.maximize)

    def init(self, y: Tensor) -> AdamState:
        """Return step 0 and means of zero."""
        zeros = torch.zeros_like(y)
        return AdamState(0, zeros, zeros, zeros if self.amsgrad else y.new_zeros(0))

    def with_lr(self, lr: Hyperparameter) -> Self:
        """Return this optimizer with the step length `lr`."""
        return replace(self, lr=lr)

    def scaled(self, factor: float) -> Self:
        """Return this optimizer with its step length multiplied by `factor` >= 0."""
        return replace(self, lr=scale(self.lr, factor))

    def _decays(self, x: Any, step: int, y: Tensor) -> tuple[float | Tensor, float | Tensor]:
        return (
            resolve("betas[0]", self.betas[0], x, step, y),
            resolve("betas[1]", self.betas[1], x, step, y),
        )

    def _moments(self, gradient: Tensor, state: AdamState, x: Any) -> _Moments:
        beta1, beta2 = self._decays(x, state.step, gradient)
        step = state.step + 1
        mean = beta1 * state.mean + (1 - beta1) * gradient
        square = beta2 * state.square + (1 - beta2) * gradient * gradient
        largest = torch.maximum(state.largest, square) if self.amsgrad else state.largest
        used = largest if self.amsgrad else square
        correction = 1 - beta2**step
        radius = root(used / correction + self.eps_root) if self.eps_root > 0 else root(used) / correction**0.5
        return _Moments(AdamState(step, mean, square, largest), 1 / (1 - beta1**step), radius)

    def _direction(self, gradient: Tensor, state: AdamState, x: Any) -> tuple[Tensor, AdamState]:
        """Return the step for lr 1, and the next state."""
        after, mean_weight, radius = self._moments(gradient, state, x)
        return mean_weight * after.mean / (radius + self.eps), after

    def _slope(self, gradient: Tensor, state: AdamState, x: Any) -> Tensor:
        """Return d(direction)/d(gradient), elementwise."""
        beta1, beta2 = self._decays(x, state.step, gradient)
        after, mean_weight, radius = self._moments(gradient, state, x)
        moving = (radius > 0) & (after.square >= after.largest) if self.amsgrad else radius > 0
        bend = (1 - beta2) * gradient / ((1 - beta2**after.step) * torch.where(moving, radius, 1.0))
        bend = torch.where(moving, bend, torch.zeros_like(bend))
        denominator = radius + self.eps
        return mean_weight * ((1 - beta1) - after.mean * bend / denominator) / denominator


@final
@dataclass(frozen=True)
class Adam(_Adaptive):
    """Adam, with weight decay as part of the gradient.

        h = ±gradient + weight_decay y                              (minus if `maximize`)
        m = beta1 m + (1 - beta1) h,    v = beta2 v + (1 - beta2) h²
        y = y - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t) + eps_root) + eps),    t = 1, 2, ...

    With `amsgrad` the largest v so far stands under the root. Where v is 0 the derivative of the root is taken as 0:
    there m is 0 too, so this gives the true derivative lr / eps of the update, and not the NaN of the chain rule.
    Hyperparameters but the flags, eps and eps_root are numbers, tensors that broadcast against y, or functions of
    `(x, step)`.

    Args:
        lr: step length >= 0, about how far each entry of y moves in one step.
        betas: decay rates of the two running means, each in [0, 1).
        eps: >= 0, in units of the gradient; 0 divides by zero at a zero gradient.
        eps_root: >= 0, in units of the squared gradient. 0 gives the values of `torch.optim.Adam`; 1e-8 to 1e-6 bounds
            d(update)/d(gradient) by lr / sqrt(eps_root), which makes training a smoother function of x, and slower.
        weight_decay: >= 0, the weight of ‖y‖²/2 added to the objective.
        amsgrad: never let the denominator shrink.
        maximize: step along the gradient instead of against it.

    Raises:
        InvalidProblem: an option is out of its range or of a wrong type.

    Cost:
        Two vectors the size of y as state, three with `amsgrad`.

    Notes:
        d(update)/d(gradient) is as large as lr / eps at a zero gradient: exact, and of little use to a metagradient.

    References:
        Kingma and Ba (2015), arXiv 1412.6980, Algorithm 1; Reddi, Kale, Kumar (2018), "On the convergence of Adam and
        beyond", for amsgrad.

    Example:
        >>> optimizer = Adam(0.1)
        >>> y = torch.tensor([1.0, -2.0])
        >>> y, state = optimizer.update(y, gradient=y, state=optimizer.init(y))
        >>> y, state.step
        (tensor([ 0.9000, -1.9000]), 1)
    """

    def update(self, y: Tensor, gradient: Tensor, state: AdamState, x: Any = None) -> tuple[Tensor, AdamState]:
        """Return the next y and state; see the class for the formula."""
        lr = resolve("lr", self.lr, x, state.step, y)
        direction, after = self._direction(self._decayed(gradient, state, x, y), state, x)
        return y - lr * direction, after

    def sensitivity(self, gradient: Tensor, state: AdamState, x: Any = None, y: Tensor | None = None) -> Tensor:
        """Return -d(update)/d(gradient), elementwise and exact: bias correction and eps included.

        With c = 1 / (1 - beta2^t), r = sqrt(c v + eps_root), and h, m, v of the update at `gradient`,

            lr / (1 - beta1^t) [(1 - beta1) / (r + eps) - m (1 - beta2) c h / (r (r + eps)²)]

        times -1 if `maximize`; the second term is 0 where r is 0, or where amsgrad holds an older v.

        Args:
            gradient: the gradient of the update in question.
            state: the state before that update.
            x: passed to hyperparameters that are functions of `(x, step)`.
            y: the variables before that update; needed with weight decay, which here is part of h.

        Raises:
            InvalidProblem: there is weight decay and y is not given.
        """
        if y is None and not is_zero(self.weight_decay):
            raise InvalidProblem("sensitivity of Adam with weight_decay needs y; pass y, or use AdamW")
        lr = resolve("lr", self.lr, x, state.step, gradient)
        slope = self._slope(self._decayed(gradient, state, x, y), state, x)
        return -lr * slope if self.maximize else lr * slope

    def _decayed(self, gradient: Tensor, state: AdamState, x: Any, y: Tensor | None) -> Tensor:
        gradient = -gradient if self.maximize else gradient
        if y is None or is_zero(self.weight_decay):
            return gradient
        return gradient + resolve("weight_decay", self.weight_decay, x, state.step, y) * y


@final
@dataclass(frozen=True)
class AdamW(_Adaptive):
    """Adam with decoupled weight decay: y shrinks by lr weight_decay y before a step of Adam without decay.

        y = (1 - lr weight_decay) y - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t) + eps_root) + eps)

    Everything else is said at `Adam`.

    Args:
        lr: step length >= 0, about how far each entry of y moves in one step.
        betas: decay rates of the two running means, each in [0, 1).
        eps: >= 0, in units of the gradient.
        eps_root: >= 0, in units of the squared gradient; 0 gives the values of `torch.optim.AdamW`.
        weight_decay: >= 0, the share of y taken off per unit of lr. It enters the step, not the objective.
        amsgrad: never let the denominator shrink.
        maximize: step along the gradient instead of against it; the decay still shrinks y.

    Raises:
        InvalidProblem: an option is out of its range or of a wrong type.

    Cost:
        Two vectors the size of y as state, three with `amsgrad`.

    References:
        Loshchilov and Hutter (2019), arXiv 1711.05101, Algorithm 2.

    Example:
        >>> optimizer = AdamW(0.1, weight_decay=0.5)
        >>> y = torch.tensor([1.0, -2.0])
        >>> y, state = optimizer.update(y, gradient=y, state=optimizer.init(y))
        >>> y, state.step
        (tensor([ 0.8500, -1.8000]), 1)
    """

    weight_decay: Hyperparameter = field(default=1e-2, kw_only=True)

    def update(self, y: Tensor, gradient: Tensor, state: AdamState, x: Any = None) -> tuple[Tensor, AdamState]:
        """Return the next y and state; see the class for the formula."""
        lr = resolve("lr", self.lr, x, state.step, y)
        direction, after = self._direction(-gradient if self.maximize else gradient, state, x)
        if not is_zero(self.weight_decay):
            y = y * (1 - lr * resolve("weight_decay", self.weight_decay, x, state.step, y))
        return y - lr * direction, after

    def sensitivity(self, gradient: Tensor, state: AdamState, x: Any = None, y: Tensor | None = None) -> Tensor:
        """Return -d(update)/d(gradient), as for `Adam` without weight decay; y is not used."""
        lr = resolve("lr", self.lr, x, state.step, gradient)
        slope = self._slope(-gradient if self.maximize else gradient, state, x)
        return -lr * slope if self.maximize else lr * slope
