"""What distillation makes: a few images with targets, and how a network is trained on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.status import InvalidProblem

Loss: TypeAlias = Literal["cross_entropy", "mse"]
SURE = 0.9
"""Probability of its own class from which a learned soft label starts."""


@dataclass(frozen=True, eq=False)
class Synthetic:
    """A distilled data set.

    Args:
        images: `[n, *shape]`.
        targets: `[n, C]`: probabilities for "cross_entropy", values to regress on for "mse".
        loss: which of the two trains on them.

    Raises:
        InvalidProblem: shapes do not fit, numbers are not finite, or probabilities are none.
    """

    images: Tensor
    targets: Tensor
    loss: Loss = "cross_entropy"

    def __post_init__(self) -> None:
        if self.targets.dim() != 2 or len(self.images) != len(self.targets) or len(self.images) == 0:
            raise InvalidProblem(
                f"Synthetic: images {list(self.images.shape)} and targets {list(self.targets.shape)} must be "
                "[n, *shape] and [n, C] with n > 0."
            )
        for name, values in (("images", self.images), ("targets", self.targets)):
            if not bool(values.isfinite().all()):
                raise InvalidProblem(f"Synthetic: {name} have {int((~values.isfinite()).sum())} entries not finite.")
        if self.loss not in get_args(Loss):
            raise InvalidProblem(f"Synthetic(loss=...) must be one of {get_args(Loss)}, got {self.loss!r}.")
        probabilities = bool((self.targets >= 0).all()) and bool(((self.targets.sum(1) - 1).abs() < 1e-3).all())
        if self.loss == "cross_entropy" and not probabilities:
            raise InvalidProblem("Synthetic: rows of targets must be probabilities where loss='cross_entropy'.")


def training_loss(logits: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Return the mean cross-entropy with probabilities, or half the mean squared distance to values; 0-dim."""
    if loss == "cross_entropy":
        return F.cross_entropy(logits, targets)
    return 0.5 * (logits - targets).square().sum(1).mean()


def hard_targets(labels: Tensor, classes: int, loss: Loss, dtype: torch.dtype) -> Tensor:
    """Return targets `[n, C]` of labels `[n]`: one-hot, less 1/C for "mse" as FRePo and RCIG have it."""
    one_hot = F.one_hot(labels, classes).to(dtype)
    return one_hot if loss == "cross_entropy" else one_hot - 1 / classes


def balanced_targets(images: Tensor, classes: int) -> Tensor:
    """Return the fixed targets of images that are sorted by class, as many in each."""
    labels = torch.arange(classes, device=images.device).repeat_interleave(len(images) // classes)
    return hard_targets(labels, classes, "mse", images.dtype)


def stored_targets(targets: Tensor, loss: Loss) -> Tensor:
    """Return what the upper variable `targets` starts from: the values themselves, or logits of soft labels."""
    if loss == "mse":
        return targets.clone()
    classes = targets.shape[1]
    return (SURE * targets + (1 - SURE) / classes).log()


def used_targets(stored: Tensor, loss: Loss) -> Tensor:
    """Return the targets that the upper variable `targets` stands for."""
    return stored.softmax(1) if loss == "cross_entropy" else stored


def synthetic(x: dict[str, Any], labels: Tensor, classes: int, loss: Loss) -> Synthetic:
    """Return the distilled data that upper variables stand for; `labels` give the targets if none were learned."""
    images = x["images"].detach()
    if "targets" in x:
        return Synthetic(images, used_targets(x["targets"].detach(), loss), loss)
    return Synthetic(images, hard_targets(labels, classes, loss, images.dtype), loss)
