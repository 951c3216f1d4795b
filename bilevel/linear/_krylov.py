"""What the Krylov methods share: correction rounds around a kernel, and Ritz values from a tridiagonal matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.linear._base import LinearSolution, norm, relative_residual
from bilevel.linear._rows import CODE, OPEN, Products, curvature_range, mark, open_codes, start, worst
from bilevel.status import Status

MOST_RITZ = 300
"""Steps whose tridiagonal matrix is kept: its eigenvalues cost the cube."""


@dataclass(frozen=True)
class Correction:
    """What a kernel returns: e with A e ≈ r in the open rows, and how each row ended (`[..., 1]`)."""

    value: Tensor
    codes: Tensor
    steps: int
    low: Tensor
    high: Tensor


Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, int], Correction]
"""(r, target, active, budget) -> Correction: shrink ‖r - A e‖ to `target` in the active rows within `budget` steps."""


def step_limit(max_steps: int | None, b: Tensor) -> int:
    """Return the most steps; where there is no number, twice as many as exact arithmetic would need."""
    return 2 * b.shape[-1] if max_steps is None else max_steps


def correct(
    kernel: Kernel, products: Products, b: Tensor, x0: Tensor | None, tol: float, max_steps: int, progress: float = 0.5
) -> LinearSolution:
    """Solve by rounds of w += e, A e ≈ b - A w, each checked against the recomputed residual.

    One round is the rule. Another follows in rows whose recurrence said "converged" where the recomputed residual says
    "not yet" (drift in low precision, or a restarted method), as long as rounds reduce it by the factor `progress`.
    """
    size = norm(b)
    target = tol * size
    w, r = start(products, b, x0)
    codes = mark(open_codes(size), ~size.isfinite(), Status.NON_FINITE)
    codes = mark(codes, norm(r) <= target, Status.CONVERGED)
    active, steps = codes == OPEN, 0
    low, high = torch.full_like(size, torch.inf), torch.full_like(size, -torch.inf)
    while steps < max_steps and bool(active.any()):
        found = kernel(r, target, active, max_steps - steps)
        before, first = norm(r), steps == 0
        tried = torch.where(active, w + found.value, w)
        trial = b - products(tried)
        better = active & (first | (norm(trial) <= before))
        w, r = torch.where(better, tried, w), torch.where(better, trial, r)
        steps += found.steps
        low, high = torch.minimum(low, found.low), torch.maximum(high, found.high)
        codes = torch.where(active, _verdict(found.codes, norm(r) <= tol * size), codes)
        active = active & (codes == OPEN) & (norm(r) <= progress * before)
        # No residual gets below the rounding of A w.
        target = torch.maximum(tol * size, torch.finfo(b.dtype).eps * high.clamp_min(0) * norm(w))
        active = active & (norm(r) > target)
    if bool(_empty(codes, w, size).any()):
        w, r = _something(codes, w, b, size, low, high, products)
    return LinearSolution(
        value=w,
        status=worst(codes),
        residual=relative_residual(r, b),
        steps=steps,
        products=products.count,
        curvature=curvature_range(low, high, products.damping),
    )


def _verdict(codes: Tensor, reached: Tensor) -> Tensor:
    """Let the recomputed residual overrule the recurrence; flags about curvature and finiteness stay."""
    kept = (codes == CODE[Status.NEGATIVE_CURVATURE]) | (codes == CODE[Status.NON_FINITE])
    unproven = (codes == CODE[Status.CONVERGED]) & ~reached
    codes = torch.where(reached & ~kept, CODE[Status.CONVERGED], codes)
    return torch.where(unproven, OPEN, codes)


def _empty(codes: Tensor, w: Tensor, size: Tensor) -> Tensor:
    """Return the rows that failed before their first step from zero."""
    return (codes > OPEN) & (size > 0) & (norm(w) == 0)


def _something(
    codes: Tensor, w: Tensor, b: Tensor, size: Tensor, low: Tensor, high: Tensor, products: Products
) -> tuple[Tensor, Tensor]:
    """Return b / |curvature| instead of zeros, and the residuals."""
    scale = torch.maximum(low.abs(), high.abs())
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    w = torch.where(_empty(codes, w, size), (b / scale).to(b.dtype), w)
    return w, b - products(w)


@dataclass
class Tridiagonal:
    """The Lanczos matrix of each row as it grows; its eigenvalues (Ritz values) lie inside the spectrum."""

    diagonal: list[Tensor] = field(default_factory=list)
    beside: list[Tensor] = field(default_factory=list)

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest Ritz value of each row, `[..., 1]`.

        Entries that are not numbers mark steps that a row did not make; they are replaced by a copy of its first one.
        """
        diagonal = torch.cat(self.diagonal[:MOST_RITZ], -1)
        first = diagonal[..., :1]
        diagonal = torch.where(diagonal.isfinite(), diagonal, first)
        matrix = torch.diag_embed(diagonal)
        if diagonal.shape[-1] > 1:
            beside = torch.cat(self.beside[: diagonal.shape[-1] - 1], -1).nan_to_num(0.0, 0.0, 0.0)
            matrix = matrix + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        known = first.isfinite()
        ritz = torch.linalg.eigvalsh(torch.where(known.unsqueeze(-1), matrix, 0.0))
        return torch.where(known, ritz[..., :1], torch.inf), torch.where(known, ritz[..., -1:], -torch.inf)
