"""The identity approximation: no curvature at all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bilevel.linear._base import LinearSolution, LinearSolver, Operator
from bilevel.linear._rows import Products, approximation, at_door, require, require_nonnegative


@dataclass(frozen=True)
class Identity(LinearSolver):
    """Take a multiple of the identity for A^-1: w = scale b.

    With scale = 1 / curvature it is the first Neumann term. Within noise of more terms for some large networks; far off
    where curvatures differ.

    Args:
        scale: > 0, units of 1 / A.
        check: spend one product on the true residual; without it the residual is reported as not a number.
        tol: >= 0, a residual this small is CONVERGED, else APPROXIMATE.

    Cost:
        One product, or none with `check=False`.

    References:
        Luketina, Berglund, Greff and Raiko, 2016, ICML, arXiv:1511.06727 (T1-T2).

    Example:
        >>> import torch
        >>> from bilevel.linear import Identity, Operator
        >>> solution = Identity(scale=0.5).solve(Operator(lambda v: 4 * v), torch.ones(2))
        >>> solution.value, float(solution.residual), solution.status.name
        (tensor([0.5000, 0.5000]), 1.0, 'APPROXIMATE')
    """

    scale: float = 1.0
    check: bool = True
    tol: float = 1e-3

    def __post_init__(self) -> None:
        require_nonnegative("Identity", scale=self.scale, tol=self.tol)
        require(self.scale > 0, "Identity: scale must be > 0, got 0; try Identity(scale=1.0).")

    def solve(
        self, operator: Operator, b: Tensor, x0: Tensor | None = None, *, tol: float | None = None
    ) -> LinearSolution:
        """Return scale b; see `LinearSolver.solve`. The warm start is not used."""
        b, _ = at_door("Identity", b, x0)
        tol = self.tol if tol is None else tol
        return approximation(Products(operator), b, self.scale * b, tol=tol, check=self.check)
