"""MINRES: the smallest residual over the Krylov space, for symmetric A of any sign."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bilevel.linear._base import LinearSolution, LinearSolver, Operator, dot, norm
from bilevel.linear._krylov import Correction, Tridiagonal, correct, step_limit
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
class MINRES(LinearSolver):
    """Minimize ‖b - (A + damping I) w‖ over the Krylov space; A symmetric, definite or not.

        A V_k = V_{k+1} T_k  (Lanczos);   w_k = V_k y,  y minimizes ‖ ‖b‖ e_1 - T_k y ‖  (by one rotation a step)

    The residual falls monotonically. Negative curvature is no obstacle: the system is solved, `curvature` reports it,
    and the caller judges what the solution means (y is then no minimum of the lower objective).

    Args:
        tol: >= 0, stop a row where ‖b - A w‖ <= tol ‖b‖.
        max_steps: >= 1; None means 2 d.
        damping: >= 0, units of A; on an indefinite A it can make the system singular.
        check_every: >= 1, steps between two looks whether all rows are done; None is 1 on a CPU, 5 elsewhere.
        flat: >= 0: a row is SINGULAR where ‖A r‖ <= flat ‖A‖ ‖r‖ with r above the tolerance; None is the root of the
            rounding unit (1.5e-8 in float64, 3.5e-4 in float32), the least that the recurrence is seen to reach on a
            singular system before it blows up. Condition numbers beyond 1 / flat count as infinite.

    Cost:
        One product and about 10 vector operations a step, 6 vectors of memory; one product more for a warm start, and
        one to recompute the residual at the end.

    Notes:
        A consistent singular system converges to its minimum-norm solution (from zero). On an inconsistent one the row
        stops as SINGULAR at a least-squares solution, in general not the one of least norm. In low precision a large
        condition number costs accuracy, as the directions are built by division by small numbers.

    References:
        Paige and Saunders, 1975, SIAM Journal on Numerical Analysis 12(4).

    Example:
        >>> import torch
        >>> from bilevel.linear import MINRES, Operator
        >>> d = torch.tensor([-2.0, 4.0])
        >>> solution = MINRES().solve(Operator(lambda v: d * v), torch.tensor([2.0, 4.0]))
        >>> [round(w, 4) for w in solution.value.tolist()], solution.status.name, round(float(solution.curvature[0]), 4)
        ([-1.0, 1.0], 'CONVERGED', -2.0)
    """

    tol: float = 1e-3
    max_steps: int | None = 20
    damping: float = 0.0
    check_every: int | None = None
    flat: float | None = None

    def __post_init__(self) -> None:
        require_nonnegative("MINRES", tol=self.tol, damping=self.damping, flat=self.flat)
        require_at_least("MINRES", 1, max_steps=self.max_steps, check_every=self.check_every)

    def solve(
        self, operator: Operator, b: Tensor, x0: Tensor | None = None, *, tol: float | None = None
    ) -> LinearSolution:
        """Solve; see `LinearSolver.solve`."""
        b, x0 = at_door("MINRES", b, x0)
        products = Products(operator, self.damping)
        steps = step_limit(self.max_steps, b)
        return correct(partial(self._descend, products), products, b, x0, self.tol if tol is None else tol, steps)

    def _descend(self, products: Products, start: Tensor, target: Tensor, active: Tensor, budget: int) -> Correction:
        """Reduce ‖start - A e‖ to `target` in the active rows; scalars are `[..., 1]`, named as by Paige and Saunders.

        `v` are the Lanczos vectors, `w` the directions; rotation k has cosine `cs` and sine `sn`; `phibar` is ‖r‖.
        """
        rounding = torch.finfo(start.dtype).eps
        flat = rounding**0.5 if self.flat is None else self.flat
        period, dtype = check_period(self.check_every, start.device), start.dtype
        phibar, codes, lanczos, step = norm(start), open_codes(target), Tridiagonal(), 0
        e = v_old = w_old = w = torch.zeros_like(start)
        v = torch.where(active, start / phibar, 0.0).to(dtype)
        beta = dbar = epsln = sn = scale = torch.zeros_like(target)
        cs = -torch.ones_like(target)
        working = active
        for step in range(1, budget + 1):
            p = products(v)
            alpha = dot(v, p)
            p = p - (alpha * v + beta * v_old).to(dtype)
            beta_old, beta = beta, norm(p)
            scale = torch.maximum(scale, (beta_old**2 + alpha**2 + beta**2).sqrt())
            delta, gbar = cs * dbar + sn * alpha, sn * dbar - cs * alpha
            epsln_old, epsln, dbar = epsln, sn * beta, -cs * beta
            lanczos.diagonal.append(torch.where(working, alpha, torch.nan))
            codes = mark(codes, working & ~beta.isfinite(), Status.NON_FINITE)
            # root = ‖A r‖ / ‖r‖ of the iterate before this step: zero means that it solves the least-squares problem.
            root, gamma = (gbar**2 + dbar**2).sqrt(), (gbar**2 + beta**2).sqrt()
            codes = mark(codes, working & ((root <= flat * scale) | (gamma <= 10 * rounding * scale)), Status.SINGULAR)
            working = working & (codes == OPEN)
            cs, sn = gbar / gamma, beta / gamma
            phi, phibar = cs * phibar, torch.where(working, sn * phibar, phibar)
            w_new = ((v - epsln_old * w_old - delta * w) / gamma).to(dtype)
            w_old, w = w, torch.where(working, w_new, 0.0)
            e = torch.where(working, e + (phi * w).to(dtype), e)
            reached = phibar <= torch.maximum(target, rounding * scale * norm(e))
            codes = mark(codes, working & reached, Status.CONVERGED)
            working = working & (codes == OPEN) & (beta > 0)
            lanczos.beside.append(torch.where(working, beta, torch.nan))
            v_old, v = v, torch.where(working, p / beta, 0.0).to(dtype)
            if step % period == 0 and not bool(working.any()):
                break
        low, high = lanczos.extremes()
        return Correction(e, codes, step, low, high)
