"""Curvature of objectives in both variables at once, from differences of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.linear import Operator
from bilevel.linear.curvature import largest_curvature
from bilevel.smoothness import smoothness

Gradients: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, y) -> the gradients of a function in x and in y."""


def joint_smoothness(
    gradients: Gradients, x: Tensor, y: Tensor, *, steps: int = 8, unit: float | Tensor = 1.0
) -> Tensor:
    """Estimate the largest curvature of a function of (x, y) at a point, from below.

    Args:
        gradients: of the function, (x, y) -> (gradient in x, gradient in y).
        x: `[p]`.
        y: `[d]` or `[m, d]`.
        steps: Lanczos steps, > 0.
        unit: curvature is that in `(x / unit, y)`.

    Returns:
        A 0-dim tensor.

    Cost:
        2 `steps` gradients.

    Example:
        >>> zero = torch.zeros(2, dtype=torch.float64)
        >>> round(float(joint_smoothness(lambda x, y: (3 * y, 3 * x), zero, zero)), 4)
        3.0
    """

    def gradient(point: Tensor) -> Tensor:
        in_x, in_y = gradients(unit * point[: x.numel()], point[x.numel() :].view_as(y))
        return torch.cat([unit * in_x, in_y.flatten()])

    return smoothness(gradient, torch.cat([x / unit, y.flatten()]), steps=steps)


def natural_unit(gradients: Gradients, x: Tensor, y: Tensor, *, coupled: float, steps: int = 4) -> Tensor:
    """Return the unit of x in which one step length serves both variables, whatever units the user gave x.

        coupled C / B, at most sqrt(C / A)      A, B, C: the largest curvatures in x, between x and y, in y

    A mean over n examples, each with a weight x_i, has B of the order 1 / n, and steps of one length would hardly move
    x. 1 where B or C vanishes.

    Args:
        gradients: of the function, (x, y) -> (gradient in x, gradient in y).
        x: `[p]`.
        y: `[d]` or `[m, d]`.
        coupled: > 0, what the curvature between x and y shall be of that in y.
        steps: Lanczos steps, > 0.

    Returns:
        A 0-dim tensor, > 0.

    Cost:
        8 `steps` gradients.

    Example:
        >>> zero = torch.zeros(2, dtype=torch.float64)
        >>> round(float(natural_unit(lambda x, y: (0.1 * y, y + 0.1 * x), zero, zero, coupled=0.5)), 4)
        5.0
    """
    tiny = torch.finfo(y.dtype).eps
    across = coupling(gradients, x, y, steps=steps)
    below = smoothness(lambda v: gradients(x, v)[1], y, steps=steps)
    above = smoothness(lambda u: gradients(u, y)[0], x, steps=steps)
    unit = torch.minimum(coupled * below / across.clamp_min(tiny), (below / above.clamp_min(tiny)).sqrt())
    # Beyond this, differences of gradients are rounding.
    seen = (across > tiny**0.5 * below) & (below > tiny**0.5 * across)
    return torch.where(seen, unit, torch.ones_like(unit))


def coupling(gradients: Gradients, x: Tensor, y: Tensor, *, steps: int = 4) -> Tensor:
    """Estimate the largest singular value of the mixed derivative d2g/dydx at a point, from below.

    Args:
        gradients: of g, (x, y) -> (dg/dx, dg/dy).
        x: `[p]`.
        y: `[d]` or `[m, d]`.
        steps: Lanczos steps, > 0.

    Returns:
        A 0-dim tensor.

    Cost:
        4 `steps` gradients.

    Example:
        >>> mixed = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> zero = torch.zeros(2, dtype=torch.float64)
        >>> round(float(coupling(lambda x, y: (mixed @ y, mixed @ x), zero, zero)), 4)
        3.0
    """
    eps = torch.finfo(x.dtype).eps ** (1 / 3)

    def reach(v: Tensor, point: Tensor) -> Tensor:
        step: Tensor = eps * (1 + point.norm()) / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
        return step

    def product(u: Tensor) -> Tensor:
        h = reach(u, x)
        v = (gradients(x + h * u, y)[1] - gradients(x - h * u, y)[1]) / (2 * h)
        k = reach(v, y)
        both: Tensor = (gradients(x, y + k * v)[0] - gradients(x, y - k * v)[0]) / (2 * k)
        return both

    return largest_curvature(Operator(product), x, steps=steps).clamp_min(0).sqrt()
