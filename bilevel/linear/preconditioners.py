"""Preconditioners: cheap positive definite P ≈ A + damping I, whose inverse speeds conjugate gradients up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear._base import Operator, dot
from bilevel.linear._lanczos import random_signs
from bilevel.linear._rows import Products, require, require_at_least, require_nonnegative


@dataclass(frozen=True)
class Prepared:
    """A preconditioner made ready for one operator.

    Args:
        apply: v -> P^-1 v, row by row, symmetric positive definite.
        products: products with A that it took to prepare.
    """

    apply: Callable[[Tensor], Tensor]
    products: int = 0


class Preconditioner(ABC):
    """How to make P^-1 from an operator. Implementations are frozen dataclasses."""

    @abstractmethod
    def prepare(self, operator: Operator, b: Tensor, damping: float) -> Prepared:
        """Return P^-1 for A + damping I.

        Args:
            operator: A.
            b: the right-hand side, for its shape, dtype and device.
            damping: >= 0, units of A.
        """


@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """Divide by the diagonal part D that is known exactly, plus a guess c of the curvature of the rest.

        P = D + (damping + c) I,   A = B + D,   c = mean of z^T B z / d over random signs z (an estimate of tr B / d)

    Meant for declared regularizers: one decay per weight, spread over many orders of magnitude, is undone exactly. The
    rest B is only met by a constant: an estimate of its diagonal from a few probes is so noisy that it does harm.

    Args:
        rest: c >= 0, units of A; None estimates it.
        probes: >= 1, random vectors for the estimate.
        seed: of the probes.

    Raises:
        InvalidProblem: the operator declares no diagonal.

    Cost:
        `probes` products, none if `rest` is given.

    References:
        Hutchinson, 1990, Communications in Statistics: Simulation and Computation (trace by random signs).

    Example:
        >>> import torch
        >>> from bilevel.linear import CG, Jacobi, Operator
        >>> d = torch.tensor([1e-3, 1.0, 1e3])
        >>> operator = Operator(lambda v: d * v, diagonal=d)
        >>> CG(preconditioner=Jacobi()).solve(operator, torch.ones(3)).steps
        1
    """

    rest: float | None = None
    probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_nonnegative("Jacobi", rest=self.rest)
        require_at_least("Jacobi", 1, probes=self.probes)

    def prepare(self, operator: Operator, b: Tensor, damping: float) -> Prepared:
        """Return v -> v / (D + damping + c)."""
        require(
            operator.diagonal is not None,
            "Jacobi: the operator declares no exact diagonal; declare a regularizer, or use NystromPreconditioner.",
        )
        assert operator.diagonal is not None
        diagonal = operator.diagonal.detach().clamp_min(0)
        products = Products(operator)
        rest = b.new_tensor(self.rest or 0.0) if self.rest is not None else self._estimate(products, b, diagonal)
        scale = (diagonal + damping + rest).to(b.dtype).expand_as(b)
        # A coordinate without any known curvature is left as it is in units of the others.
        tiny = torch.finfo(b.dtype).eps * scale.amax(-1, keepdim=True)
        scale = torch.where(tiny > 0, torch.maximum(scale, tiny), torch.ones_like(scale))
        return Prepared(lambda v: v / scale, products.count)

    def _estimate(self, products: Products, b: Tensor, diagonal: Tensor) -> Tensor:
        total = torch.zeros_like(b[..., :1])
        for probe in range(self.probes):
            signs = random_signs(b, self.seed + probe)
            total = total + (dot(signs, products(signs) - diagonal * signs) / b.shape[-1]).to(b.dtype)
        # An operator that is not finite is for the solver to report.
        return (total / self.probes).nan_to_num(0.0, 0.0, 0.0).clamp_min(0)
