"""A baseline that is not bilevel: images that a trained network recognizes, made from ever smaller crops, as in CDA."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from bilevel.data import Shuffled
from bilevel.data._seeding import mixed, seeded
from bilevel.problems._datasets import Part
from bilevel.problems.distillation.networks import Network
from bilevel.problems.distillation.statement import check_images, chosen
from bilevel.problems.distillation.synthetic import Synthetic
from bilevel.status import InvalidProblem

Schedule: TypeAlias = Literal["cosine", "linear", "step"]
SMALLEST = 0.08
"""The least share of the image's area that a crop may have at the end."""


def cda(
    train: Part,
    network: Network,
    *,
    ipc: int = 1,
    steps: int = 300,
    lr: float = 0.1,
    matching: float = 0.01,
    first_matching: float = 10.0,
    schedule: Schedule = "cosine",
    milestone: float = 1.0,
    width: int = 32,
    epochs: int = 5,
    teacher_lr: float = 1e-3,
    seed: int = 0,
) -> Synthetic:
    """Squeeze the data into one network with BatchNorm, recover images from it by its statistics, and relabel them.

        minimize over images  cross-entropy of the teacher on random crops
                              + matching sum_l (‖mean_l - running mean_l‖ + ‖var_l - running var_l‖)

    The smallest crop shrinks on a curriculum, from the whole image to `SMALLEST` of its area. Targets are the teacher's
    probabilities on the images found. This is CDA's scheme at the size of digits, without its augmented relabeling.

    Args:
        train: images `[N, c, h, w]` and labels.
        network: gives the shape and the number of classes; the teacher is a network of its own.
        ipc: images a class, >= 1.
        steps: Adam steps on the images, >= 1, with a cosine learning rate.
        lr: > 0.
        matching: >= 0, weight of the statistics.
        first_matching: >= 0, factor of the first layer's.
        schedule: "cosine", "linear" or "step" (the whole image until the milestone), of the smallest crop.
        milestone: in (0, 1], the share of the run after which crops are as small as they get.
        width: of the teacher.
        epochs: of its training, by Adam.
        teacher_lr: > 0, of that.
        seed: of all that is drawn.

    Raises:
        InvalidProblem: an option is out of its range.

    References:
        Yin and Shen, "Dataset distillation via curriculum data synthesis in large data era", TMLR 2024, arXiv
        2311.18838. Yin, Xing, Shen, "Squeeze, recover and relabel", NeurIPS 2023 (SRe2L).
    """
    check_images("cda", train, network)
    positive, weights = min(lr, teacher_lr) > 0, min(matching, first_matching) >= 0
    if min(ipc, steps, width, epochs) < 1 or not positive or not weights:
        raise InvalidProblem(
            "cda: ipc, steps, width and epochs must be >= 1, lr and teacher_lr > 0, matching and first_matching >= 0, "
            f"got {ipc}, {steps}, {width}, {epochs}, {lr}, {teacher_lr}, {matching}, {first_matching}."
        )
    smallest_crop(0, steps, schedule, milestone)
    teacher = _teacher(train, network, width, epochs, teacher_lr, seed)
    labels = torch.arange(network.classes).repeat_interleave(ipc)
    images = chosen(train, network.classes, ipc, seed).requires_grad_()
    generator = Generator().manual_seed(mixed("crops", seed))
    optimizer = torch.optim.Adam([images], lr, betas=(0.5, 0.9))
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        seen = cropped(images, smallest_crop(step, steps, schedule, milestone), generator)
        logits, distances = _observed(teacher, seen)
        distance = torch.stack(distances).sum() + (first_matching - 1) * distances[0]
        loss = F.cross_entropy(logits, labels) + matching * distance
        loss.backward()
        optimizer.step()
        rates.step()
    with torch.no_grad():
        return Synthetic(images.detach(), teacher(images).softmax(1))


def smallest_crop(step: int, steps: int, schedule: Schedule = "cosine", milestone: float = 1.0) -> float:
    """Return the least share of the image's area that a crop may have at a step.

    Args:
        step: from 0.
        steps: of the run.
        schedule: of its way from 1 to `SMALLEST`.
        milestone: share of the run, in (0, 1], at which it arrives.

    Raises:
        InvalidProblem: an option is out of its range.

    Example:
        >>> [round(smallest_crop(step, 100), 3) for step in (0, 50, 100)]
        [1.0, 0.54, 0.08]
    """
    if schedule not in get_args(Schedule) or not 0 < milestone <= 1:
        raise InvalidProblem(
            f"schedule must be one of {get_args(Schedule)} and milestone in (0, 1], got {schedule!r} and {milestone}."
        )
    done = min(step / (milestone * steps), 1.0)
    way = {"cosine": (1 - math.cos(math.pi * done)) / 2, "linear": done, "step": float(done >= 1)}[schedule]
    return 1.0 + (SMALLEST - 1.0) * way


def cropped(images: Tensor, smallest: float, generator: Generator) -> Tensor:
    """Return a random crop of each image `[b, c, h, w]`, resized: area in [smallest, 1], sides as 3:4 to 4:3."""
    count = len(images)
    draw = torch.rand((4, count), generator=generator, dtype=images.dtype)
    area, ratio = smallest + (1 - smallest) * draw[0], torch.exp((2 * draw[1] - 1) * math.log(4 / 3))
    wide, high = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    zero = torch.zeros_like(wide)
    rows = [
        torch.stack([wide, zero, (1 - wide) * (2 * draw[2] - 1)], 1),
        torch.stack([zero, high, (1 - high) * (2 * draw[3] - 1)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _teacher(train: Part, network: Network, width: int, epochs: int, lr: float, seed: int) -> nn.Sequential:
    """Return a trained network of three blocks with BatchNorm, in evaluation mode."""
    channels = network.shape[0]
    layers: list[nn.Module] = []
    number = mixed("teacher", seed)
    with seeded(number):
        for block in range(3):
            layers += [nn.Conv2d(channels if block == 0 else width, width, 3, padding=1), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(), nn.AvgPool2d(2)]
        features = width * (network.shape[1] // 8) * (network.shape[2] // 8)
        teacher = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, network.classes)).to(train.inputs.dtype)
    source = Shuffled(tuple(train), min(128, len(train.targets)))
    optimizer = torch.optim.Adam(teacher.parameters(), lr)
    for step in range(epochs * -(-len(train.targets) // 128)):
        images, labels = source.batch(step, number)
        optimizer.zero_grad()
        F.cross_entropy(teacher(images), labels).backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)


def _observed(teacher: nn.Sequential, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return logits, and how far the statistics at each BatchNorm are from its running ones."""
    distances, seen = [], images
    for layer in teacher:
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean, var = seen.mean((0, 2, 3)), seen.var((0, 2, 3), correction=0)
            distances.append((mean - layer.running_mean).norm() + (var - layer.running_var).norm())
        seen = layer(seen)
    return seen, distances
