"""The lower level solved as tightly as rounding allows, whatever it is made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.multipliers import constraint_rows
from bilevel.optimizers import LBFGS, ProximalGradient
from bilevel.oracles import Oracles
from bilevel.sets.bounds import bounds
from bilevel.status import InvalidProblem, Status

STEPS = 2000
LARGEST = 500
"""Lower variables up to which SciPy's dense SLSQP is asked."""


class LowerSolve(NamedTuple):
    """Where the lower level was solved: `y`, how it ended, and the norm of what should vanish there.

    SLSQP does not tell the last; it is then what a relative error of sqrt(eps) would leave.
    """

    y: Tensor
    status: Status
    residual: float


def solved(oracles: Oracles, x: Tensor, y: Tensor, step: int) -> LowerSolve:
    """Solve the lower level at x from y, on the lower batch of a step.

    Raises:
        InvalidProblem: it has constraints, and SciPy is missing or the problem too large for it.
    """
    problem = oracles.problem
    if problem.constraint is not None or problem.equality is not None:
        return _constrained(oracles, x, y, step)
    tol = 10 * torch.finfo(y.dtype).eps
    kinked = problem.regularizer is not None and not problem.regularizer.smooth
    if kinked or problem.lower_set is not None:
        declared = oracles.declared(x)
        minimum = ProximalGradient(max_steps=STEPS, tol=tol).minimize(
            lambda point: oracles.lower_gradient(x, point, step, declared=False),
            lambda v, length: oracles.project_y(declared.prox(v, length)),
            oracles.project_y(y),
        )
    else:
        minimum = LBFGS(max_steps=STEPS, tol=tol, patience=60).minimize(
            lambda point: oracles.lower_gradient(x, point, step), y
        )
    return LowerSolve(minimum.y, minimum.status, float(minimum.gradient_norm))


def _constrained(oracles: Oracles, x: Tensor, y: Tensor, step: int) -> LowerSolve:
    """Solve by SLSQP, with exact gradients."""
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise InvalidProblem("lower constraints are solved by SciPy here: pip install 'bilevel[scipy]'.") from error
    if y.dim() > 1 or len(y) > LARGEST:
        raise InvalidProblem(
            f"lower constraints are solved by SciPy here, for up to {LARGEST} variables and no blocks."
        )

    def tensor(v: Any) -> Tensor:
        return torch.as_tensor(v, dtype=y.dtype, device=y.device)

    def objective(v: Any) -> tuple[float, Any]:
        value, gradient = oracles.lower_gradient(x, tensor(v), step)
        return float(value), gradient.double().cpu().numpy()

    # The same point is asked for its values and for its gradients.
    known: dict[bytes, Any] = {}

    def rows(v: Any) -> Any:
        if v.tobytes() not in known:
            known.clear()
            known[v.tobytes()] = constraint_rows(oracles, x, tensor(v), step)
        return known[v.tobytes()]

    q = rows(y.double().cpu().numpy()).inequalities
    constraints = [
        {
            "type": kind,
            "fun": lambda v, part=part, sign=sign: sign * rows(v).value[part].double().cpu().numpy(),
            "jac": lambda v, part=part, sign=sign: sign * rows(v).y[part].double().cpu().numpy(),
        }
        for kind, sign, part in (("ineq", -1.0, slice(None, q)), ("eq", 1.0, slice(q, None)))
        if len(rows(y.double().cpu().numpy()).value[part])
    ]
    low, high = bounds(oracles.problem.lower_set, oracles.y_layout, y)
    found = minimize(
        objective, y.double().cpu().numpy(), jac=True, constraints=constraints, method="SLSQP",
        bounds=list(zip(low.double().tolist(), high.double().tolist(), strict=True)),
        options={"maxiter": STEPS, "ftol": 1e-15},
    )  # fmt: skip
    end = tensor(found.x)
    status = Status.CONVERGED if found.success else Status.STALLED
    return LowerSolve(
        end, status, torch.finfo(y.dtype).eps ** 0.5 * float(oracles.lower_gradient(x, end, step)[1].norm())
    )
