"""What a linear solver sees (an operator and b) and what it says (a value with its status)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.status import Status


@dataclass(frozen=True)
class Operator:
    """A symmetric linear map A that acts row by row: row i of `[m, d]` is multiplied by its own A_i `[d, d]`.

    Everything also works on `[d]`, one system. Only `apply` is required; the other fields are what the caller happens
    to know, and some solvers need them. `GMRES` and `NormalCG` also take maps that are not symmetric.

    Args:
        apply: v -> A v, `[d] -> [d]` or `[m, d] -> [m, d]`.
        apply_many: V -> A V for k vectors at once, `[k, d] -> [k, d]` or `[k, m, d] -> [k, m, d]`; a loop if not given.
        diagonal: a part D >= 0 of A = B + diag(D) that is known exactly, `[d]` or `[m, d]`.
        gradients: k -> G, k sampled gradients `[k, d]` or `[k, m, d]` of the objective whose Hessian A is.
        step_diagonal: () -> the diagonal of d(optimizer step)/d(gradient), `[d]` or `[m, d]`; called where needed.
        largest: the largest curvature of any row, if a recent estimate is at hand, `[]`; saves estimating it again.
        apply_transpose: v -> A^T v, shaped like `apply`; None declares A symmetric.
    """

    apply: Callable[[Tensor], Tensor]
    apply_many: Callable[[Tensor], Tensor] | None = None
    diagonal: Tensor | None = None
    gradients: Callable[[int], Tensor] | None = None
    step_diagonal: Callable[[], Tensor] | None = None
    largest: Tensor | None = None
    apply_transpose: Callable[[Tensor], Tensor] | None = None

    def many(self, vectors: Tensor) -> Tensor:
        """Return A applied to each of the k vectors `[k, *shape]`."""
        if self.apply_many is not None:
            return self.apply_many(vectors)
        return torch.stack([self.apply(vector) for vector in vectors])


@dataclass(frozen=True)
class LinearSolution:
    """The answer w to (A + damping I) w = b, and how far to trust it.

    Args:
        value: w, shaped like b.
        status: the worst status over the rows.
        residual: `‖b - (A + damping I) w‖ / ‖b‖` of each row (0 where b is 0), shape `[]` or `[m]`, float64, recomputed
            from w at the end; not a number where the solver was told not to spend the product (`check=False`).
        steps: iterations made.
        products: products with A that it took (one for each vector and all its rows together).
        curvature: smallest and largest curvature seen (Ritz values or Rayleigh quotients) of A, over all rows; they
            lie inside the spectrum, so the smallest is an upper bound on the least eigenvalue. None if none was seen.
    """

    value: Tensor
    status: Status
    residual: Tensor
    steps: int
    products: int
    curvature: tuple[Tensor, Tensor] | None = None


class LinearSolver(ABC):
    """Solves (A + damping I) w = b row by row, or says that it could not. Implementations are frozen dataclasses.

    Values are detached. A row that failed before its first step from zero gets `b / |curvature|`, never zeros.
    """

    @abstractmethod
    def solve(
        self, operator: Operator, b: Tensor, x0: Tensor | None = None, *, tol: float | None = None
    ) -> LinearSolution:
        """Solve from the start `x0` (zeros if None).

        Args:
            operator: A.
            b: right-hand sides, `[d]` or `[m, d]`.
            x0: warm start, shaped like b. It is dropped, row by row, where its residual exceeds ‖b‖.
            tol: overrides the solver's own relative tolerance for this call; ignored by solvers that have none.
        """


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the row-wise inner product `[..., 1]`, accumulated in float64."""
    product: Tensor = torch.linalg.vecdot(a.double(), b.double())
    return product.unsqueeze(-1)


def norm(a: Tensor) -> Tensor:
    """Return the row-wise Euclidean norm `[..., 1]` in float64."""
    if a.dim() == 1:  # three times faster than along a named dimension
        whole: Tensor = torch.linalg.vector_norm(a, dtype=torch.float64)
        return whole.reshape(1)
    length: Tensor = torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=torch.float64)
    return length


def relative_residual(residual: Tensor, b: Tensor) -> Tensor:
    """Return `‖residual‖ / ‖b‖` of each row, shape `[...]`, 0 where b is 0."""
    size = norm(b)
    return torch.where(
        size > 0, norm(residual) / size.clamp_min(torch.finfo(torch.float64).tiny), norm(residual)
    ).squeeze(-1)
