"""Small systems with known spectra, and dense answers to them."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.linear import Operator


def symmetric(eigenvalues: Tensor | list[float], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    d = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    A = (Q * eigenvalues) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def spd(d: int = 8, low: float = 1.0, high: float = 4.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return symmetric(torch.linspace(low, high, d, dtype=torch.float64), seed, dtype)


def spd_rows(m: int = 3, d: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.stack([spd(d, 1.0 + 0.3 * i, 4.0 + i, seed + i, dtype) for i in range(m)])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def times(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)


def operator(A: Tensor, *, symmetric: bool = True) -> Operator:
    """Return the operator of A with every optional part it can have."""
    factor = torch.linalg.cholesky((A + A.mT).double() / 2, upper=True) if _definite(A) else None
    return Operator(
        apply=lambda v: times(A, v),
        diagonal=0.5 * torch.linalg.eigvalsh(A)[..., :1].clamp_min(0).expand(A.shape[:-1]) if symmetric else None,
        gradients=None if factor is None else lambda k: (k**0.5 * factor).to(A.dtype).movedim(-2, 0)[:k],
        step_diagonal=lambda: 0.3 * torch.ones(A.shape[:-1], dtype=A.dtype),
        apply_transpose=None if symmetric else lambda v: times(A.mT, v),
    )


def _definite(A: Tensor) -> bool:
    return bool((torch.linalg.eigvalsh((A + A.mT) / 2) > 0).all())


def exact(A: Tensor, b: Tensor, damping: float = 0.0) -> Tensor:
    return torch.linalg.solve(A + damping * torch.eye(A.shape[-1], dtype=A.dtype), b.unsqueeze(-1)).squeeze(-1)


def residual(A: Tensor, b: Tensor, w: Tensor, damping: float = 0.0) -> Tensor:
    """Return the relative residual from its definition, independently of the library."""
    r = b.double() - times(A.double(), w.double()) - damping * w.double()
    size = b.double().norm(dim=-1)
    return torch.where(size > 0, r.norm(dim=-1) / size, r.norm(dim=-1))
