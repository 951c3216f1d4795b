"""Newton's method on every fold at once, for smooth convex losses of linear scores with a decay of each weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.integrations.sklearn._descent import cholesky
from bilevel.optimizers import LBFGS

DENSE = 1000
"""Weights of one fold beyond which L-BFGS takes the place of Newton's method, whose matrices would be too large."""
NEGLIGIBLE = 1e-18
"""Newton decrement, relative to the objective, after which one step is the last."""
ROUNDING = 1e-12
"""Below this, a decrement that no longer falls is rounding."""
SLOW = 0.3
"""A step is taken with the Hessian of an earlier one as long as the decrement falls by this factor."""


class Loss(ABC):
    """A convex loss of scores `[*, n, c]` against targets shaped alike."""

    @abstractmethod
    def value(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample, `[*, n]`."""

    @abstractmethod
    def slopes(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient in the scores, `[*, n, c]`."""

    @abstractmethod
    def curvatures(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the Hessian in the scores, `[*, n, c, c]`."""


@final
@dataclass(frozen=True)
class Logistic(Loss):
    """`log(1 + e^z) - t z` for one score."""

    def value(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return (F.softplus(scores) - targets * scores).sum(-1)

    def slopes(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return `p - t`."""
        return scores.sigmoid() - targets

    def curvatures(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return `p (1 - p)`."""
        p = scores.sigmoid()
        return torch.diag_embed(p * (1 - p))


@final
@dataclass(frozen=True)
class Softmax(Loss):
    """`log sum_k e^(z_k) - <t, z>`, t one-hot (zero where padded)."""

    def value(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return scores.logsumexp(-1) - (targets * scores).sum(-1)

    def slopes(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return `p - t`."""
        return scores.softmax(-1) - targets

    def curvatures(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return `diag(p) - p p^T`."""
        p = scores.softmax(-1)
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


@final
@dataclass(frozen=True)
class SquaredHinge(Loss):
    """`sum_k max(1 - t_k z_k, 0)^2`, t = -1 or 1 (0 where padded): one machine for each column."""

    def value(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the squared hinge."""
        return F.relu(1 - targets * scores).square().sum(-1)

    def slopes(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return `-2 t max(1 - t z, 0)`."""
        return -2 * targets * F.relu(1 - targets * scores)

    def curvatures(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return 2 within the margin, 0 beyond it."""
        return torch.diag_embed(2.0 * (targets * scores < 1) * targets.square())


def newton(
    loss: Loss,
    train: tuple[Tensor, Tensor, Tensor],
    decay: Tensor,
    y: Tensor,
    near: Tensor | None = None,
    max_steps: int = 100,
) -> tuple[Tensor, Tensor]:
    """Minimize `sum_i s_i loss(A_i y) + sum_j decay_j y_j^2 / 2` in each fold.

    Each fold halves its own steps until its objective falls enough. A Hessian is kept while it serves, corrected by
    what the gradients of later steps say of it. With more than `DENSE` weights, L-BFGS.

    Args:
        loss: of scores.
        train: inputs `[m, n, d]`, targets `[m, n, c]`, weights `[m, n]`.
        decay: `[m, d c]`.
        y: start, `[m, d c]`.
        near: the Hessian of the losses (without decay) at some point not far off, to start with.
        max_steps: of Newton's method.

    Returns:
        The minimizers `[m, d c]`, and the Hessians `[m, d c, d c]` there or at an earlier step; from L-BFGS their
        diagonals `[m, d c]`.

    References:
        Boyd, Vandenberghe, "Convex Optimization", 2004, algorithm 9.5.
    """
    A, t, s = train
    m, c = len(A), t.shape[-1]

    def scores(y: Tensor) -> Tensor:
        return A @ y.view(m, -1, c)

    def value(y: Tensor) -> Tensor:
        return (s * loss.value(scores(y), t)).sum(-1) + (decay * y.square()).sum(-1) / 2

    def gradient(y: Tensor) -> Tensor:
        return (A.mT @ (s.unsqueeze(-1) * loss.slopes(scores(y), t))).reshape(m, -1) + decay * y

    def curvatures(y: Tensor) -> Tensor:
        return s[..., None, None] * loss.curvatures(scores(y), t)

    if y.shape[-1] > DENSE:
        return _scaled_lbfgs(value, gradient, lambda y: _diagonal(A, curvatures(y), decay), y)
    own = torch.diag_embed(decay)
    H = _hessian(A, curvatures(y)) + own if near is None else near + own
    inverse, before, last = Inverse(cholesky(H)), value(y), torch.inf
    for _ in range(max_steps):
        g = gradient(y)
        step = inverse(y, g)
        decrement = (g * step).sum(-1)
        if float((decrement / before).max()) > SLOW * last:
            H = _hessian(A, curvatures(y)) + own
            inverse = Inverse(cholesky(H))
            step = inverse(y, g)
            decrement = (g * step).sum(-1)
        previous, last = last, float((decrement / before).max())
        y, before = _moved(value, y, step, before, decrement)
        if last <= NEGLIGIBLE or ROUNDING > last >= previous:
            break
    return y, H


class Inverse:
    """The inverse of a Hessian of an earlier step, kept near the present one by BFGS updates.

    Args:
        factor: Cholesky factors of the Hessians, `[m, d, d]`.

    References:
        Nocedal, Wright, "Numerical optimization", 2006, algorithm 7.4, with the factor as its first matrix.
    """

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, y: Tensor, g: Tensor) -> Tensor:
        """Return the Newton step `[m, d]` for the gradient g at y, and learn from the change since the last call."""
        if self.last is not None:
            s, z = y - self.last[0], g - self.last[1]
            along = (s * z).sum(-1, keepdim=True)
            usable = along > torch.finfo(y.dtype).eps * z.square().sum(-1, keepdim=True)
            self.pairs.append((s, z, torch.where(usable, 1 / along, 0.0)))
        self.last = y, g
        weights = []
        for s, z, inverse in reversed(self.pairs):
            weights.append(inverse * (s * g).sum(-1, keepdim=True))
            g = g - weights[-1] * z
        step = torch.cholesky_solve(g.unsqueeze(-1), self.factor).squeeze(-1)
        for (s, z, inverse), weight in zip(self.pairs, reversed(weights), strict=True):
            step = step + s * (weight - inverse * (z * step).sum(-1, keepdim=True))
        return step


def _moved(
    value: Callable[[Tensor], Tensor], y: Tensor, step: Tensor, before: Tensor, decrement: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y and its objective after the step, halved in each fold until that falls enough."""
    length, noise = torch.ones_like(decrement), 10 * torch.finfo(y.dtype).eps * before.abs()
    for _ in range(40):
        moved = y - length.unsqueeze(-1) * step
        after = value(moved)
        high = after > before - 1e-4 * length * decrement + noise
        if not bool(high.any()):
            break
        length = torch.where(high, length / 2, length)
    return moved, after


def _scaled_lbfgs(
    value: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor], Tensor],
    diagonal: Callable[[Tensor], Tensor],
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """Minimize in variables in which the Hessian's diagonal is 1; return the minimizer and that diagonal."""
    scale = diagonal(y).rsqrt()
    found = LBFGS(tol=1e-8, max_steps=2000).minimize(
        lambda u: (value(scale * u).sum(), scale * gradient(scale * u)), y / scale
    )
    y = scale * found.y
    return y, diagonal(y)


def _diagonal(A: Tensor, curvatures: Tensor, decay: Tensor) -> Tensor:
    own = A.square().mT @ curvatures.diagonal(dim1=-2, dim2=-1)
    return (own.reshape(decay.shape) + decay).clamp_min(1e-12)


def _hessian(A: Tensor, curvatures: Tensor) -> Tensor:
    m, _, d = A.shape
    c = curvatures.shape[-1]
    whole = A.new_empty(m, d, c, d, c)
    for a in range(c):
        for b in range(a + 1):
            whole[:, :, a, :, b] = whole[:, :, b, :, a] = (A * curvatures[..., a, b, None]).mT @ A
    return whole.reshape(m, d * c, d * c)
