"""The diagonal of the optimizer's own step in place of the inverse Hessian."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bilevel.linear._base import LinearSolution, LinearSolver, Operator
from bilevel.linear._rows import Products, approximation, at_door, require, require_nonnegative


@dataclass(frozen=True)
class Sama(LinearSolver):
    """Take for A^-1 the diagonal D of d(optimizer step) / d(gradient): w = max(D, 0) b.

    One step of an adaptive optimizer moves by about A^-1 times the gradient in the units that matter; its derivative is
    known in closed form and needs no second derivatives. For SGD D is the learning rate (`Identity(scale=lr)`).
    Negative entries, which Adam's momentum can produce, are set to zero.

    Args:
        check: spend one product on the true residual; without it the residual is reported as not a number.
        tol: >= 0, a residual this small is CONVERGED, else APPROXIMATE.

    Raises:
        InvalidProblem: the operator has no `step_diagonal`.

    Cost:
        One product, or none with `check=False`.

    References:
        Choe, Mehta, Ahn, Neiswanger, Xie, Strubell and Xing, 2023, NeurIPS, arXiv:2310.05674.

    Example:
        >>> import torch
        >>> from bilevel.linear import Operator, Sama
        >>> operator = Operator(lambda v: 2 * v, step_diagonal=lambda: torch.tensor([0.5, -0.1]))
        >>> Sama().solve(operator, torch.ones(2)).value
        tensor([0.5000, 0.0000])
    """

    check: bool = True
    tol: float = 1e-3

    def __post_init__(self) -> None:
        require_nonnegative("Sama", tol=self.tol)

    def solve(
        self, operator: Operator, b: Tensor, x0: Tensor | None = None, *, tol: float | None = None
    ) -> LinearSolution:
        """Return max(D, 0) b; see `LinearSolver.solve`. The warm start is not used."""
        b, _ = at_door("Sama", b, x0)
        require(
            operator.step_diagonal is not None,
            "Sama: the operator has no step_diagonal; use a lower optimizer that gives one, or Identity.",
        )
        assert operator.step_diagonal is not None
        value = operator.step_diagonal().detach().clamp_min(0).to(b.dtype) * b
        tol = self.tol if tol is None else tol
        return approximation(Products(operator), b, value, tol=tol, check=self.check)
