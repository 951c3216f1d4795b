"""What estimators ask of the two levels: the part of `Oracles` that a view of fewer variables can stand in for."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bilevel.oracles import Counts, UpperGradient


class Curved(Protocol):
    """The lower level differentiated twice at one point; see `bilevel.oracles.Linearization`."""

    value: Tensor
    gradient: Tensor
    diagonal: Tensor | None

    def hvp(self, v: Tensor) -> Tensor:
        """Return H v."""

    def hvps(self, vectors: Tensor) -> Tensor:
        """Return H applied to k vectors."""

    def cross(self, v: Tensor) -> Tensor:
        """Return J^T v, `[p]`."""

    def sample_gradients(self, k: int) -> Tensor:
        """Return k per-example gradients."""


class Levels(Protocol):
    """Both levels as functions of flat vectors; see `bilevel.oracles.Oracles`."""

    @property
    def counts(self) -> Counts:
        """Calls made so far."""

    def upper_gradient(self, x: Tensor, y: Tensor, step: int = 0) -> UpperGradient:
        """Return f and its gradients."""

    def linearize_lower(self, x: Tensor, y: Tensor, step: int = 0) -> Curved:
        """Return g differentiated twice."""
