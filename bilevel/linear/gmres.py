"""Restarted GMRES: the smallest residual over the Krylov space, for A that is not symmetric."""

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
class GMRES(LinearSolver):
    """Minimize ‖b - (A + damping I) w‖ over the Krylov space of up to `restart` vectors, then start over from there.

        A V_k = V_{k+1} H_k  (Arnoldi);   w = V_k y,  y minimizes ‖ ‖b‖ e_1 - H_k y ‖

    For maps that are not symmetric (fixed points of momentum or proximal steps). Only products with A are used.

    Args:
        tol: >= 0, stop a row where ‖b - A w‖ <= tol ‖b‖.
        max_steps: >= 1, over all restarts; None means 2 d.
        restart: >= 1, length m of a cycle.
        damping: >= 0, units of A.
        check_every: >= 1, steps between two looks whether all rows are done; None is 1 on a CPU, 5 elsewhere.

    Cost:
        One product a step and one a cycle; in step k of a cycle k inner products; restart + 3 vectors of memory.

    Notes:
        Short cycles can stall: where one reduces the residual by less than a thousandth its rows end at the STEP_LIMIT.
        SINGULAR: the Krylov space is exhausted (it is all of R^d at the latest) and the residual is still large; the
        value is a least-squares solution over it. `curvature`: eigenvalues of the symmetric part of H_k, which lie in
        the spectrum of that of A.

    References:
        Saad and Schultz, 1986, SIAM Journal on Scientific and Statistical Computing 7(3).

    Example:
        >>> import torch
        >>> from bilevel.linear import GMRES, Operator
        >>> A = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
        >>> GMRES().solve(Operator(lambda v: v @ A.T), torch.tensor([2.0, 0.0])).value
        tensor([1., 1.])
    """

    tol: float = 1e-3
    max_steps: int | None = 50
    restart: int = 20
    damping: float = 0.0
    check_every: int | None = None

    def __post_init__(self) -> None:
        require_nonnegative("GMRES", tol=self.tol, damping=self.damping)
        require_at_least("GMRES", 1, max_steps=self.max_steps, restart=self.restart, check_every=self.check_every)

    def solve(
        self, operator: Operator, b: Tensor, x0: Tensor | None = None, *, tol: float | None = None
    ) -> LinearSolution:
        """Solve; see `LinearSolver.solve`."""
        b, x0 = at_door("GMRES", b, x0)
        products = Products(operator, self.damping)
        steps = step_limit(self.max_steps, b)
        tol = self.tol if tol is None else tol
        return correct(partial(self._cycle, products), products, b, x0, tol, steps, progress=0.999)

    def _cycle(self, products: Products, start: Tensor, target: Tensor, active: Tensor, budget: int) -> Correction:
        """Reduce ‖start - A e‖ in the active rows by one cycle; scalars are `[..., 1]` in float64."""
        eps, dtype = 10 * torch.finfo(start.dtype).eps, start.dtype
        period = check_period(self.check_every, start.device)
        length, codes, working, step = norm(start), open_codes(target), active, 0
        basis = [torch.where(active, start / length, 0.0).to(dtype)]
        columns: list[Tensor] = []
        y = reached = torch.zeros_like(target)
        cycle = min(self.restart, budget, start.shape[-1])
        for step in range(1, cycle + 1):
            q = products(basis[-1])
            scale, column = norm(q), []
            for v in basis:
                column.append(dot(v, q))
                q = q - (column[-1] * v).to(dtype)
            size = norm(q)
            codes = mark(codes, working & ~size.isfinite(), Status.NON_FINITE)
            working = working & (codes == OPEN)
            columns.append(torch.cat([torch.where(working, c, torch.nan) for c in [*column, size]], -1))
            working = working & (size > eps * scale)
            basis.append(torch.where(working, q / size, 0.0).to(dtype))
            if step % period == 0 or step == cycle:
                y, reached = _least_squares(columns, torch.where(active, length, 0.0), eps)
                working = working & (reached > target)
                if not bool(working.any()):
                    break
        e = torch.zeros_like(start)
        for j in range(step):
            e = e + (y[..., j : j + 1] * basis[j]).to(dtype)
        codes = mark(codes, active & (reached <= target), Status.CONVERGED)
        # What is no longer at work has an exhausted Krylov space; so has all of R^d.
        exhausted = ~working | (step == start.shape[-1])
        codes = mark(codes, active & exhausted & (reached > eps**0.5 * length), Status.SINGULAR)
        return Correction(e, codes, step, *_curvature(columns))


def _hessenberg(columns: list[Tensor]) -> Tensor:
    """Return H `[..., k + 1, k]` from columns of 2, 3, ... entries; columns of steps not made are not numbers."""
    return torch.stack([torch.nn.functional.pad(c, (0, len(columns) + 1 - c.shape[-1])) for c in columns], -1)


def _least_squares(columns: list[Tensor], length: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y `[..., k]` that minimizes ‖length e_1 - H y‖, and that norm."""
    H = _hessenberg(columns).nan_to_num(0.0, 0.0, 0.0)
    first = torch.zeros_like(H[..., 0])
    first[..., :1] = length
    y = torch.linalg.pinv(H, rtol=eps) @ first.unsqueeze(-1)
    return y.squeeze(-1), norm(first - (H @ y).squeeze(-1))


def _curvature(columns: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the extreme eigenvalues of (H_k + H_k^T) / 2 of each row, (inf, -inf) where no step was made."""
    H = _hessenberg(columns)[..., :-1, :]
    H = (H + H.mT) / 2
    made = H.diagonal(dim1=-2, dim2=-1).isfinite()
    first = H[..., :1, 0]
    # Steps not made are replaced by copies of the first Rayleigh quotient, which add nothing to the range.
    H = torch.where(made.unsqueeze(-1) & made.unsqueeze(-2), H, torch.diag_embed(first.expand_as(made)))
    known = made[..., :1]
    ritz = torch.linalg.eigvalsh(torch.where(known.unsqueeze(-1), H, 0.0))
    return torch.where(known, ritz[..., :1], torch.inf), torch.where(known, ritz[..., -1:], -torch.inf)
