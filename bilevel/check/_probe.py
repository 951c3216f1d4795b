"""One function of some tensors: is its second derivative, as autograd gives it, that of the function?"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Function: TypeAlias = Callable[[Sequence[Tensor]], Tensor]

STEPS = (1e-4, 1e-5, 1e-6, 1e-7)
"""Lengths of the differences, for tensors scaled to entries near 1; only the first two where these settle it."""
AGREE = 1e-3
"""Relative distance below which differences at two step sizes count as one answer."""
NOTHING = 1e-8
"""Relative size below which a product counts as 0."""


class Verdict(enum.Enum):
    """What a comparison of products with the Hessian and differences of the gradient says; the value explains it."""

    RIGHT = "agrees with differences of the gradient"
    KINK = "agrees where no kink lies within the differences"
    UNDECIDED = "differences at several step sizes contradict each other"
    WRONG = "the second derivative is wrong"
    MISSING = "there is no second derivative"
    VANISHES = "the second derivative is taken for zero"
    NON_FINITE = "a derivative is not finite"

    @property
    def faulty(self) -> bool:
        """Whether a hypergradient would be wrong, or not there."""
        return self in {Verdict.WRONG, Verdict.MISSING, Verdict.VANISHES, Verdict.NON_FINITE}


class Finding(NamedTuple):
    """A verdict with its figures.

    Args:
        verdict: what they say.
        error: relative distance of the product and the differences at the step that decided, nan without one.
        spread: relative distance of the differences at two step sizes there.
        message: what torch said, where there is no second derivative.
    """

    verdict: Verdict
    error: float
    spread: float
    message: str = ""


@dataclass
class Probe:
    """H u by double backward and by central differences of the gradient, for a function of float64 tensors.

    Args:
        function: tensors -> 0-dim tensor; the same at every call.
        point: where.
        direction: u, each tensor of the size of the entries it moves.
        tol: relative error that is no error.
    """

    function: Function
    point: list[Tensor]
    direction: list[Tensor]
    tol: float
    _seen: list[tuple[Tensor, float]] = field(default_factory=list, init=False)
    _barred: bool = field(default=False, init=False)

    def finding(self) -> Finding:
        """Compare, at two step sizes, and at shorter ones before any complaint."""
        nan = math.nan
        try:
            product = self.product()
        except (RuntimeError, NotImplementedError) as error:
            text = str(error).strip()
            return Finding(Verdict.MISSING, nan, nan, text.splitlines()[0] if text else type(error).__name__)
        if not bool(product.isfinite().all() and self._difference(0)[0].isfinite().all()):
            return Finding(Verdict.NON_FINITE, nan, nan)
        errors = [self._error(product, k) for k in range(2)]
        quadratic = 30 * errors[1] < errors[0] < 300 * errors[1]  # as it is where a function is smooth but bends
        if errors[1] <= self.tol and (errors[0] <= self.tol or quadratic):
            return Finding(Verdict.RIGHT, min(errors), self._spread(1))
        errors += [self._error(product, k) for k in range(2, len(STEPS))]
        spreads = [self._spread(k) for k in range(1, len(STEPS))]
        if min(errors) <= self.tol:
            return Finding(Verdict.KINK, min(errors), max(spreads))
        last = len(STEPS) - 1
        # Differences across a kink at the point itself are a jump over the step, so they grow tenfold each time.
        if all(self._size(k) > 3 * self._size(k - 1) for k in (last - 1, last)):
            return Finding(Verdict.KINK, nan, spreads[-1])
        if spreads[-1] > AGREE or errors[last] < 10 * spreads[-1]:
            return Finding(Verdict.UNDECIDED, errors[last], spreads[-1])
        if self._barred:
            return Finding(Verdict.MISSING, errors[last], spreads[-1], "an operation is marked once_differentiable")
        nothing = float(product.norm()) <= NOTHING * self._size(last)
        return Finding(Verdict.VANISHES if nothing else Verdict.WRONG, errors[last], spreads[-1])

    def product(self) -> Tensor:
        """Return H u, flat, by double backward."""
        leaves = [tensor.detach().clone().requires_grad_() for tensor in self.point]
        with torch.enable_grad():
            slopes = torch.autograd.grad(self.function(leaves), leaves, create_graph=True, allow_unused=True)
            # Torch ends the graph there with a node that raises, but never comes to it on the way to the leaves.
            self._barred = _holds_error(slopes)
            along = sum(
                ((g * u).sum() for g, u in zip(slopes, self.direction, strict=True) if g is not None),
                torch.zeros((), dtype=torch.float64),
            )
            if not along.requires_grad:
                return torch.zeros_like(self._flat(self.point))
            return self._flat(torch.autograd.grad(along, leaves, allow_unused=True))

    def gradient(self, shift: float) -> Tensor:
        """Return the gradient at `point + shift u`, flat."""
        moved = [p.detach() + shift * u for p, u in zip(self.point, self.direction, strict=True)]
        leaves = [tensor.requires_grad_() for tensor in moved]
        with torch.enable_grad():
            return self._flat(torch.autograd.grad(self.function(leaves), leaves, allow_unused=True))

    def _flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        filled = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, self.point, strict=True)]
        return torch.cat([t.detach().flatten() for t in filled])

    def _difference(self, k: int) -> tuple[Tensor, float]:
        """Return the difference at the k-th step size, and what rounding may have put into it."""
        while len(self._seen) <= k:
            step = STEPS[len(self._seen)]
            ahead, behind = self.gradient(step), self.gradient(-step)
            rounding = 100 * torch.finfo(ahead.dtype).eps * float(ahead.norm() + behind.norm()) / (2 * step)
            self._seen.append(((ahead - behind) / (2 * step), rounding))
        return self._seen[k]

    def _size(self, k: int) -> float:
        return float(self._difference(k)[0].norm())

    def _error(self, product: Tensor, k: int) -> float:
        difference, rounding = self._difference(k)
        return _apart(product, difference, rounding)

    def _spread(self, k: int) -> float:
        difference, rounding = self._difference(k)
        return _apart(self._difference(k - 1)[0], difference, rounding)


def _holds_error(tensors: Sequence[Tensor | None]) -> bool:
    queue = [t.grad_fn for t in tensors if t is not None]
    seen: set[Any] = set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [before for before, _ in node.next_functions]
    return any(node.name().endswith("::Error") for node in seen)


def _apart(one: Tensor, other: Tensor, rounding: float) -> float:
    """Return the relative distance of two vectors, 0 where rounding explains it."""
    distance = float((one - other).norm())
    if distance <= rounding:
        return 0.0
    return distance / max(float(other.norm()), float(one.norm()), torch.finfo(torch.float64).tiny)
