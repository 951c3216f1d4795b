"""The linear head that ridge regression on the synthetic images gives, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.status import NonFinite


def ridge_head(features: Tensor, targets: Tensor, l2: float | Tensor) -> Tensor:
    """Return `alpha = (K + l2 I)^-1 targets` with `K = features features^T`.

    The head `W = features^T alpha` minimizes `‖targets - features W‖^2 / 2 + l2 ‖W‖^2 / 2`; its predictions at other
    features F are `F features^T alpha`.

    Args:
        features: `[n, width]`.
        targets: `[n, C]`.
        l2: > 0.

    Raises:
        NonFinite: features or targets are not finite, or l2 is too small for their precision.
    """
    kernel = features @ features.T
    shifted = kernel + l2 * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) != 0 or not bool(factor.detach().isfinite().all()):
        raise NonFinite("the ridge regression on the synthetic images failed: its kernel is not positive definite. "
                        "Raise l2, or look for features that are not finite.")  # fmt: skip
    return torch.cholesky_solve(targets, factor)
