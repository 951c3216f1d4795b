"""What distilled data must beat: real images chosen at random, and the centers of clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.extras import extra
from bilevel.problems._datasets import Part
from bilevel.problems.distillation.networks import Network
from bilevel.problems.distillation.statement import check_images, chosen
from bilevel.problems.distillation.synthetic import Synthetic, hard_targets
from bilevel.status import InvalidProblem


def random_images(train: Part, network: Network, ipc: int, *, seed: int = 0) -> Synthetic:
    """Return `ipc` real images of each class, chosen at random.

    Args:
        train: images and labels.
        network: gives the shape and the number of classes.
        ipc: images a class, >= 1.
        seed: of the choice.

    Raises:
        InvalidProblem: a class has fewer images.
    """
    _check(train, network, ipc)
    return _labeled(chosen(train, network.classes, ipc, seed), network, ipc)


def cluster_centers(train: Part, network: Network, ipc: int, *, seed: int = 0) -> Synthetic:
    """Return the `ipc` centers that k-means finds among the images of each class; for one, their mean.

    Args:
        train: images and labels.
        network: gives the shape and the number of classes.
        ipc: images a class, >= 1.
        seed: of k-means.

    Raises:
        InvalidProblem: a class has fewer images.
        MissingPackage: scikit-learn is not installed.
    """
    _check(train, network, ipc)
    with extra("data", {"sklearn": "scikit-learn"}, "cluster_centers"):
        from sklearn.cluster import KMeans
    centers = []
    for label in range(network.classes):
        images = train.inputs[train.targets == label]
        if len(images) < ipc:
            raise InvalidProblem(f"class {label} has {len(images)} images, fewer than ipc = {ipc}.")
        found = KMeans(ipc, n_init=4, random_state=seed).fit(images.flatten(1).double().numpy()).cluster_centers_
        centers.append(torch.from_numpy(found).to(images.dtype).reshape(ipc, *images.shape[1:]))
    return _labeled(torch.cat(centers), network, ipc)


def _labeled(images: Tensor, network: Network, ipc: int) -> Synthetic:
    labels = torch.arange(network.classes).repeat_interleave(ipc)
    return Synthetic(images, hard_targets(labels, network.classes, "cross_entropy", images.dtype))


def _check(train: Part, network: Network, ipc: int) -> None:
    check_images("baseline", train, network)
    if ipc < 1:
        raise InvalidProblem(f"ipc must be at least 1, got {ipc}.")
