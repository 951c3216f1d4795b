"""What methods of the Moreau envelope share: curvatures that bound their steps, followed without further gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.joint import joint_smoothness, natural_unit
from bilevel.oracles import LowerGradient, Oracles
from bilevel.smoothness import curvatures
from bilevel.status import Diverged

SAFE = 0.8
"""Steps in units of 1 / curvature: measured curvatures approach the largest one from below."""
FLAT = 10.0
"""The envelope's width for a convex g, in units of 1 / (largest curvature)."""
COUPLED = 2**0.5
"""Curvature between x and y over that in y, in the unit of x: x takes steps of its own, which do not shorten y's."""
RUNAWAY = 1e8


class Curvatures(NamedTuple):
    """Curvatures at the start, raised where more is seen on the way; all 0-dim.

    Args:
        lower: largest of g in y.
        unit: of x, in which the two that follow are.
        joint: largest of g in (x / unit, y).
        upper: largest of f in (x / unit, y).
        concave: most negative of g in y, as a number >= 0.
        size: of the start, `1 + ‖(x, y)‖`.
    """

    lower: Tensor
    unit: Tensor
    joint: Tensor
    upper: Tensor
    concave: Tensor
    size: Tensor

    @classmethod
    def measure(cls, oracles: Oracles, x: Tensor, y: Tensor, *, declared: bool, scaled: bool) -> Curvatures:
        """Measure at a start, with or without the declared regularizer, x in its natural unit or in the user's.

        Cost: 32 gradients of g, 16 of f; 32 gradients of g more for the natural unit.
        """

        def f(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return oracles.upper_gradient(u, v)[1:]

        def g(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return oracles.lower_gradients(u, v, declared=declared)[1:]

        unit = natural_unit(g, x, y, coupled=COUPLED) if scaled else y.new_ones(())
        low, high = curvatures(lambda v: g(x, v)[1], y)
        return cls(
            lower=torch.maximum(low.abs(), high.abs()),
            unit=unit,
            joint=joint_smoothness(g, x, y, unit=unit),
            upper=joint_smoothness(f, x, y, unit=unit),
            concave=(-low).clamp_min(0),
            size=1 + torch.cat([x, y.flatten()]).norm(),
        )

    def followed(self, first: LowerGradient, second: LowerGradient, apart: Tensor) -> Curvatures:
        """Raise the curvatures of g to what two gradients at the same x show, whose y lie `apart`. No gradients."""
        distance = apart.norm()
        # Closer than this, differences of gradients are rounding.
        seen = distance > torch.finfo(apart.dtype).eps ** 0.5 * self.size
        over = torch.where(seen, 1 / distance.clamp_min(torch.finfo(apart.dtype).tiny), torch.zeros_like(distance))
        change = first.y - second.y
        in_y, in_x = change.norm() * over, self.unit * (first.x - second.x).norm() * over
        along = torch.dot(change.flatten(), apart.flatten()) * over.square()
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


def check_runaway(size: Tensor, step: int, advice: str, **points: Tensor) -> None:
    """Raise where an iterate has left the size of the start far behind, before it overflows; waits for the device.

    Raises:
        Diverged: so it is.
    """
    for name, point in points.items():
        length = float(point.norm())
        if length > RUNAWAY * float(size):
            raise Diverged(f"{name} ran away at step {step}, to a norm of {length:.3g}: {advice}")
