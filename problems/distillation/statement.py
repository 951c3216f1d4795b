"""Dataset distillation as a bilevel problem: images such that training on them alone does well on real data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from bilevel.data import Full, Shuffled
from bilevel.data._seeding import mixed
from bilevel.problem import Problem
from bilevel.problems._datasets import Part
from bilevel.problems.distillation.networks import Network, Parameters
from bilevel.problems.distillation.synthetic import (
    Loss,
    Synthetic,
    hard_targets,
    stored_targets,
    synthetic,
    training_loss,
    used_targets,
)
from bilevel.regularizers import L2
from bilevel.status import InvalidProblem

Start: TypeAlias = Literal["real", "noise"]


@dataclass(frozen=True, eq=False)
class Distillation:
    """A distillation, ready to be solved.

    Args:
        problem: the statement.
        x0: upper start: "images" `[n, *shape]`, and where they are learned "targets" `[n, C]` (logits of probabilities
            if `loss` is the cross-entropy), "log_lr" and "log_temperature" `[]`.
        y0: weights of one fresh network.
        network: the architecture.
        labels: `[n]`, the class of each image.
        loss: that trains on the images.
    """

    problem: Problem
    x0: dict[str, Tensor]
    y0: Parameters
    network: Network
    labels: Tensor
    loss: Loss

    def synthetic(self, x: Any = None) -> Synthetic:
        """Return the distilled data at x (a solution's `x`), or those of the start."""
        return synthetic(self.x0 if x is None else x, self.labels, self.network.classes, self.loss)


def distillation(
    train: Part,
    network: Network,
    *,
    ipc: int = 1,
    start: Start | Tensor = "real",
    loss: Loss = "cross_entropy",
    learn_targets: bool = False,
    lr: float | None = None,
    learn_temperature: bool = False,
    decay: float = 0.0,
    batch_size: int | None = 256,
    synthetic_batch: int | None = None,
    seed: int = 0,
) -> Distillation:
    """State the distillation of labeled images into `ipc` images a class.

        g(x, y) = mean loss of the network y on the synthetic images + decay ‖y‖^2 / 2
        f(x, y) = mean loss of it on real images

    Args:
        train: images `[N, *shape]` and labels `[N]` of all classes, from 0.
        network: whose weights are y.
        ipc: images a class, >= 1.
        start: "real" images of each class, chosen at random; "noise", standard normal; or images of yours
            `[classes ipc, *shape]`, sorted by class.
        loss: "cross_entropy", or "mse" against one-hot targets less 1/C.
        learn_targets: whether the synthetic images' targets are part of x.
        lr: > 0: the learning rate of the lower optimizer becomes part of x, from here; write that optimizer as
            `SGD(lambda x, step: x["log_lr"].exp())`.
        learn_temperature: whether logits on real images are scaled by a learned factor exp(log_temperature); f is the
            cross-entropy then, whatever the loss.
        decay: >= 0, of all weights. Implicit hypergradients want some.
        batch_size: real images a step; all if None.
        synthetic_batch: synthetic images a lower step; all if None.
        seed: of the start.

    Raises:
        InvalidProblem: an option is out of its range, or the data are none to distil.

    References:
        Wang, Zhu, Torralba, Efros, "Dataset distillation", 2018, arXiv 1811.10959.

    Example:
        >>> import bilevel
        >>> from bilevel.problems.distillation import mlp
        >>> train = Part(torch.tensor([[[[-1.0]]], [[[1.0]]]]), torch.tensor([0, 1]))
        >>> task = distillation(train, mlp(shape=(1, 1, 1), classes=2), start="noise", decay=0.1, batch_size=None)
        >>> solution = bilevel.solve(task.problem, bilevel.implicit(), task.x0, task.y0, steps=50)
        >>> (solution.x["images"].flatten().sign(), task.labels)
        (tensor([-1.,  1.]), tensor([0, 1]))
    """
    _check(train, network, ipc, start, loss, lr, decay)
    labels = torch.arange(network.classes).repeat_interleave(ipc)
    images = _started(train, network, ipc, start, seed)
    targets = hard_targets(labels, network.classes, loss, images.dtype)
    x0: dict[str, Tensor] = {"images": images}
    if learn_targets:
        x0["targets"] = stored_targets(targets, loss)
    if lr is not None:
        x0["log_lr"] = images.new_tensor(math.log(lr))
    if learn_temperature:
        x0["log_temperature"] = images.new_zeros(())

    def lower(x: dict[str, Tensor], y: Parameters, index: Tensor | None) -> Tensor:
        wanted = used_targets(x["targets"], loss) if learn_targets else targets
        shown = x["images"]
        if index is not None:
            shown, wanted = shown[index], wanted[index]
        return training_loss(network.logits(y, shown), wanted, loss)

    def upper(x: dict[str, Tensor], y: Parameters, batch: tuple[Tensor, Tensor]) -> Tensor:
        return real_loss(network.logits(y, batch[0]), batch[1], loss, x.get("log_temperature"))

    count = len(train.targets)
    whole = batch_size is None or batch_size >= count
    every = None if synthetic_batch is None else Shuffled(torch.arange(len(labels)), synthetic_batch)
    problem = Problem(
        upper=upper, lower=lower, lower_data=every,
        upper_data=Full(tuple(train)) if whole else Shuffled(tuple(train), batch_size or count),
        regularizer=L2(decay) if decay > 0 else None,
    )  # fmt: skip
    return Distillation(problem, x0, network.start(seed, images.dtype), network, labels, loss)


def real_loss(logits: Tensor, labels: Tensor, loss: Loss, log_temperature: Tensor | None) -> Tensor:
    """Return the loss on real images; with a temperature, the cross-entropy of `logits exp(log_temperature)`."""
    if log_temperature is not None:
        return F.cross_entropy(logits * log_temperature.exp(), labels)
    return training_loss(logits, hard_targets(labels, logits.shape[1], loss, logits.dtype), loss)


def chosen(data: Part, classes: int, ipc: int, seed: int) -> Tensor:
    """Return `ipc` images of each class, chosen at random, `[classes ipc, *shape]` by class.

    Raises:
        InvalidProblem: a class has fewer.
    """
    generator = Generator().manual_seed(mixed("real", seed))
    rows = []
    for label in range(classes):
        of_class = torch.nonzero(data.targets == label).flatten()
        if len(of_class) < ipc:
            raise InvalidProblem(f"class {label} has {len(of_class)} images, fewer than ipc = {ipc}.")
        rows.append(of_class[torch.randperm(len(of_class), generator=generator)[:ipc]])
    return data.inputs[torch.cat(rows)].clone()


def check_images(what: str, data: Part, network: Network) -> None:
    """Refuse data that are not finite images of the network's shape with labels of its classes.

    Raises:
        InvalidProblem: so they are.
    """
    images, labels = data
    if tuple(images.shape[1:]) != tuple(network.shape) or labels.shape != images.shape[:1] or len(labels) == 0:
        raise InvalidProblem(
            f"{what}: images {list(images.shape)} and labels {list(labels.shape)} must be [N, *{network.shape}] and "
            "[N] with N > 0."
        )
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        raise InvalidProblem(f"{what}: images must be finite floating-point numbers; they are {images.dtype}.")
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= network.classes:
        raise InvalidProblem(
            f"{what}: labels must be integers from 0 to {network.classes - 1}, got {labels.dtype} from "
            f"{labels.min()} to {labels.max()}."
        )


def _started(train: Part, network: Network, ipc: int, start: Start | Tensor, seed: int) -> Tensor:
    if isinstance(start, Tensor):
        if start.shape != (network.classes * ipc, *network.shape) or not bool(start.isfinite().all()):
            raise InvalidProblem(
                f"distillation(start=...) must be finite images {[network.classes * ipc, *network.shape]}, got "
                f"{list(start.shape)}."
            )
        return start.detach().to(train.inputs.dtype).clone()
    images = chosen(train, network.classes, ipc, seed)
    if start == "noise":
        generator = Generator().manual_seed(mixed("noise", seed))
        return torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return images


def _check(
    train: Part, network: Network, ipc: int, start: str | Tensor, loss: str, lr: float | None, decay: float
) -> None:  # fmt: skip
    if ipc < 1:
        raise InvalidProblem(f"distillation(ipc=...) must be at least 1, got {ipc}.")
    if (isinstance(start, str) and start not in get_args(Start)) or loss not in get_args(Loss):
        raise InvalidProblem(
            f"distillation: start must be one of {get_args(Start)} and loss one of {get_args(Loss)}, got {start!r} "
            f"and {loss!r}."
        )
    if not (lr is None or lr > 0) or not decay >= 0:
        raise InvalidProblem(f"distillation: lr must be > 0 or None and decay >= 0, got {lr} and {decay}.")
    check_images("distillation", Part(*train), network)
