"""The smoothness constant of an objective from differences of gradients: for step sizes where no HVP may be used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.linear._lanczos import random_signs, ritz_range
from bilevel.status import InvalidProblem


def smoothness(gradient: Callable[[Tensor], Tensor], point: Tensor, *, steps: int = 8, seed: int = 0) -> Tensor:
    """Estimate the largest curvature of a function at a point, from below.

    Args:
        gradient: of the function, shaped like the point.
        point: `[d]` or `[m, d]`.
        steps: Lanczos steps, > 0.
        seed: of the random start.

    Returns:
        A 0-dim tensor.

    Cost:
        2 `steps` gradients.

    Example:
        >>> curvatures = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        >>> round(float(smoothness(lambda y: curvatures * y, torch.zeros(3, dtype=torch.float64))), 4)
        4.0
    """
    low, high = curvatures(gradient, point, steps=steps, seed=seed)
    return torch.maximum(low.abs(), high.abs())


def curvatures(
    gradient: Callable[[Tensor], Tensor], point: Tensor, *, steps: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Estimate the least and the largest curvature of a function at a point, from inside.

    Args:
        gradient: of the function, shaped like the point.
        point: `[d]` or `[m, d]`.
        steps: Lanczos steps, > 0.
        seed: of the random start.

    Returns:
        Two 0-dim tensors; the first is negative where the function is seen not to be convex.

    Cost:
        2 `steps` gradients.
    """
    reach = torch.finfo(point.dtype).eps ** (1 / 3) * (1 + point.norm())

    def product(v: Tensor) -> Tensor:
        step = reach / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
        difference: Tensor = (gradient(point + step * v) - gradient(point - step * v)) / (2 * step)
        return difference

    # Signs alone are orthogonal to (1, 1), a direction that matters in objectives such as (x + y)^2.
    generator = torch.Generator().manual_seed(seed)
    sizes = 0.5 + torch.rand(point.shape[-1:], generator=generator, dtype=torch.float64).to(point)
    low, high = ritz_range(product, random_signs(point, seed) * sizes, steps)
    return low.min().to(point.dtype), high.max().to(point.dtype)


def check_curved(curvature: Tensor, floor: float | Tensor) -> None:
    """Refuse a lower objective without curvature in y at the start: no step could be told to be stable.

    Args:
        curvature: the largest one measured.
        floor: what is not told from rounding.

    Raises:
        InvalidProblem: the curvature is not above the floor.
    """
    if not float(curvature) > float(floor):
        raise InvalidProblem(
            "the lower objective has no curvature in y at the start, so no step is known to be stable; start "
            "elsewhere, add a regularizer (bilevel.L2), or declare its kinks (bilevel.L1 and relatives) and use MEHA."
        )


def check_lr(name: str, lr: float | None, curvature: Tensor) -> None:
    """Refuse a step beyond the limit of stability at the start, `lr curvature >= 2`.

    Raises:
        InvalidProblem: so it is.
    """
    if lr is not None and not lr * float(curvature) < 2:
        raise InvalidProblem(
            f"{name}={lr:.3g} is outside (0, {2 / float(curvature):.3g}), where its steps are stable at the start "
            f"(curvature {float(curvature):.3g}); None measures a safe one."
        )
