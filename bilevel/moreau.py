"""What methods of the Moreau envelope share: curvatures that bound their steps, followed without further gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.oracles import LowerGradient, Oracles
from bilevel.smoothness import curvatures, smoothness
from bilevel.status import Diverged, InvalidProblem

SAFE = 0.8
"""Steps in units of 1 / curvature: measured curvatures approach the largest one from below."""
FLAT = 10.0
"""The envelope's width for a convex g, in units of 1 / (largest curvature)."""
RUNAWAY = 1e8


class Curvatures(NamedTuple):
    """Curvatures at the start, raised where more is seen on the way; all 0-dim.

    Args:
        lower: largest of g in y.
        joint: largest of g in (x, y).
        upper: largest of f in (x, y).
        concave: most negative of g in y, as a number >= 0.
        size: of the start, `1 + ‖(x, y)‖`.
    """

    lower: Tensor
    joint: Tensor
    upper: Tensor
    concave: Tensor
    size: Tensor

    @classmethod
    def measure(cls, oracles: Oracles, x: Tensor, y: Tensor, *, declared: bool) -> Curvatures:
        """Measure at a start, with or without the declared regularizer. Cost: 32 gradients of g, 16 of f."""

        def split(v: Tensor) -> tuple[Tensor, Tensor]:
            return v[: len(x)], v[len(x) :].view(y.shape)

        def lower_joint(v: Tensor) -> Tensor:
            found = oracles.lower_gradients(*split(v), declared=declared)
            return torch.cat([found.x, found.y.flatten()])

        def upper_joint(v: Tensor) -> Tensor:
            found = oracles.upper_gradient(*split(v))
            return torch.cat([found.x, found.y.flatten()])

        both = torch.cat([x, y.flatten()])
        low, high = curvatures(lambda v: oracles.lower_gradients(x, v, declared=declared).y, y)
        return cls(
            lower=torch.maximum(low.abs(), high.abs()),
            joint=smoothness(lower_joint, both),
            upper=smoothness(upper_joint, both),
            concave=(-low).clamp_min(0),
            size=1 + both.norm(),
        )

    def followed(self, first: LowerGradient, second: LowerGradient, apart: Tensor) -> Curvatures:
        """Raise the curvatures of g to what two gradients at the same x show, whose y lie `apart`. No gradients."""
        distance = apart.norm()
        # Closer than this, differences of gradients are rounding.
        seen = distance > torch.finfo(apart.dtype).eps ** 0.5 * self.size
        over = torch.where(seen, 1 / distance.clamp_min(torch.finfo(apart.dtype).tiny), torch.zeros_like(distance))
        in_y, in_x = (first.y - second.y).norm() * over, (first.x - second.x).norm() * over
        along = ((first.y - second.y) * apart).sum() * over.square()
        return self._replace(
            lower=torch.maximum(self.lower, in_y),
            joint=torch.maximum(self.joint, torch.hypot(in_x, in_y)),
            concave=torch.maximum(self.concave, -along),
        )

    def gamma(self) -> Tensor:
        """Return a width of the envelope: 10 / (largest curvature), or half the limit that a nonconvex g sets."""
        tiny = torch.finfo(self.lower.dtype).tiny
        convex = self.concave <= 1e-3 * self.lower
        allowed = torch.where(convex, torch.full_like(self.lower, torch.inf), 0.5 / self.concave.clamp_min(tiny))
        return torch.minimum(FLAT / self.lower.clamp_min(1e-3), allowed)


def check_lr(name: str, lr: float | None, curvature: Tensor) -> None:
    """Refuse a step beyond the limit of stability at the start, `lr curvature >= 2`.

    Raises:
        InvalidProblem: so it is.
    """
    if lr is not None and not 0 < lr * float(curvature) < 2:
        raise InvalidProblem(
            f"{name}={lr:.3g} is outside (0, {2 / float(curvature):.3g}), where its steps are stable at the start "
            f"(curvature {float(curvature):.3g}); None measures a safe one."
        )


def check_runaway(size: Tensor, step: int, advice: str, **points: Tensor) -> None:
    """Raise where an iterate has left the size of the start far behind, before it overflows; waits for the device.

    Raises:
        Diverged: so it is.
    """
    for name, point in points.items():
        length = float(point.norm())
        if length > RUNAWAY * float(size):
            raise Diverged(f"{name} ran away at step {step}, to a norm of {length:.3g}: {advice}")
