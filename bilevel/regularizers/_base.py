"""What a declared term is: formulas for its value, its derivatives, its prox and its kinks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel.layout import Layout, Variables

Weight: TypeAlias = float | Callable[[Variables], Any]
"""A number >= 0, or a function of x that returns numbers >= 0 (see `L2` for the shapes)."""

Coefficients: TypeAlias = tuple[Tensor, ...]


class Regularizer(ABC):
    """A term `r(y; c(x))` of the lower objective, separable by entries or by groups. Implementations are frozen.

    Its parameters c, the coefficients, are computed once for each x; the methods in y are closed formulas in them, so
    the library needs no graph through y, and differentiates in x by differentiating these formulas.

    Points y are flat, `[d]`, or `[m, d]` with m blocks; coefficients broadcast to them. The last three methods describe
    kinks; their defaults are those of a term that has none.
    """

    @property
    @abstractmethod
    def smooth(self) -> bool:
        """Whether r is twice differentiable in y; if not, it needs a solver that uses `prox`."""

    @property
    def by_entry(self) -> bool:
        """Whether r is a sum over single entries, so that its prox and the projection on a box can follow another."""
        return True

    @abstractmethod
    def coefficients(self, x: Variables, layout: Layout) -> Coefficients:
        """Return the coefficients at x, differentiable in x.

        Args:
            x: the upper variables, nested as the user gave them.
            layout: of y.

        Returns:
            Tensors `[]`, `[d]` or `[m, d]` of the dtype of y; group ids are integers.

        Raises:
            InvalidProblem: a weight has a shape that fits nothing.
        """

    @abstractmethod
    def check(self, x: Variables, layout: Layout) -> None:
        """Refuse coefficients at x that make no convex regularizer.

        It waits for the device: call it once, not at every step.

        Raises:
            NonFinite: a coefficient is infinite or not a number.
            InvalidProblem: a coefficient is negative, or has a shape that fits nothing.
        """

    @abstractmethod
    def value(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return r(y), 0-dim: the sum over all entries of all blocks."""

    @abstractmethod
    def gradient(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return dr/dy, shaped like y; at a kink the part of it that exists, which is 0 across the kink."""

    @abstractmethod
    def curvature(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return the diagonal of d²r/dy², shaped like y, where it exists."""

    @abstractmethod
    def prox(self, coefficients: Coefficients, v: Tensor, step: float | Tensor) -> Tensor:
        """Return `argmin_y r(y) + ‖y - v‖² / (2 step)`, shaped like v, differentiable almost everywhere.

        Args:
            coefficients: what `coefficients` returned.
            v: `[d]` or `[m, d]`.
            step: > 0, broadcastable to v; one number a group where there are groups.
        """

    def hvp(self, coefficients: Coefficients, y: Tensor, v: Tensor) -> Tensor:
        """Return (d²r/dy²) v, where it exists, for v `[*, d]` that broadcasts to y."""
        return self.curvature(coefficients, y) * v

    def held(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return which entries of y lie exactly at a kink, so that small changes of g leave them there; boolean."""
        return torch.zeros_like(y, dtype=torch.bool)

    def slack(self, coefficients: Coefficients, y: Tensor, gradient: Tensor) -> Tensor:
        """Return, where held, how far `-gradient` is from the boundary of the subdifferential of r; inf elsewhere.

        It is negative where it lies outside: there y is no minimizer.

        Args:
            coefficients: what `coefficients` returned.
            y: `[d]` or `[m, d]`.
            gradient: of the rest of the lower objective, shaped like y.
        """
        return torch.full_like(y, torch.inf)

    def distance(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return how far entries that are not held are from the nearest kink; inf where there is none, or if held."""
        return torch.full_like(y, torch.inf)
