"""M-FAC: the inverse of a damped Fisher matrix made of a few gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear._base import LinearSolution, LinearSolver, Operator
from bilevel.linear._rows import Products, approximation, at_door, gram, require, require_at_least, require_nonnegative


@dataclass(frozen=True)
class MFAC(LinearSolver):
    """Replace A by the empirical Fisher matrix of k sampled gradients, the rows of G, and invert it by Woodbury.

        F = (1/k) G^T G;   w = (F + λ I)^-1 b = (b - G^T (k λ I + G G^T)^-1 G b) / λ,   λ = damping

    The published recursion over the rows gives the same numbers; this form costs as much and is better conditioned.

    Args:
        gradients: k >= 1, how many gradients to ask the operator for.
        damping: λ > 0, units of A. Everything outside the span of the gradients is divided by it.
        check: spend one product on the residual of (A + λ I) w = b; without it the residual is reported as not a
            number.
        tol: >= 0, a residual this small is CONVERGED, else APPROXIMATE.

    Raises:
        InvalidProblem: the operator gives no gradients, or gives them in another shape.

    Cost:
        k gradients, one product with `check`; k d numbers of memory, k² d operations.

    Notes:
        The empirical Fisher matrix is not the Hessian, except near the optimum of a well-specified likelihood; where
        the training data is fitted exactly it vanishes, and w -> b / λ. Rows that are gradients of mini-batches
        understate the curvature by the batch size.

    References:
        Frantar, Kurtic and Alistarh, 2021, NeurIPS, arXiv:2107.03356 (static algorithm).

    Example:
        >>> import torch
        >>> from bilevel.linear import MFAC, Operator
        >>> G = torch.tensor([[2.0, 0.0]])
        >>> operator = Operator(lambda v: v @ G.T @ G, gradients=lambda k: G[:k])
        >>> MFAC(gradients=1, damping=1.0).solve(operator, torch.tensor([5.0, 1.0])).value
        tensor([1., 1.])
    """

    gradients: int = 64
    damping: float = 1e-3
    check: bool = True
    tol: float = 1e-3

    def __post_init__(self) -> None:
        require_at_least("MFAC", 1, gradients=self.gradients)
        require_nonnegative("MFAC", damping=self.damping, tol=self.tol)
        require(self.damping > 0, "MFAC: damping must be > 0, got 0; try MFAC(damping=1e-3).")

    def solve(
        self, operator: Operator, b: Tensor, x0: Tensor | None = None, *, tol: float | None = None
    ) -> LinearSolution:
        """Return (F + damping I)^-1 b; see `LinearSolver.solve`. The warm start is not used."""
        b, _ = at_door("MFAC", b, x0)
        require(
            operator.gradients is not None,
            "MFAC: the operator gives no sampled gradients; use a finite-sum lower objective, or CG.",
        )
        assert operator.gradients is not None
        G = operator.gradients(self.gradients).detach()
        require(
            G.shape[1:] == b.shape and len(G) > 0,
            f"MFAC: the operator gave gradients of shape {list(G.shape)}; expected [{self.gradients}, "
            f"{', '.join(map(str, b.shape))}].",
        )
        G = G.movedim(0, -2)
        core = gram(G, G)
        k = core.shape[-1]
        core.diagonal(dim1=-2, dim2=-1).add_(k * self.damping)
        inner = torch.linalg.solve_ex(core, gram(G, b.unsqueeze(-2)))[0]
        value = (b - (inner.mT.to(G.dtype) @ G).squeeze(-2)) / self.damping
        tol = self.tol if tol is None else tol
        return approximation(Products(operator, self.damping), b, value, tol=tol, check=self.check)
