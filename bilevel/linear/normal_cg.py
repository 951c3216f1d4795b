"""Conjugate gradients on the normal equations: any A, at the price of its squared condition number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bilevel.linear._base import LinearSolution, LinearSolver, Operator, dot, norm
from bilevel.linear._krylov import Correction, correct, step_limit
from bilevel.linear._rows import (
    OPEN,
    Products,
    at_door,
    check_period,
    mark,
    open_codes,
    require_at_least,
    require_nonnegative,
)
from bilevel.status import Status


@dataclass(frozen=True)
class NormalCG(LinearSolver):
    """Solve C^T C w = C^T b by conjugate gradients, C = A + damping I; A may be indefinite or not symmetric.

        q = C p;  a = ‖s‖² / ‖q‖²;  w += a p;  r -= a q;  s' = C^T r;  p = s' + (‖s'‖² / ‖s‖²) p

    The error after k steps shrinks like ((κ - 1) / (κ + 1))^k, κ the condition number of C itself, not its root: use CG
    where A is positive definite, MINRES where it is symmetric.

    Args:
        tol: >= 0, stop a row where ‖b - C w‖ <= tol ‖b‖.
        max_steps: >= 1; None means 2 d.
        damping: >= 0, units of A; on an indefinite A it can make the system singular.
        check_every: >= 1, steps between two looks whether all rows are done; None is 1 on a CPU, 5 elsewhere.
        flat: >= 0: a row is SINGULAR where ‖C^T r‖ <= flat ‖C‖ ‖r‖ with r above the tolerance; None is ten units of
            rounding.

    Cost:
        Two products a step (the second with A^T if the operator has it), one to begin, one to recompute the residual;
        5 vectors of memory.

    Notes:
        SINGULAR rows hold the least-squares solution of least norm. Negative curvature is no obstacle; `curvature`
        holds Rayleigh quotients p^T A p / ‖p‖² of the directions.

    References:
        Hestenes and Stiefel, 1952, Journal of Research of the National Bureau of Standards 49(6).
        Björck, 1996, Numerical Methods for Least Squares Problems, SIAM (CGLS).

    Example:
        >>> import torch
        >>> from bilevel.linear import NormalCG, Operator
        >>> A = torch.tensor([[0.0, 1.0], [-2.0, 0.0]])
        >>> operator = Operator(lambda v: v @ A.T, apply_transpose=lambda v: v @ A)
        >>> NormalCG().solve(operator, torch.tensor([1.0, 2.0])).value.round(decimals=4)
        tensor([-1.,  1.])
    """

    tol: float = 1e-3
    max_steps: int | None = 20
    damping: float = 0.0
    check_every: int | None = None
    flat: float | None = None

    def __post_init__(self) -> None:
        require_nonnegative("NormalCG", tol=self.tol, damping=self.damping, flat=self.flat)
        require_at_least("NormalCG", 1, max_steps=self.max_steps, check_every=self.check_every)

    def solve(
        self, operator: Operator, b: Tensor, x0: Tensor | None = None, *, tol: float | None = None
    ) -> LinearSolution:
        """Solve; see `LinearSolver.solve`."""
        b, x0 = at_door("NormalCG", b, x0)
        products = Products(operator, self.damping)
        steps = step_limit(self.max_steps, b)
        return correct(partial(self._descend, products), products, b, x0, self.tol if tol is None else tol, steps)

    def _descend(self, products: Products, start: Tensor, target: Tensor, active: Tensor, budget: int) -> Correction:
        """Reduce ‖start - C e‖ to `target` in the active rows; scalars are `[..., 1]` in float64."""
        rounding, dtype = torch.finfo(start.dtype).eps, start.dtype
        flat = 10 * rounding if self.flat is None else self.flat
        period = check_period(self.check_every, start.device)
        e, r, codes, step = torch.zeros_like(start), start, open_codes(target), 0
        s = products.transpose(r)
        square, scale = dot(s, s), norm(s) / norm(r)
        codes = mark(codes, active & ~square.isfinite(), Status.NON_FINITE)
        codes = mark(codes, active & (square == 0), Status.SINGULAR)
        p = torch.where(active & (codes == OPEN), s, 0.0)
        low, high = torch.full_like(target, torch.inf), torch.full_like(target, -torch.inf)
        working = active & (codes == OPEN)
        for step in range(1, budget + 1):
            q = products(p)
            length, size = dot(p, p), dot(q, q)
            codes = mark(codes, working & ~(size + square).isfinite(), Status.NON_FINITE)
            codes = mark(codes, working & (size == 0), Status.SINGULAR)
            working = working & (codes == OPEN)
            rayleigh = dot(p, q) / length
            low = torch.where(working, torch.minimum(low, rayleigh), low)
            high = torch.where(working, torch.maximum(high, rayleigh), high)
            scale = torch.where(working, torch.maximum(scale, (size / length).sqrt()), scale)
            a = torch.where(working, square / size, 0.0)
            e = e + (a * p).to(dtype)
            r = torch.where(working, r - (a * q).to(dtype), r)
            reached = norm(r) <= torch.maximum(target, rounding * scale * norm(e))
            codes = mark(codes, working & reached, Status.CONVERGED)
            s = products.transpose(r)
            last, square = square, dot(s, s)
            codes = mark(codes, working & (square.sqrt() <= flat * scale * norm(r)), Status.SINGULAR)
            working = working & (codes == OPEN)
            p = torch.where(working, s + (square / last * p).to(dtype), 0.0)
            if step % period == 0 and not bool(working.any()):
                break
        return Correction(e, codes, step, low, high)
