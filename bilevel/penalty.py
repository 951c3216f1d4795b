"""What penalty methods share: two lower problems, with and without the upper objective, stepped alike and compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bilevel.optimizers._base import at
from bilevel.optimizers._hyperparameters import check_function
from bilevel.oracles import LowerGradient, Oracles, UpperGradient
from bilevel.smoothness import check_curved, smoothness
from bilevel.status import InvalidProblem

Schedule: TypeAlias = float | Callable[[Any, int], float | Tensor]
"""A number, or a function of `(x, step)` such as `Power`."""

SAFE = 0.8
"""Lower step in units of 1 / curvature: measured curvatures approach the largest one from below."""
LIMIT = 0.95
"""Largest lower step in units of that at which steps stop being stable."""
FORGET = 0.99


def check_schedule(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse what is neither a number > 0 nor a function of `(x, step)`, nor None where it is `optional`.

    Raises:
        InvalidProblem: so it is.
    """
    if optional and value is None:
        return
    if callable(value) and not isinstance(value, type):
        check_function(name, value)
    elif not (isinstance(value, int | float) and 0 < value < float("inf")):
        raise InvalidProblem(f"{name} must be a finite number > 0 or a schedule such as Power, got {value!r}.")


def wanted_at(lr: Schedule | None, step: int) -> float | Tensor | None:
    """Return the step length that a user wants at a step; None where it is to be measured."""
    return None if lr is None else at(lr, None, step)


def stable(momentum: float) -> float:
    """Return the step, in units of 1 / curvature, at which descent with Nesterov's momentum stops being stable."""
    return (2 + 2 * momentum) / (1 + 2 * momentum)


def lower_batches(k: int, *, shared: bool) -> tuple[int, int]:
    """Return which lower batches y and z see at step k: one for both, or one each."""
    return (k, k) if shared else (2 * k, 2 * k + 1)


def moved(point: Tensor, direction: Tensor, length: float | Tensor) -> Tensor:
    """Return `point + length direction`, in one pass over memory; the length is one number."""
    if isinstance(length, Tensor):
        return torch.addcmul(point, direction, length)
    return torch.add(point, direction, alpha=length)


class Curvature(NamedTuple):
    """The largest curvatures in y, from differences of gradients.

    Args:
        lower: of g, 0-dim.
        upper: of f, 0-dim.
        direction: a unit vector shaped like y that turns toward the most curved direction of g.
    """

    lower: Tensor
    upper: Tensor
    direction: Tensor

    @classmethod
    def measure(cls, oracles: Oracles, x: Tensor, y: Tensor) -> Curvature:
        """Measure both at a start. Cost: 17 lower and 16 upper gradients (fewer in less than 8 dimensions).

        Raises:
            InvalidProblem: g is linear in y at the start.
        """
        lower = smoothness(lambda v: oracles.lower_gradient(x, v)[1], y)
        upper = smoothness(lambda v: oracles.upper_gradient(x, v).y, y)
        gradient = oracles.lower_gradient(x, y)[1]
        check_curved(lower, 10 * torch.finfo(y.dtype).eps ** (2 / 3) * gradient.norm() / (1 + y.norm()))
        return cls(lower, upper, torch.full_like(y, y.numel() ** -0.5))

    def followed(self, oracles: Oracles, x: Tensor, y: Tensor, gradient: Tensor, step: int) -> Curvature:
        """Return the curvature of g at a new point where its gradient is known already: up at once, down slowly.

        One step of the power method, by one difference. Cost: 1 lower gradient.
        """
        reach = torch.finfo(y.dtype).eps ** 0.5 * (1 + y.norm())
        product = (oracles.lower_gradient(x, moved(y, self.direction, reach), step)[1] - gradient) / reach
        seen = product.norm()
        turned = torch.where(seen > 0, product / seen.clamp_min(torch.finfo(y.dtype).tiny), self.direction)
        return Curvature(torch.maximum(seen, FORGET * self.lower + (1 - FORGET) * seen), self.upper, turned)

    def step(
        self,
        penalty: float | Tensor,
        wanted: float | Tensor | None,
        pull: float | Tensor = 0.0,
        *,
        momentum: float = 0.0,
    ) -> Tensor:
        """Return the step wanted, cut where it would not be stable; None: a step that is safe.

        It holds for g, and for `g + f / penalty`, with `pull ‖y - center‖^2 / 2` added to both.
        """
        total = self.lower + self.upper / penalty + pull
        return SAFE / total if wanted is None else (LIMIT * stable(momentum) / total).clamp_max(wanted)

    def check(
        self, lr: float | Tensor | None, penalty: float | Tensor, pull: float | Tensor = 0.0, *, momentum: float = 0.0
    ) -> None:
        """Refuse a lower step wanted that is beyond the limit of stability at the start.

        Raises:
            InvalidProblem: `lr (curvature of g + f / penalty, plus pull) >= stable(momentum)`.
        """
        if lr is None:
            return
        total = float(self.lower + self.upper / penalty + pull)
        limit = stable(momentum) / total
        if not 0 < float(lr) < limit:
            raise InvalidProblem(
                f"lower_lr={float(lr):.3g} is outside (0, {limit:.3g}), where the lower steps are stable: the "
                f"largest curvature in y is {total:.3g} at the start. None takes {SAFE / total:.3g}."
            )


class Gap(NamedTuple):
    """Gradients of the penalized upper objective `f(x, y) + penalty (g(x, y) - g(x, z))` at y and z.

    Args:
        upper: of f at (x, y).
        lower: of g at (x, y).
        value: of g at (x, z).
    """

    upper: UpperGradient
    lower: LowerGradient
    value: LowerGradient

    @classmethod
    def at(cls, oracles: Oracles, x: Tensor, y: Tensor, z: Tensor, upper_step: int, y_step: int, z_step: int) -> Gap:
        """Evaluate at (x, y) and (x, z) on the batches of the steps named. Cost: 3 gradients."""
        return cls(
            oracles.upper_gradient(x, y, upper_step),
            oracles.lower_gradients(x, y, y_step),
            oracles.lower_gradients(x, z, z_step),
        )

    def direction(self, penalty: float | Tensor) -> Tensor:
        """Return the derivative in x: the whole one of the penalized problem (by Danskin) where y and z are exact."""
        return moved(self.upper.x, self.lower.x - self.value.x, penalty)

    def residuals(self, penalty: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients in y that should vanish: of `g + f / penalty` at y, and of g at z."""
        return moved(self.lower.y, self.upper.y, 1 / penalty), self.value.y
