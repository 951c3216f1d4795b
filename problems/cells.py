"""Architecture search: which operations the edges of a small cell should be, on digits of 8 by 8 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.data import Shuffled
from bilevel.modules import functional
from bilevel.optimizers import Adam
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import Part, Split, digits, shares
from bilevel.regularizers import L2
from bilevel.solvers.published import darts

SOURCE = "Alpaydin, Kaynak: optical recognition of handwritten digits, 1998 (CC BY 4.0); scikit-learn (BSD-3)"
OPERATIONS = ("zero", "skip", "conv 3x3", "dilated conv 3x3", "average pool", "max pool")
NODES = 3
EDGES = tuple((source, node) for node in range(1, NODES + 1) for source in range(node))
"""(from, to) of each row of x; node 0 is the input of the cell."""
KEPT = 2
"""Edges into each node of a discrete cell."""


class Edge(NamedTuple):
    """One edge of a discrete cell: the node it comes from, the node it leads to, and the name of its operation."""

    source: int
    node: int
    operation: str


def cell_search(seed: int = 0, *, channels: int = 6, epochs: int = 30, random_cells: int = 3) -> Task:
    """Choose the operations of a cell by mixing them: x are logits of each edge's mixture, y the network's weights.

        node_j = sum over edges (i, j) of  sum_o softmax(x_ij)_o o(node_i; y),   f and g cross-entropies

    The network is one convolution, the cell (three nodes, six edges, six operations), the mean over pixels, and a
    linear layer. 500 digits train, 500 validate, 797 test. `darts()` is made for it; implicit solvers refuse, as y is
    never near a minimum.

    `evaluate` derives the discrete cell (for each node its two strongest edges, with the strongest operation of each
    that is not zero), trains it anew on training and validation data, and tells its accuracy on the test data, that of
    random cells trained alike, and the largest eigenvalue of the Hessian of f in x on the validation data. Where that
    eigenvalue grows in the course of a search, the discrete cell tends to be poor (many skips).

    Args:
        seed: of the split, the start, and evaluation.
        channels: of the cell; the discrete cell has as many.
        epochs: in which evaluation trains each cell.
        random_cells: how many random cells evaluation trains for comparison.

    References:
        Liu, Simonyan, Yang, "DARTS: differentiable architecture search", ICLR 2019. Zela, Elsken, Saikia, Marrakchi,
        Brox, Hutter, "Understanding and robustifying differentiable architecture search", ICLR 2020, for the
        eigenvalue.
    """
    split = small_split(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = functional(Network(channels))
        x0 = 1e-3 * torch.randn(len(EDGES), len(OPERATIONS))

    def loss(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(net(y, batch[0], x), batch[1])

    def evaluate(x: Tensor, y: dict[str, Tensor]) -> dict[str, Any]:
        cell = discrete_cell(x)
        generator = torch.Generator().manual_seed(seed)
        others = [discrete_cell(torch.randn(x.shape, generator=generator)) for _ in range(random_cells)]
        accuracies = [accuracy(other, split, channels, epochs, seed) for other in others]
        return {
            "test_accuracy": accuracy(cell, split, channels, epochs, seed),
            "random_cells": sum(accuracies) / len(accuracies) if accuracies else float("nan"),
            "eigenvalue": largest_eigenvalue(lambda point: loss(point, y, tuple(split.validation)), x),
            "skips": float(sum(edge.operation == "skip" for edge in cell)),
        }

    # The paper's upper rate of 3e-4 is made for twenty thousand steps.
    solver = darts(0.05, upper=Adam(0.02, betas=(0.5, 0.999), weight_decay=1e-3))
    problem = Problem(
        upper=loss, lower=loss, regularizer=L2(1e-3),
        upper_data=Shuffled(tuple(split.validation), 64), lower_data=Shuffled(tuple(split.train), 64),
    )  # fmt: skip
    return Task(
        "cell-search", problem, x0, net.parameters(),
        steps=300, evaluate=evaluate, source=SOURCE, solvers={"darts": solver},
    )  # fmt: skip


def small_split(seed: int) -> Split:
    """Return 500 digits of 8 by 8 pixels to train, 500 to validate, 797 to test."""
    small = digits()
    data = Part(small.inputs.float().view(-1, 1, 8, 8), small.targets)
    return shares(data, 500 / len(data.targets), 500 / len(data.targets), seed)


def discrete_cell(x: Tensor) -> tuple[Edge, ...]:
    """Return the cell that logits stand for: of the edges into a node the strongest two, each with one operation.

    An edge is as strong as the largest weight of its operations but zero, which is then its operation.

    Example:
        >>> cell = discrete_cell(torch.eye(6))
        >>> cell[0], len(cell)
        (Edge(source=0, node=1, operation='skip'), 5)
    """
    strength, operation = x.detach().softmax(-1)[:, 1:].max(-1)
    cell = []
    for node in range(1, NODES + 1):
        rows = [row for row, (_, to) in enumerate(EDGES) if to == node]
        strongest = sorted(rows, key=lambda row: -float(strength[row]))[:KEPT]
        cell += [Edge(EDGES[row][0], node, OPERATIONS[1 + int(operation[row])]) for row in sorted(strongest)]
    return tuple(cell)


def accuracy(cell: tuple[Edge, ...], split: Split, channels: int, epochs: int, seed: int) -> float:
    """Train a discrete cell on training and validation data, and return its accuracy on the test data."""
    images, labels = (torch.cat(pair) for pair in zip(split.train, split.validation, strict=True))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = Network(channels, cell)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=3e-4)
        steps = epochs * -(-len(labels) // 64)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for _ in range(epochs):
            for rows in torch.randperm(len(labels)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(images[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    net.eval()
    with torch.no_grad():
        return float((net(split.test.inputs).argmax(-1) == split.test.targets).double().mean())


def largest_eigenvalue(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the largest eigenvalue of the Hessian of a function at x."""
    hessian = torch.autograd.functional.hessian(function, x.detach()).reshape(x.numel(), x.numel())
    return float(torch.linalg.eigvalsh(hessian.double())[-1])


class Network(nn.Module):
    """A convolution, a cell, the mean over pixels, a linear layer.

    Args:
        channels: of the cell.
        cell: discrete; None for one that mixes all operations by the logits it is called with.
    """

    def __init__(self, channels: int, cell: tuple[Edge, ...] | None = None) -> None:
        super().__init__()
        mixed = cell is None
        # Without scale and shift in the search, or they would undo what the mixture's weights say.
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.edges = [(source, node) for source, node, _ in cell] if cell is not None else list(EDGES)
        names = [OPERATIONS[1:]] * len(EDGES) if cell is None else [(edge.operation,) for edge in cell]
        self.operations = nn.ModuleList(
            nn.ModuleList(_operation(name, channels, affine=not mixed) for name in each) for each in names
        )
        self.last = nn.Linear(NODES * channels, 10)

    def forward(self, images: Tensor, logits: Tensor | None = None) -> Tensor:
        """Return logits of classes `[n, 10]`."""
        nodes = [self.stem(images)]
        for node in range(1, NODES + 1):
            total = torch.zeros_like(nodes[0])
            for row, (source, to) in enumerate(self.edges):
                if to == node:
                    total = total + self._edge(row, nodes[source], logits)
            nodes.append(total)
        output: Tensor = self.last(torch.cat(nodes[1:], 1).mean((2, 3)))
        return output

    def _edge(self, row: int, features: Tensor, logits: Tensor | None) -> Tensor:
        operations: Any = self.operations[row]
        if logits is None:
            only: Tensor = operations[0](features)
            return only
        weights = logits[row].softmax(-1)[1:]  # that of zero adds nothing
        total = torch.zeros_like(features)
        for weight, operation in zip(weights, operations, strict=True):
            total = total + weight * operation(features)
        return total


def _operation(name: str, channels: int, *, affine: bool) -> nn.Module:
    if name == "skip":
        return nn.Identity()
    if name in ("conv 3x3", "dilated conv 3x3"):
        reach = 2 if name.startswith("dilated") else 1
        convolution = nn.Conv2d(channels, channels, 3, padding=reach, dilation=reach, bias=False)
        return nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(channels, affine=affine))
    pool = nn.AvgPool2d(3, 1, 1) if name == "average pool" else nn.MaxPool2d(3, 1, 1)
    return nn.Sequential(pool, nn.BatchNorm2d(channels, affine=affine))
