"""A pool of networks at various ages of training, so that no single one is overfitted to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from bilevel.data._seeding import mixed
from bilevel.optimizers import Adam, Optimizer
from bilevel.oracles import Oracles
from bilevel.problems.distillation.networks import Network
from bilevel.status import InvalidProblem


class Member(NamedTuple):
    """One network of the pool.

    Args:
        y: its weights `[d]`.
        optimizer: state of its optimizer.
        age: training steps so far.
        births: networks that had its place, itself included.
    """

    y: Tensor
    optimizer: Any
    age: int
    births: int


@dataclass(frozen=True)
class Pool:
    """How networks of a pool live: drawn at random, trained a little on x after each use, replaced when they are old.

    Args:
        size: networks, >= 1.
        steps: least and greatest number of training steps after each use, drawn uniformly.
        age: training steps after which a network is replaced by a fresh one, >= 1.
        optimizer: of the networks.
        seed: of starts and draws.

    Raises:
        InvalidProblem: an option is out of its range.
    """

    size: int = 10
    steps: tuple[int, int] = (1, 1)
    age: int = 100
    optimizer: Optimizer[Any] = field(default_factory=lambda: Adam(lr=3e-4))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.age < 1 or not 0 <= self.steps[0] <= self.steps[1]:
            raise InvalidProblem(
                f"Pool: size and age must be >= 1 and steps (least, greatest) from 0, got {self.size}, {self.age}, "
                f"{self.steps}."
            )

    def init(self, oracles: Oracles, network: Network, dtype: torch.dtype) -> tuple[Member, ...]:
        """Return networks that are all fresh."""
        return tuple(self._fresh(oracles, network, place, 0, dtype) for place in range(self.size))

    def draw(self, step: int) -> int:
        """Return the place of the network for an upper step."""
        return int(torch.randint(self.size, (), generator=self._generator("draw", step)))

    def advanced(
        self, oracles: Oracles, network: Network, members: tuple[Member, ...], place: int, x: Tensor, step: int
    ) -> tuple[Member, ...]:
        """Return the pool after one network was trained on x, or replaced."""
        member = members[place]
        least, greatest = self.steps
        count = int(torch.randint(least, greatest + 1, (), generator=self._generator("steps", step)))
        nested = oracles.x_layout.unflatten(x)
        y, optimizer = member.y, member.optimizer
        for k in range(count):
            _, gradient = oracles.lower_gradient(x, y, step * max(greatest, 1) + k)
            y, optimizer = self.optimizer.update(y, gradient, optimizer, nested)
        after = Member(y, optimizer, member.age + max(count, 1), member.births)
        if after.age >= self.age:
            after = self._fresh(oracles, network, place, member.births, x.dtype)
        return (*members[:place], after, *members[place + 1 :])

    def _fresh(self, oracles: Oracles, network: Network, place: int, births: int, dtype: torch.dtype) -> Member:
        y = oracles.y_layout.flatten(network.start(mixed("pool", self.seed, place, births), dtype))
        return Member(y, self.optimizer.init(y), 0, births + 1)

    def _generator(self, what: str, step: int) -> Generator:
        return Generator().manual_seed(mixed(what, self.seed, step))
