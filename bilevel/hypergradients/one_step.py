"""Hypergradients through one virtual lower step: the approximation of differentiable architecture search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.hypergradients._base import Certificate, Estimate, Estimator
from bilevel.optimizers._base import Hyperparameter, at
from bilevel.optimizers._hyperparameters import check
from bilevel.oracles import Oracles
from bilevel.status import InvalidProblem, Status

REACH = 0.01
"""Length of the differences, in units of y (the paper's epsilon times its vector)."""


@dataclass(frozen=True)
class OneStep(Estimator):
    """Estimate `d f(x, y - lr dg/dy(x, y)) / dx` at the y at hand, which is not moved.

        y' = y - lr dg/dy(x, y),   v = df/dy(x, y'),   h = df/dx(x, y') - lr J^T v,   J = d2g/dxdy at (x, y)

    With `lr=0` it is the direct part df/dx, "first order" in the paper. It is not the gradient of F(x) = f(x, y*(x)):
    one step of length lr sees the fraction lr mu of the response of y to x where the lower curvature is mu, however
    small the upper steps are.

    Args:
        lr: >= 0, of the virtual step: a number, or a schedule of the lower step; not a function of x.
        differences: J^T v by central differences of dg/dx along v, of length 0.01, as in the paper: two gradients
            more and no second derivative.

    Raises:
        InvalidProblem: lr is out of range or depends on x; at `init`, the lower level has a set, constraints or kinks.

    Cost:
        One upper gradient, and the values of both objectives; unless lr is 0, one lower gradient and one cross product
        (or two gradients).

    References:
        Liu, Simonyan, Yang, "DARTS: differentiable architecture search", ICLR 2019 (equations 6 to 8).

    Example:
        >>> import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, batch: (y - 3.0).square() / 2, lower=lambda x, y, batch: (y - x).square() / 2)
        >>> found = bilevel.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), estimator=OneStep(0.5))
        >>> float(found.gradient)  # y' = 0.5, v = -2.5, lr v
        -1.25
    """

    lr: Hyperparameter = 0.025
    differences: bool = False

    def __post_init__(self) -> None:
        check("lr", self.lr, 0.0, float("inf"))

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> None:
        """Return no state.

        Raises:
            InvalidProblem: the lower level has a set, constraints or kinks, which a plain step would ignore.
        """
        self.refuse_beyond_smooth(
            oracles.problem, "its virtual step would ignore it. State a penalty or a smooth regularizer (L2)."
        )

    def estimate(
        self,
        oracles: Oracles,
        x: Tensor,
        y: Tensor,
        state: None,
        *,
        upper_step: int = 0,
        lower_step: int = 0,
        step_diagonal: Callable[[], Tensor] | None = None,
        certify: bool = False,
    ) -> tuple[Estimate, None]:
        """Return the estimate at `(x, y)`; see `Estimator.estimate`. Its error is not estimated."""
        before, lr = oracles.counts, self._length(oracles, x, lower_step)
        slope = torch.full_like(x.sum(), float("nan"))
        if lr == 0:
            upper = oracles.upper_gradient(x, y, upper_step)
            value, gradient, lower_value = upper.value, upper.x, oracles.lower_value(x, y, lower_step)
        else:
            if self.differences:
                lower_value, along = oracles.lower_gradient(x, y, lower_step)
                upper = oracles.upper_gradient(x, y - lr * along, upper_step)
                cross = self._by_differences(oracles, x, y, upper.y, lower_step)
            else:
                lower = oracles.linearize_lower(x, y, lower_step)
                lower_value, along = lower.value, lower.gradient
                upper = oracles.upper_gradient(x, y - lr * along, upper_step)
                cross = lower.cross(upper.y)
            value, slope = oracles.upper_value(x, y, upper_step), along.norm()
            gradient = upper.x - lr * cross
        certificate = Certificate.unsolved(Status.APPROXIMATE, slope, oracles.counts - before)
        return Estimate(gradient, value, lower_value, y, certificate), None

    def _by_differences(self, oracles: Oracles, x: Tensor, y: Tensor, v: Tensor, step: int) -> Tensor:
        size = v.norm()
        if not bool(size > 0):
            return torch.zeros_like(x)
        ahead, behind = (oracles.lower_gradients(x, y + sign * (REACH / size) * v, step).x for sign in (1, -1))
        difference: Tensor = (ahead - behind) * (size / (2 * REACH))
        return difference

    def _length(self, oracles: Oracles, x: Tensor, step: int) -> float:
        with torch.enable_grad():
            lr = at(self.lr, oracles.x_layout.unflatten(x.detach().requires_grad_()), step)
        if isinstance(lr, Tensor) and lr.requires_grad:
            raise InvalidProblem("OneStep(lr=...) is not differentiated, so it may not depend on x; use unrolled().")
        return float(lr)
