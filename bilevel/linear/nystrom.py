"""Nyström: A from a few products with random vectors, as a solver and as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear._base import LinearSolution, LinearSolver, Operator
from bilevel.linear._rows import (
    Products,
    approximation,
    at_door,
    gram,
    require,
    require_at_least,
    require_nonnegative,
)
from bilevel.linear.preconditioners import Preconditioner, Prepared


@dataclass(frozen=True)
class Sketch:
    """A ≈ U diag(values) U^T with orthonormal rows `basis` = U^T `[..., k, d]` and `values` >= 0 `[..., k]`.

    `ritz` `[..., k]` are Ritz values of A; `indefinite` marks the rows where one is negative (and was clipped).
    """

    basis: Tensor
    values: Tensor
    ritz: Tensor
    indefinite: Tensor

    def spectral(self, vector: Tensor, inside: Tensor, outside: Tensor | float) -> Tensor:
        """Return U diag(inside) U^T v + outside (v - U U^T v)."""
        coordinates = gram(self.basis, vector.unsqueeze(-2)).squeeze(-1)
        weights = ((inside - outside) * coordinates).unsqueeze(-2).to(vector.dtype)
        return (outside * vector + (weights @ self.basis).squeeze(-2)).to(vector.dtype)


def sketch(products: Products, b: Tensor, rank: int, seed: int) -> Sketch:
    """Sketch A by `rank` orthonormal Gaussian directions, stabilized by a shift ν of the size of rounding.

    Y = (A + ν I) Ω;  Ω^T Y = Q Θ Q^T;  B = Y Q Θ^(-1/2);  A ≈ B B^T - ν I

    Eigenvalues Θ that are not positive are left out, where a Cholesky factor would not exist.
    """
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn((b.shape[-1], rank), generator=generator, dtype=b.dtype).to(b.device)
    # The same directions for every row, so that no answer depends on its neighbors.
    omega = torch.linalg.qr(test)[0].mT.expand(*b.shape[:-1], rank, b.shape[-1])
    Y = products.many(omega.movedim(-2, 0)).movedim(0, -2)
    finite = Y.isfinite().all(-1).all(-1)
    Y = torch.where(finite[..., None, None], Y, 0.0)
    eps = torch.finfo(b.dtype).eps
    shift = 8 * eps * torch.linalg.matrix_norm(Y, dtype=torch.float64)[..., None]
    core = gram(omega, Y)
    ritz, Q = torch.linalg.eigh((core + core.mT) / 2)
    indefinite = (ritz < -100 * eps * ritz.abs().amax(-1, keepdim=True)).any(-1, keepdim=True)
    theta = ritz + shift
    inverse_root = torch.where(theta > shift / 2, theta.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    B = (Q * inverse_root.unsqueeze(-2)).mT.to(b.dtype) @ (Y + shift.unsqueeze(-1).to(b.dtype) * omega)
    frame, R = torch.linalg.qr(B.mT)
    left, singular, _ = torch.linalg.svd(R)
    values = (singular.double() ** 2 - shift).clamp_min(0)
    ritz = torch.where(finite[..., None], ritz, torch.nan)
    return Sketch((frame @ left).mT, torch.where(finite[..., None], values, torch.nan), ritz, indefinite)


def _check_rank(owner: str, rank: int, b: Tensor) -> None:
    d = b.shape[-1]
    require(rank <= d, f"{owner}: rank {rank} exceeds the dimension {d}; take {owner}(rank={d}) or less, or Dense.")


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """Solve with a low-rank A: w = U (U^T b / (Λ + damping)) + (b - U U^T b) / damping.

    Everything outside the sketched range is divided by the damping: far too large an answer where the curvatures left
    out exceed it. `CG(preconditioner=NystromPreconditioner())` has no such bias.

    Args:
        rank: 1 <= rank <= d, random directions.
        damping: ρ > 0, units of A.
        columns: sketch by `rank` columns C = A[:, S] drawn uniformly, M = A[S, S], in place of Gaussian directions:
            w = b / ρ - C (M + C^T C / ρ)^-1 C^T b / ρ². Cheaper by a QR, less accurate in float32.
        seed: of the directions or columns.
        check: spend one product on the true residual; without it the residual is reported as not a number.
        tol: >= 0, a residual of (A + ρ I) w = b this small is CONVERGED, else APPROXIMATE.

    Raises:
        InvalidProblem: rank > d.

    Cost:
        `rank` products (asked for at once), one with `check`; 3 rank d numbers of memory, rank² d operations.

    Notes:
        Exact where rank A <= `rank` (with probability one). NEGATIVE_CURVATURE: the sketch saw some, and left it out
        (Gaussian) or kept it (columns). `curvature`: Ritz values of the sketch.

    References:
        Hataya and Yamada, 2023, AISTATS, arXiv:2302.09726 (columns).
        Frangella, Tropp and Udell, 2023, SIAM Journal on Matrix Analysis and Applications, arXiv:2110.02820
        (stabilized sketch).

    Example:
        >>> import torch
        >>> from bilevel.linear import Nystrom, Operator
        >>> d = torch.tensor([4.0, 0.0, 0.0])
        >>> solution = Nystrom(rank=1, damping=1.0).solve(Operator(lambda v: d * v), torch.tensor([5.0, 1.0, 1.0]))
        >>> [round(w, 3) for w in solution.value.tolist()], solution.status.name
        ([1.0, 1.0, 1.0], 'CONVERGED')
    """

    rank: int = 10
    damping: float = 1e-2
    columns: bool = False
    seed: int = 0
    check: bool = True
    tol: float = 1e-3

    def __post_init__(self) -> None:
        require_at_least("Nystrom", 1, rank=self.rank)
        require_nonnegative("Nystrom", damping=self.damping, tol=self.tol)
        require(self.damping > 0, "Nystrom: damping must be > 0, got 0; try Nystrom(damping=1e-2).")

    def solve(
        self, operator: Operator, b: Tensor, x0: Tensor | None = None, *, tol: float | None = None
    ) -> LinearSolution:
        """Solve with the sketch; see `LinearSolver.solve`. The warm start is not used."""
        b, _ = at_door("Nystrom", b, x0)
        _check_rank("Nystrom", self.rank, b)
        products = Products(operator, self.damping)
        if self.columns:
            value, ritz, indefinite = self._by_columns(products, b)
        else:
            found = sketch(products, b, self.rank, self.seed)
            ritz, indefinite = found.ritz, found.indefinite
            value = found.spectral(b, 1 / (found.values + self.damping), 1 / self.damping)
        return approximation(
            products,
            b,
            value,
            tol=self.tol if tol is None else tol,
            check=self.check,
            curvature=(ritz.amin(), ritz.amax()) if bool(ritz.isfinite().all()) else None,
            flag=indefinite,
        )

    def _by_columns(self, products: Products, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value, the eigenvalues of M, and the rows where one is negative."""
        rho, d = self.damping, b.shape[-1]
        chosen = torch.randperm(d, generator=torch.Generator().manual_seed(self.seed))[: self.rank].to(b.device)
        units = torch.zeros((self.rank, *b.shape), dtype=b.dtype, device=b.device)
        units[torch.arange(self.rank, device=b.device), ..., chosen] = 1
        C = products.many(units).movedim(0, -2)
        M = C[..., chosen].double()
        M = (M + M.mT) / 2
        core = M + gram(C, C) / rho
        inner = torch.linalg.pinv(core.nan_to_num(), hermitian=True) @ gram(C, b.unsqueeze(-2))
        value = b / rho - (inner.mT.to(b.dtype) @ C).squeeze(-2) / rho**2
        ritz = torch.linalg.eigvalsh(M.nan_to_num())
        negative = ritz < -100 * torch.finfo(b.dtype).eps * ritz.abs().amax(-1, keepdim=True)
        return value, ritz, negative.any(-1, keepdim=True)


@dataclass(frozen=True)
class NystromPreconditioner(Preconditioner):
    """Undo the largest curvatures by a Gaussian sketch: P^-1 v = (λ + δ) U (Λ + δ)^-1 U^T v + (v - U U^T v).

    λ is the smallest curvature kept and δ the damping. CG with it solves the true system, so a poor sketch costs steps
    and never accuracy. Worth its products where the curvatures decay fast; useless on a flat spectrum.

    Args:
        rank: 1 <= rank <= d, random directions; about twice the number of curvatures above the damping.
        seed: of the directions.

    Raises:
        InvalidProblem: rank > d.

    Cost:
        `rank` products (asked for at once), 3 rank d numbers of memory, rank² d operations; 2 rank d operations a step.

    Notes:
        Negative curvature in the sketch is clipped, so that P stays positive definite and CG can find it.

    References:
        Frangella, Tropp and Udell, 2023, SIAM Journal on Matrix Analysis and Applications, arXiv:2110.02820.

    Example:
        >>> import torch
        >>> from bilevel.linear import CG, NystromPreconditioner, Operator
        >>> d = torch.tensor([1e4, 1e3, 1.0, 1.0, 1.0], dtype=torch.float64)
        >>> solver = CG(tol=1e-6, preconditioner=NystromPreconditioner(rank=3))
        >>> solver.solve(Operator(lambda v: d * v), torch.ones(5).double()).status.name
        'CONVERGED'
    """

    rank: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least("NystromPreconditioner", 1, rank=self.rank)

    def prepare(self, operator: Operator, b: Tensor, damping: float) -> Prepared:
        """Return P^-1; see `Preconditioner.prepare`."""
        _check_rank("NystromPreconditioner", self.rank, b)
        products = Products(operator)
        found = sketch(products, b, self.rank, self.seed)
        values = found.values.nan_to_num(0.0)
        # Directions whose curvature is rounding (or was clipped) are left to CG like those outside the sketch.
        shifted = values + damping
        known = shifted > 100 * torch.finfo(b.dtype).eps * values.amax(-1, keepdim=True)
        least = torch.where(known, shifted, torch.inf).amin(-1, keepdim=True)
        inside = torch.where(known, least / shifted, 1.0)
        return Prepared(lambda v: found.spectral(v, inside, 1.0), products.count)
