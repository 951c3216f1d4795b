"""The exact solve: forms A, and is the judge of all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear._base import LinearSolution, LinearSolver, Operator, norm, relative_residual
from bilevel.linear._rows import (
    Products,
    at_door,
    curvature_range,
    mark,
    open_codes,
    require,
    require_at_least,
    require_nonnegative,
    worst,
)
from bilevel.status import Status

LARGEST = 10_000
"""Dimension beyond which a d x d matrix is refused (800 MB in float64)."""


@dataclass(frozen=True)
class Dense(LinearSolver):
    """Form A from d products and solve by its eigenvalues, which are also reported: `curvature` is exact.

        A = U diag(λ) U^T;   w = U (U^T b / (λ + damping)), coordinates with |λ + damping| ~ 0 left out

    Args:
        damping: >= 0, units of A.
        chunk: >= 1, columns of A asked for at once.

    Raises:
        InvalidProblem: d > 10 000.

    Cost:
        d products, d² numbers of memory (in float64) and about 10 d³ operations for each row.

    Notes:
        The warm start and `tol` are not used. NEGATIVE_CURVATURE: some eigenvalue is negative; the system is solved
        all the same. MINIMUM_NORM and SINGULAR: some eigenvalue is zero to rounding; the value is the least-squares
        solution of least norm. BREAKDOWN: A is not symmetric; the value solves with (A + A^T) / 2.

    Example:
        >>> import torch
        >>> from bilevel.linear import Dense, Operator
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> solution = Dense().solve(Operator(lambda v: v @ A), torch.tensor([3.0, 3.0]))
        >>> solution.value.tolist(), [round(float(c), 6) for c in solution.curvature]
        ([1.0, 1.0], [1.0, 3.0])
    """

    damping: float = 0.0
    chunk: int = 256

    def __post_init__(self) -> None:
        require_nonnegative("Dense", damping=self.damping)
        require_at_least("Dense", 1, chunk=self.chunk)

    def solve(
        self, operator: Operator, b: Tensor, x0: Tensor | None = None, *, tol: float | None = None
    ) -> LinearSolution:
        """Solve; see `LinearSolver.solve`."""
        b, _ = at_door("Dense", b, x0)
        products = Products(operator, self.damping)
        A = self._matrix(products, b)
        # Eigenvalues of matrices that are not numbers raise; such rows are answered by b and their status.
        finite = A.isfinite().all(-1).all(-1).unsqueeze(-1) & norm(b).isfinite()
        A = torch.where(finite.unsqueeze(-1), A, torch.eye(b.shape[-1], dtype=A.dtype, device=A.device))
        eigenvalues, U = torch.linalg.eigh((A + A.mT) / 2)
        shifted = eigenvalues + self.damping
        eps = torch.finfo(b.dtype).eps
        floor = (10 + b.shape[-1] ** 0.5) * eps * shifted.abs().amax(-1, keepdim=True)
        null = shifted.abs() <= floor
        coordinates = (U.mT @ b.double().unsqueeze(-1)).squeeze(-1)
        w = (U @ torch.where(null, 0.0, coordinates / shifted).unsqueeze(-1)).squeeze(-1)
        w = torch.where(finite, w, b.double()).to(b.dtype)
        r = b.double() - (A @ w.double().unsqueeze(-1)).squeeze(-1) - self.damping * w.double()
        residual = torch.where(finite.squeeze(-1), relative_residual(r, b), torch.nan)
        asymmetry = torch.linalg.matrix_norm(A - A.mT) > eps**0.5 * torch.linalg.matrix_norm(A)
        codes = mark(open_codes(finite), ~finite, Status.NON_FINITE)
        codes = mark(codes, asymmetry.unsqueeze(-1), Status.BREAKDOWN)
        codes = mark(codes, (shifted < -floor).any(-1, keepdim=True), Status.NEGATIVE_CURVATURE)
        singular = null.any(-1, keepdim=True) & (norm(b) > 0)
        codes = mark(codes, singular & (residual.unsqueeze(-1) <= eps**0.5), Status.MINIMUM_NORM)
        codes = mark(codes, singular, Status.SINGULAR)
        codes = mark(codes, codes >= 0, Status.CONVERGED)
        low = torch.where(finite, eigenvalues[..., :1], torch.inf)
        high = torch.where(finite, eigenvalues[..., -1:], -torch.inf)
        return LinearSolution(w, worst(codes), residual, 0, products.count, curvature_range(low, high, 0.0))

    def _matrix(self, products: Products, b: Tensor) -> Tensor:
        """Return A, `[..., d, d]` in float64."""
        d = b.shape[-1]
        require(
            d <= LARGEST,
            f"Dense: d = {d} > {LARGEST} would need a matrix of {8 * d * d / 1e9:.1f} GB; use CG.",
        )
        columns = []
        for first in range(0, d, self.chunk):
            index = torch.arange(first, min(first + self.chunk, d), device=b.device)
            units = torch.zeros((len(index), d), dtype=b.dtype, device=b.device)
            units[torch.arange(len(index), device=b.device), index] = 1
            units = units.view(len(index), *[1] * (b.dim() - 1), d).expand(len(index), *b.shape)
            columns.append(products.many(units).double())
        return torch.cat(columns).movedim(0, -1)
