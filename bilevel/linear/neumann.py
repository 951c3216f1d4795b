"""The truncated Neumann series: a fixed number of gradient steps on the quadratic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear._base import LinearSolution, LinearSolver, Operator, dot, norm, relative_residual
from bilevel.linear._lanczos import random_signs, ritz_range
from bilevel.linear._rows import (
    CODE,
    OPEN,
    Products,
    at_door,
    check_period,
    curvature_range,
    mark,
    open_codes,
    require,
    require_at_least,
    require_nonnegative,
    start,
    worst,
)
from bilevel.status import Status

GROWTHS = 3
"""Terms in a row that may grow before the series counts as diverging."""


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """Sum w = α Σ_{k=0..terms} (I - α A)^k b; A positive definite and 0 < α < 2 / L, L the largest curvature.

        w += α v;  v -= α A v       from w = 0, v = b

    v is the residual of w all along, and w is what terms + 1 gradient steps of size α on ½ w^T A w - b^T w give. What
    is left out shrinks like (1 - α μ)^(terms + 1), μ the least curvature: slow where CG is fast, but its bias is smooth
    and its cost fixed. `terms=0` is w = α b.

    Args:
        terms: >= 0, terms beyond the first.
        alpha: > 0, units of 1 / A; None takes 1 / (1.05 L), with the operator's
            `largest` for L if it has one, else an estimate in each row.
        damping: >= 0, units of A.
        tol: >= 0, stop a row where ‖b - A w‖ <= tol ‖b‖.
        check: spend the one product that gives the residual after the last term; without it the residual is reported
            as not a number and the status is APPROXIMATE.
        estimate_steps: >= 1, products spent on L if `alpha` is None.
        seed: of the random start of that estimate.
        check_every: >= 1, steps between two looks whether all rows are done; None is 1 on a CPU, 5 elsewhere.

    Cost:
        `terms` products, one with `check`, one for a warm start, `estimate_steps` to find L; 3 vectors of memory.

    Notes:
        Where terms grow three times in a row, α is halved once and the row starts over; where they grow again it is
        DIVERGED, or NEGATIVE_CURVATURE if the growing term has negative curvature or the estimate saw some. Then
        `curvature` holds (least, L): take alpha < 1 / L. A = 0 is SINGULAR.

    References:
        Lorraine, Vicol and Duvenaud, 2020, AISTATS, arXiv:1911.02590.

    Example:
        >>> import torch
        >>> from bilevel.linear import Neumann, Operator
        >>> Neumann(terms=1, alpha=0.5).solve(Operator(lambda v: v), torch.ones(1)).value
        tensor([0.7500])
    """

    terms: int = 10
    alpha: float | None = None
    damping: float = 0.0
    tol: float = 1e-3
    check: bool = True
    estimate_steps: int = 10
    seed: int = 0
    check_every: int | None = None

    def __post_init__(self) -> None:
        require_at_least("Neumann", 0, terms=self.terms)
        require_at_least("Neumann", 1, estimate_steps=self.estimate_steps, check_every=self.check_every)
        require_nonnegative("Neumann", alpha=self.alpha, damping=self.damping, tol=self.tol)
        require(self.alpha != 0, "Neumann: alpha must be > 0, got 0; try alpha=None, which estimates it.")

    def solve(
        self, operator: Operator, b: Tensor, x0: Tensor | None = None, *, tol: float | None = None
    ) -> LinearSolution:
        """Solve; see `LinearSolver.solve`."""
        b, x0 = at_door("Neumann", b, x0)
        products, size = Products(operator, self.damping), norm(b)
        alpha, low, high = self._step_length(products, b, operator.largest)
        w_start, v_start = start(products, b, x0)
        target = (self.tol if tol is None else tol) * size
        eps = 10 * torch.finfo(b.dtype).eps
        w, v, period = w_start, v_start, check_period(self.check_every, b.device)
        codes = mark(open_codes(size), ~size.isfinite(), Status.NON_FINITE)
        growths, halved = torch.zeros_like(size), torch.zeros_like(size, dtype=torch.bool)
        step = 0
        for step in range(1, self.terms + 2):
            codes = mark(codes, norm(v) <= target, Status.CONVERGED)
            working = codes == OPEN
            if (step - 1) % period == 0 and not bool(working.any()):
                step -= 1
                break
            w = torch.where(working, w + (alpha * v).to(b.dtype), w)
            if step == self.terms + 1 and not self.check:
                break
            product = products(v)
            square = dot(v, v)
            rayleigh = torch.where(working & (square > 0), dot(v, product) / square, torch.nan)
            low, high = torch.fmin(low, rayleigh), torch.fmax(high, rayleigh)
            codes = mark(codes, working & (norm(product) == 0), Status.SINGULAR)
            v = torch.where(working, v - (alpha * product).to(b.dtype), v)
            codes = mark(codes, working & ~norm(v).isfinite(), Status.NON_FINITE)
            growths = torch.where(working & (norm(v) > square.sqrt()), growths + 1, 0)
            diverging = growths >= GROWTHS
            codes = mark(codes, diverging & (rayleigh < 0), Status.NEGATIVE_CURVATURE)
            codes = mark(codes, diverging & halved, Status.DIVERGED)
            again = diverging & (codes == OPEN)
            alpha, halved = torch.where(again, alpha / 2, alpha), halved | again
            growths = torch.where(again, 0, growths)
            w, v = torch.where(again, w_start, w), torch.where(again, v_start, v)
        codes = mark(codes, norm(v) <= target, Status.CONVERGED)
        codes = mark(codes, low < -eps * high.abs(), Status.NEGATIVE_CURVATURE)
        return self._report(products, b, w, v, codes, low, high, step)

    def _step_length(self, products: Products, b: Tensor, largest: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return α of each row, and the curvature of A + damping seen on the way (none: nan)."""
        unknown = torch.full_like(norm(b), torch.nan)
        if self.alpha is not None:
            return torch.full_like(unknown, self.alpha), unknown, unknown
        if largest is not None:
            return torch.ones_like(unknown) / (1.05 * (largest + self.damping)), unknown, unknown
        low, high = ritz_range(products, random_signs(b, self.seed), self.estimate_steps)
        found = torch.maximum(low.abs(), high.abs())
        return torch.where((found > 0) & found.isfinite(), 1 / (1.05 * found), 1.0), low, high

    def _report(
        self, products: Products, b: Tensor, w: Tensor, v: Tensor, codes: Tensor, low: Tensor, high: Tensor, steps: int
    ) -> LinearSolution:
        if bool((codes == CODE[Status.DIVERGED]).any()):
            # The growing term points along the largest curvature: a few products from there give it sharply.
            ritz = ritz_range(products, v, 5)
            low, high = torch.fmin(low, ritz[0]), torch.fmax(high, ritz[1])
        residual = relative_residual(v, b)
        if not self.check:
            known = (codes == CODE[Status.CONVERGED]).squeeze(-1)
            residual = torch.where(known, residual, torch.nan)
            codes = torch.where(codes == OPEN, CODE[Status.APPROXIMATE], codes)
        return LinearSolution(
            value=w,
            status=worst(codes),
            residual=residual,
            steps=steps,
            products=products.count,
            curvature=curvature_range(low.nan_to_num(torch.inf), high.nan_to_num(-torch.inf), self.damping),
        )
