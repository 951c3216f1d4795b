"""Minimize the lower objective at one x, whatever the lower level is made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.extras import extra
from bilevel.multipliers import constraint_rows
from bilevel.optimizers import LBFGS, Minimum, ProximalGradient
from bilevel.oracles import Oracles
from bilevel.sets.bounds import bounds
from bilevel.status import Diverged, InvalidProblem, NonFinite, Status

LARGEST = 500
"""Lower variables up to which SciPy's dense SLSQP is asked."""
LBFGS_STEPS = 2000
"""Of a lower solve, at most, where the caller sets no bound."""
PROXIMAL_STEPS = 20_000
"""The same for proximal gradients, which know no curvature: many steps, each a gradient."""
SLSQP_STEPS = 2000
"""The same for SLSQP."""


class LowerMinimum(NamedTuple):
    """Where a minimization of the lower level ended.

    Args:
        y: the point.
        status: CONVERGED, STALLED (as far as rounding lets it), or STEP_LIMIT.
        residual: norm of the (proximal) gradient there. SLSQP does not tell it; it is then what a relative error of
            sqrt(eps) would leave.
        steps: iterations made.
    """

    y: Tensor
    status: Status
    residual: float
    steps: int


def minimize(
    oracles: Oracles, x: Tensor, y: Tensor, batch: int = 0, *, tol: float = 1e-8, max_steps: int | None = None
) -> LowerMinimum:
    """Minimize the lower level at x from y, on one lower batch: L-BFGS, proximal gradients, or SLSQP under constraints.

    Each minimizer has a bound of its own on its steps, which `max_steps` replaces.

    Raises:
        InvalidProblem: it has constraints, and SciPy is missing or the problem too large for it.
        Diverged: the lower objective falls without end.
        NonFinite: a lower value or gradient is not finite.
    """
    problem = oracles.problem
    if problem.constrained:
        return _constrained(oracles, x, y, batch, SLSQP_STEPS if max_steps is None else max_steps)
    if problem.proximal:
        proximal = ProximalGradient(max_steps=PROXIMAL_STEPS if max_steps is None else max_steps, tol=tol)
        found = minimize_proximal(oracles, proximal, x, oracles.project_y(y), batch=batch)
    else:
        lbfgs = LBFGS(max_steps=LBFGS_STEPS if max_steps is None else max_steps, tol=tol, patience=60)
        found = minimize_smooth(oracles, lbfgs, x, y, batch=batch)
    return LowerMinimum(found.y, found.status, float(found.gradient_norm), found.steps)


def minimize_smooth(
    oracles: Oracles,
    optimizer: LBFGS,
    x: Tensor,
    y: Tensor,
    *,
    batch: int = 0,
    upper_step: int = 0,
    max_steps: int | None = None,
) -> Minimum:
    """Minimize a smooth lower objective at x from y, on one lower batch.

    Raises:
        Diverged: the lower objective falls without end.
        NonFinite: it is not finite wherever the line search looked.
    """
    found = optimizer.minimize(lambda point: oracles.lower_gradient(x, point, batch), y, max_steps=max_steps)
    return _ended(found, upper_step, "wherever L-BFGS looked", "a regularizer (bilevel.L2)")


def minimize_proximal(
    oracles: Oracles, optimizer: ProximalGradient, x: Tensor, y: Tensor, *, batch: int = 0, upper_step: int = 0
) -> Minimum:
    """Minimize a lower objective with kinks or a lower set at x from y, on one lower batch.

    Raises:
        Diverged: the lower objective falls without end.
        NonFinite: it is not finite wherever prox steps led.
    """
    declared = oracles.declared(x)
    found = optimizer.minimize(
        lambda point: oracles.lower_gradient(x, point, batch, declared=False),
        lambda v, length: oracles.project_y(declared.prox(v, length)),
        y,
    )
    return _ended(found, upper_step, "wherever prox steps led", "a regularizer or a lower_set")


def _ended(found: Minimum, upper_step: int, where: str, bound: str) -> Minimum:
    if found.status is Status.NON_FINITE:
        raise NonFinite(f"the lower objective is not finite at upper step {upper_step}, {where}.")
    if found.status is Status.DIVERGED:
        raise Diverged(
            f"the lower objective falls to {float(found.value):.3g} at upper step {upper_step} and may be unbounded "
            f"below; bound it with {bound}, or restrict x (upper_set)."
        )
    return found


def _constrained(oracles: Oracles, x: Tensor, y: Tensor, batch: int, max_steps: int) -> LowerMinimum:
    """Minimize by SLSQP, with exact gradients."""
    with extra("scipy", {"scipy": "scipy"}, "a lower level with constraints"):
        import scipy.optimize
    if y.dim() > 1 or len(y) > LARGEST:
        raise InvalidProblem(
            f"lower constraints are solved by SciPy here, for up to {LARGEST} variables and no blocks."
        )

    def tensor(v: Any) -> Tensor:
        return torch.as_tensor(v, dtype=y.dtype, device=y.device)

    def objective(v: Any) -> tuple[float, Any]:
        value, gradient = oracles.lower_gradient(x, tensor(v), batch)
        return float(value), gradient.double().cpu().numpy()

    # The same point is asked for its values and for its gradients.
    known: dict[bytes, Any] = {}

    def rows(v: Any) -> Any:
        if v.tobytes() not in known:
            known.clear()
            known[v.tobytes()] = constraint_rows(oracles, x, tensor(v), batch)
        return known[v.tobytes()]

    start = y.double().cpu().numpy()
    q = rows(start).inequalities
    constraints = [
        {
            "type": kind,
            "fun": lambda v, part=part, sign=sign: sign * rows(v).value[part].double().cpu().numpy(),
            "jac": lambda v, part=part, sign=sign: sign * rows(v).y[part].double().cpu().numpy(),
        }
        for kind, sign, part in (("ineq", -1.0, slice(None, q)), ("eq", 1.0, slice(q, None)))
        if len(rows(start).value[part])
    ]
    low, high = bounds(oracles.problem.lower_set, oracles.y_layout, y)
    found = scipy.optimize.minimize(
        objective, start, jac=True, constraints=constraints, method="SLSQP",
        bounds=list(zip(low.double().tolist(), high.double().tolist(), strict=True)),
        options={"maxiter": max_steps, "ftol": 1e-15},
    )  # fmt: skip
    end = tensor(found.x)
    status = Status.CONVERGED if found.success else Status.STEP_LIMIT if found.nit >= max_steps else Status.STALLED
    residual = torch.finfo(y.dtype).eps ** 0.5 * float(oracles.lower_gradient(x, end, batch)[1].norm())
    return LowerMinimum(end, status, residual, int(found.nit))
