"""Sets of linear inequalities and equations."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, final

import torch
from torch import Tensor

from bilevel.layout import Layout
from bilevel.sets._base import Projection, Set, is_nested, project_bare
from bilevel.status import InvalidProblem


@final
@dataclass(frozen=True, eq=False)
class Halfspace(Set):
    """Bound a linear function: `{v: <normal, v> <= offset}`.

    Args:
        normal: a, given like a bound of `Box`; not 0.
        offset: b.

    Raises:
        InvalidProblem: the normal is 0 or not finite, the offset is not finite, or (at `bind`) the normal fits no leaf.

    Example:
        >>> Halfspace(normal=torch.tensor([1.0, 1.0]), offset=0.0).project(torch.tensor([3.0, 1.0]))
        tensor([ 1., -1.])
    """

    normal: Any
    offset: float

    def __post_init__(self) -> None:
        if not isfinite(self.offset):
            raise InvalidProblem(f"Halfspace(offset=...) must be finite, got {self.offset}.")
        if not is_nested(self.normal):
            _check_normal(torch.as_tensor(self.normal, dtype=torch.float64))

    def project(self, point: Tensor) -> Tensor:
        """Return `point - max(<a, point> - b, 0) a / ‖a‖²`."""
        return project_bare(self, point)

    def bind(self, layout: Layout) -> Projection:
        """Return the projection of flat vectors."""
        normal = layout.spread(self.normal, 0.0, what="Halfspace(normal)", dtype=torch.float64).detach()
        normal = normal.expand(layout.shape if normal.dim() > 1 else (layout.size,)).clone()
        _check_normal(normal)
        direction = normal / normal.square().sum(-1, keepdim=True)

        def project(flat: Tensor) -> Tensor:
            excess = ((normal * flat).sum(-1, keepdim=True) - self.offset).clamp_min(0)
            return flat - (excess * direction).to(flat.dtype)

        return project


@final
@dataclass(frozen=True, eq=False)
class Affine(Set):
    """Solve linear equations: `{v: matrix v = rhs}`.

    Args:
        matrix: A, `[k, d]`, on the flat vector (of one block): the leaves in order, each row by row.
        rhs: b, `[k]`.

    Raises:
        InvalidProblem: shapes differ, an entry is not finite, or no v satisfies the equations. Rows may depend on each
            other; how far is judged by the precision of the matrix's dtype.

    Cost:
        One singular value decomposition at construction, then O(rank d) a projection.

    Example:
        >>> Affine(torch.tensor([[0.0, 2.0]]), torch.tensor([2.0])).project(torch.tensor([3.0, 5.0]))
        tensor([3., 1.])
    """

    matrix: Tensor
    rhs: Tensor
    _basis: Tensor = field(init=False, repr=False)
    _origin: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.matrix.dim() != 2 or self.rhs.shape != self.matrix.shape[:1]:
            raise InvalidProblem(
                f"Affine needs matrix [k, d] and rhs [k], got {tuple(self.matrix.shape)} and {tuple(self.rhs.shape)}."
            )
        matrix, rhs = self.matrix.detach().double(), self.rhs.detach().double()
        if not (matrix.isfinite().all() and rhs.isfinite().all()):
            raise InvalidProblem("Affine: matrix and rhs must be finite.")
        given = self.matrix.dtype if self.matrix.is_floating_point() else torch.float64
        precision = 10 * max(matrix.shape) * torch.finfo(given).eps
        left, values, basis = torch.linalg.svd(matrix, full_matrices=False)
        rank = int((values > precision * values.max()).sum()) if values.numel() else 0
        left, values, basis = left[:, :rank], values[:rank], basis[:rank]
        missed = (rhs - left @ (left.T @ rhs)).norm()
        if missed > 100 * precision * rhs.norm():
            raise InvalidProblem(
                f"Affine: the equations contradict each other (rank {rank} of {matrix.shape[0]} rows, least distance "
                f"between matrix v and rhs {float(missed):.3g}); drop or correct some."
            )
        object.__setattr__(self, "_basis", basis)
        object.__setattr__(self, "_origin", basis.T @ ((left.T @ rhs) / values))

    def project(self, point: Tensor) -> Tensor:
        """Return `v0 + (I - V V^T) (point - v0)`, v0 being the least solution and V a basis of the row space."""
        return project_bare(self, point)

    def bind(self, layout: Layout) -> Projection:
        """Return the projection of flat vectors."""
        if self._origin.shape[0] != layout.size:
            raise InvalidProblem(
                f"Affine(matrix) has {self._origin.shape[0]} columns for {layout.size} entries of {layout.names}."
            )
        if self._origin.device != layout.device:
            raise InvalidProblem(f"Affine(matrix) is on {self._origin.device}, the variables on {layout.device}.")

        def project(flat: Tensor) -> Tensor:
            step = ((flat.double() - self._origin) @ self._basis.T) @ self._basis
            return flat - step.to(flat.dtype)

        return project


def _check_normal(normal: Tensor) -> None:
    if not normal.isfinite().all() or (normal.square().sum(-1) == 0).any():
        raise InvalidProblem("Halfspace(normal=...) must be finite and not 0.")
