"""The largest curvature of an operator, for step lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.linear._base import Operator
from bilevel.linear._lanczos import random_signs, ritz_range


def largest_curvature(operator: Operator, like: Tensor, *, steps: int = 10, seed: int = 0) -> Tensor:
    """Estimate the largest magnitude of an eigenvalue of A over all rows, from below.

    Args:
        operator: A.
        like: any tensor shaped like the vectors it takes.
        steps: Lanczos steps, > 0; ten find a typical L within a few percent.
        seed: of the random start.

    Returns:
        A 0-dim tensor of the dtype of `like`.

    Cost:
        `steps` products.

    Example:
        >>> import torch
        >>> curvatures = torch.tensor([1.0, 2.0, 4.0])
        >>> round(float(largest_curvature(Operator(lambda v: curvatures * v), curvatures)), 4)
        4.0
    """
    low, high = ritz_range(operator.apply, random_signs(like, seed), steps)
    return torch.maximum(low.abs(), high.abs()).max().to(like.dtype)
