"""Learning rates of short inner solves, tuned before a run and followed through it by whether the loss ever rose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.optimizers import Adam
from bilevel.status import InvalidProblem


class Rate(NamedTuple):
    """A learning rate, and how many solves since it was last changed ran, and rose."""

    lr: float
    runs: int = 0
    rose: int = 0


@dataclass(frozen=True)
class RateControl:
    """Keep a learning rate near the largest at which the loss of a solve falls at every step.

    Before a run: multiply it by `up` until a solve's loss rises somewhere, then once by `back`. In the run, every
    `every` solves: multiply it by `shrink` if the share of solves that rose is at least `often`, by `grow` if the share
    of those that did not is at least `seldom`.

    Args:
        start: > 0, the first rate tried.
        up: > 1.
        back: in (0, 1).
        trials: most solves spent before a run; 0 takes `start` as it is.
        every: >= 1.
        shrink: in (0, 1).
        often: share in [0, 1].
        grow: > 1.
        seldom: share in [0, 1].

    Raises:
        InvalidProblem: an option is out of its range.

    References:
        The values are those of Loo, Hasani, Lechner, Rus, ICML 2023, arXiv 2302.06755 (their code).

    Example:
        >>> control = RateControl(start=0.1, trials=20)
        >>> round(control.tuned(lambda lr: lr < 0.2).lr, 4)  # 0.1 -> 0.12 -> 0.144 -> 0.1728 -> 0.2074, times 0.7
        0.1452
    """

    start: float = 1e-3
    up: float = 1.2
    back: float = 0.7
    trials: int = 30
    every: int = 50
    shrink: float = 0.9
    often: float = 0.29
    grow: float = 1.05
    seldom: float = 0.7

    def __post_init__(self) -> None:
        factors = self.start > 0 and self.up > 1 and 0 < self.back < 1 and 0 < self.shrink < 1 and self.grow > 1
        if not factors or self.every < 1 or self.trials < 0:
            raise InvalidProblem(f"RateControl: a factor or a count is out of its range: {self}.")
        if not (0 <= self.often <= 1 and 0 <= self.seldom <= 1):
            raise InvalidProblem(f"RateControl: often and seldom are shares in [0, 1], got {self}.")

    def tuned(self, falls: Callable[[float], bool]) -> Rate:
        """Return the rate to begin with.

        Args:
            falls: rate -> whether the loss of a solve with it falls at every step.
        """
        lr = self.start
        for _ in range(self.trials):
            if not falls(lr):
                return Rate(lr * self.back)
            lr *= self.up
        return Rate(lr)

    def followed(self, rate: Rate, *, rose: bool) -> Rate:
        """Return the rate after one more solve."""
        rate = Rate(rate.lr, rate.runs + 1, rate.rose + int(rose))
        if rate.runs < self.every:
            return rate
        share = rate.rose / rate.runs
        if share >= self.often:
            return Rate(rate.lr * self.shrink)
        return Rate(rate.lr * self.grow) if 1 - share >= self.seldom else Rate(rate.lr)


class Descended(NamedTuple):
    """Where Adam stopped on a quadratic.

    Args:
        value: the point.
        product: H times it.
        rose: whether the loss rose at a step, or ceased to be finite.
    """

    value: Tensor
    product: Tensor
    rose: bool


def adam_on_quadratic(hvp: Callable[[Tensor], Tensor], b: Tensor, lr: float, steps: int) -> Descended:
    """Minimize `v^T H v / 2 - b^T v` by Adam steps from 0.

    Args:
        hvp: v -> H v.
        b: `[d]`.
        lr: > 0.
        steps: >= 0.

    Cost:
        One product with H a step.
    """
    optimizer = Adam(lr)
    v, product = torch.zeros_like(b), torch.zeros_like(b)
    state, losses = optimizer.init(b), [b.new_zeros(())]
    for _ in range(steps):
        v, state = optimizer.update(v, product - b, state)
        product = hvp(v)
        losses.append(0.5 * torch.dot(v, product) - torch.dot(b, v))
    trace = torch.stack(losses)
    slack = 100 * torch.finfo(trace.dtype).eps * trace.abs().max()  # at the minimum, rounding alone moves the loss
    rose = not bool((trace[1:] <= trace[:-1] + slack).all() & trace.isfinite().all())
    return Descended(v, product, rose)
