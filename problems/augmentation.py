"""Learned augmentation: how far to shift, rotate, scale and blur training pictures with noise, by the hypergradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel.data import Full, Shuffled
from bilevel.modules import functional
from bilevel.optimizers import SGD, Adam
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import Part, mnist
from bilevel.problems.hyper_cleaning import SOURCE, apart
from bilevel.sets import Box
from bilevel.solvers import Metagradient
from bilevel.status import InvalidProblem

KINDS = ("shift", "rotation", "scale", "noise")
STARTS = (0.05, 0.05, 0.05, 0.05)
SIDE = 28


def augmentation(
    seed: int = 0, *, train: int = 200, hidden: int = 64, batch_size: int = 100, device: str = "cpu"
) -> Task:
    """Learn how strongly to augment 200 MNIST digits, so that a small network does well on 1,000 others.

        g = mean of l over a mini-batch whose pictures are moved at random,   f = mean of l on digits left as they are

    x holds four logarithms: the standard deviations of shifts (in half pictures), rotations (in radians), changes of
    scale, and noise of pixels. A picture is moved by interpolation, which is differentiable in the deviations; the
    random numbers are drawn anew at each lower step. y are the parameters of a network 784-64-10 with tanh.

    Args:
        seed: of the split and the network's start.
        train: training digits, at most 3,000.
        hidden: units of the network.
        batch_size: at most `train`.
        device: of all tensors.

    Raises:
        InvalidProblem: an option is out of range, or mlxtend is not installed.

    References:
        Lin, Guo, Li, Yan, Wang, Lin, Ouyang, "Online hyper-parameter learning for auto-augmentation strategy", ICCV
        2019, and Hataya et al., "Meta approach to data augmentation optimization", WACV 2022 (augmentation as an upper
        variable; these magnitudes are simpler).
    """
    if not 1 <= batch_size <= train <= 3000 or hidden < 1:
        raise InvalidProblem(
            f"1 <= batch_size <= train <= 3000 and hidden >= 1 are needed, got {batch_size}, {train}, {hidden}."
        )
    data, (free, held) = mnist(), apart()
    order = free[torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))]
    rows = order[:train], order[train : train + 1000], held
    own, validation, test = (Part(data.inputs[r].to(device), data.targets[r].to(device)) for r in rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = functional(nn.Sequential(nn.Linear(784, hidden), nn.Tanh(), nn.Linear(hidden, 10)).to(device))

    def lower(x: dict[str, Tensor], y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(y, augmented(x, batch[0])), batch[1])

    def upper(x: dict[str, Tensor], y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(y, batch[0]), batch[1])

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        with torch.no_grad():
            right = net(y, test.inputs).argmax(-1) == test.targets
        return {"test_accuracy": float(right.double().mean())} | {kind: float(x[kind].exp()) for kind in KINDS}

    problem = Problem(
        upper=upper, lower=lower, upper_data=Full(tuple(validation)), lower_data=Shuffled(tuple(own), batch_size),
        upper_set=Box(-8.0, 0.0),
    )  # fmt: skip
    start = {kind: torch.tensor(value, device=device).log() for kind, value in zip(KINDS, STARTS, strict=True)}
    return Task(
        "augmentation", problem, start, net.parameters(), steps=15, evaluate=evaluate, source=SOURCE,
        solvers={"Metagradient": Metagradient(lower=SGD(0.2), lower_steps=150, upper=Adam(0.2))},
    )  # fmt: skip


def augmented(x: dict[str, Tensor], images: Tensor) -> Tensor:
    """Move each picture by random amounts of the deviations `exp(x)`, and add noise to its pixels.

    Args:
        x: 0-dim logarithms by name, see `KINDS`.
        images: `[n, 784]`.

    Returns:
        `[n, 784]`, differentiable in x.
    """
    n = len(images)
    draws = torch.randn(n, 4, device=images.device, dtype=images.dtype)
    shifts = x["shift"].exp() * draws[:, :2]
    angle, scale = x["rotation"].exp() * draws[:, 2], (x["scale"].exp() * draws[:, 3]).exp()
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([torch.stack([cosine, -sine, shifts[:, 0]], 1), torch.stack([sine, cosine, shifts[:, 1]], 1)], 1)
    grid = F.affine_grid(maps, [n, 1, SIDE, SIDE], align_corners=False)
    moved = F.grid_sample(images.view(n, 1, SIDE, SIDE), grid, align_corners=False).view(n, -1)
    return moved + x["noise"].exp() * torch.randn_like(moved)
