"""Steps for gradients whose scale says little: by sign, normalized, and on counts of examples."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel.optimizers._base import Hyperparameter, Optimizer
from bilevel.optimizers._hyperparameters import check, check_count, resolve, scale
from bilevel.status import InvalidProblem


class CountState(NamedTuple):
    """Steps made."""

    step: int


class _Directional(Optimizer[CountState]):
    """Optimizers without a derivative in the gradient: for the upper level."""

    def init(self, y: Tensor) -> CountState:
        """Return step 0."""
        return CountState(0)

    def sensitivity(self, gradient: Tensor, state: CountState, x: Any = None, y: Tensor | None = None) -> Tensor:
        """Return zeros: the step does not follow the gradient's size."""
        return torch.zeros_like(gradient)


@final
@dataclass(frozen=True)
class Sign(_Directional):
    """Step by the sign of the gradient: `y - lr sign(gradient)`, the usual step of metagradient descent.

    Args:
        lr: >= 0, how far every entry moves; a number, a tensor, or a function of `(x, step)` such as `Cosine`.

    Raises:
        InvalidProblem: lr is out of range.

    Cost:
        No state.

    Notes:
        It does not settle unless lr falls; use a schedule.

    References:
        Engstrom et al., "Optimizing ML training with metagradient descent", 2025, arXiv 2503.13751. Bernstein, Wang,
        Azizzadenesheli, Anandkumar, "signSGD", ICML 2018 (Algorithm 1).

    Example:
        >>> optimizer = Sign(0.1)
        >>> y = torch.tensor([1.0, -2.0, 3.0])
        >>> optimizer.update(y, torch.tensor([5.0, -1e-9, 0.0]), optimizer.init(y))[0]
        tensor([ 0.9000, -1.9000,  3.0000])
    """

    lr: Hyperparameter = 0.1

    def __post_init__(self) -> None:
        check("lr", self.lr, 0.0, math.inf)

    def update(self, y: Tensor, gradient: Tensor, state: CountState, x: Any = None) -> tuple[Tensor, CountState]:
        """Return the next y and state."""
        return y - resolve("lr", self.lr, x, state.step, y) * gradient.sign(), CountState(state.step + 1)

    def with_lr(self, lr: Hyperparameter) -> Sign:
        """Return this optimizer with the step length `lr`."""
        return Sign(lr)

    def scaled(self, factor: float) -> Sign:
        """Return this optimizer with its step length multiplied by `factor` >= 0."""
        return Sign(scale(self.lr, factor))


@final
@dataclass(frozen=True)
class L1Normalized(_Directional):
    """Step along the gradient over its mean absolute entry: `y - lr gradient / mean|gradient|`.

    Args:
        lr: >= 0, how far entries move on average; a number, a tensor, or a function of `(x, step)`.

    Raises:
        InvalidProblem: lr is out of range.

    Cost:
        No state.

    References:
        Engstrom et al., "Optimizing ML training with metagradient descent", 2025, arXiv 2503.13751.

    Example:
        >>> optimizer = L1Normalized(0.1)
        >>> y = torch.zeros(2)
        >>> optimizer.update(y, torch.tensor([30.0, -10.0]), optimizer.init(y))[0]
        tensor([-0.1500,  0.0500])
    """

    lr: Hyperparameter = 0.1

    def __post_init__(self) -> None:
        check("lr", self.lr, 0.0, math.inf)

    def update(self, y: Tensor, gradient: Tensor, state: CountState, x: Any = None) -> tuple[Tensor, CountState]:
        """Return the next y and state."""
        size = gradient.abs().mean(-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        return y - resolve("lr", self.lr, x, state.step, y) * gradient / size, CountState(state.step + 1)

    def with_lr(self, lr: Hyperparameter) -> L1Normalized:
        """Return this optimizer with the step length `lr`."""
        return L1Normalized(lr)

    def scaled(self, factor: float) -> L1Normalized:
        """Return this optimizer with its step length multiplied by `factor` >= 0."""
        return L1Normalized(scale(self.lr, factor))


@final
@dataclass(frozen=True)
class CountSteps(_Directional):
    """Change how often each example is used, by one: `c = clip(c - sign(gradient) m, 0, largest)`.

    Which entries change: a random share of them, `m ~ Bernoulli(share)`, or with `greedy` those of the largest
    gradients. CountSteps stay whole numbers.

    Args:
        share: of the entries that may change in a step, in (0, 1]; a number, or a function of `(x, step)` that falls.
        greedy: take the largest gradients instead of a random choice.
        largest: count that no example exceeds.
        seed: of the random choice.

    Raises:
        InvalidProblem: an option is out of range.

    Cost:
        No state.

    References:
        Engstrom et al., "Optimizing ML training with metagradient descent", 2025, arXiv 2503.13751, on data selection.

    Example:
        >>> optimizer = CountSteps(0.5, greedy=True)
        >>> c = torch.ones(4)
        >>> optimizer.update(c, torch.tensor([0.1, -3.0, 2.0, 0.0]), optimizer.init(c))[0]
        tensor([1., 2., 0., 1.])
    """

    share: Hyperparameter = 0.2
    _: KW_ONLY
    greedy: bool = False
    largest: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        check("share", self.share, 0.0, 1.0)
        check("largest", self.largest, 0.0, math.inf)
        check_count("seed", self.seed, 0)

    def update(self, y: Tensor, gradient: Tensor, state: CountState, x: Any = None) -> tuple[Tensor, CountState]:
        """Return the next counts and state."""
        share = float(resolve("share", self.share, x, state.step, y))
        if self.greedy:
            chosen = torch.zeros_like(y)
            chosen[gradient.abs().topk(round(share * len(y))).indices] = 1.0
        else:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + state.step)
            chosen = (torch.rand(y.shape, generator=generator) < share).to(y)
        return (y.round() - gradient.sign() * chosen).clamp(0.0, self.largest), CountState(state.step + 1)

    def with_lr(self, lr: Hyperparameter) -> CountSteps:
        """Return this optimizer with another share."""
        return replace(self, share=lr)

    def scaled(self, factor: float) -> CountSteps:
        """Return this optimizer with its share multiplied by `factor` in [0, 1].

        Raises:
            InvalidProblem: the factor is not in [0, 1].
        """
        if not 0 <= factor <= 1:
            raise InvalidProblem(f"factor={factor!r} must be in [0, 1].")
        return replace(self, share=scale(self.share, factor))
