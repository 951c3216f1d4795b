"""The declared regularizer of a problem at one x: formulas in y, and only its weights are traced."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel.layout import Layout
from bilevel.linearization import gradients, join, leaves_of
from bilevel.regularizers import Regularizer


@dataclass(eq=False)
class Declared:
    """The declared regularizer at one x: formulas in y, and only its weights are traced."""

    regularizer: Regularizer | None
    x: Tensor
    x_layout: Layout
    y_layout: Layout
    _weights: tuple[Tensor, ...] | None = field(default=None, init=False, repr=False)

    def gradient_x(self, y: Tensor) -> Tensor:
        """Return dr/dx, `[p]`: only the weights are traced."""
        if self.regularizer is None:
            return torch.zeros_like(self.x)
        xs = leaves_of(self.x_layout, self.x)
        with torch.enable_grad():
            coefficients = self.regularizer.coefficients(self.x_layout.nest(xs), self.y_layout)
            found = gradients([self.regularizer.value(coefficients, y)], xs)
        return join(self.x_layout, found, (), self.x)

    def prox(self, v: Tensor, step: float | Tensor) -> Tensor:
        """Return argmin_y `step r(x, y) + ‖y - v‖^2 / 2`; v itself without a regularizer."""
        return v if self.regularizer is None else self.regularizer.prox(self._coefficients, v, step)

    @property
    def by_entry(self) -> bool:
        """Whether the curvature is diagonal."""
        return self.regularizer is None or self.regularizer.by_entry

    def value(self, y: Tensor) -> Tensor | float:
        """Return r(x, y)."""
        return 0.0 if self.regularizer is None else self.regularizer.value(self._coefficients, y)

    def add_gradient(self, gradient: Tensor, y: Tensor) -> Tensor:
        """Return `gradient + dr/dy`."""
        return gradient if self.regularizer is None else gradient + self.regularizer.gradient(self._coefficients, y)

    def curvature(self, y: Tensor) -> Tensor | None:
        """Return the diagonal of d2r/dy2 shaped like y, or None without a regularizer."""
        if self.regularizer is None:
            return None
        return self.regularizer.curvature(self._coefficients, y).expand(y.shape)

    def hvp(self, y: Tensor, v: Tensor) -> Tensor | float:
        """Return (d2r/dy2) v, for one v or several `[k, *]`."""
        return 0.0 if self.regularizer is None else self.regularizer.hvp(self._coefficients, y, v)

    def held(self, y: Tensor) -> Tensor:
        """Return which entries of y lie exactly at a kink of r."""
        if self.regularizer is None:
            return torch.zeros_like(y, dtype=torch.bool)
        return self.regularizer.held(self._coefficients, y)

    def slack(self, y: Tensor, gradient: Tensor) -> Tensor:
        """Return how far `-gradient` lies within the subdifferential of r where held, inf elsewhere."""
        if self.regularizer is None:
            return torch.full_like(y, torch.inf)
        return self.regularizer.slack(self._coefficients, y, gradient)

    def distance(self, y: Tensor) -> Tensor:
        """Return how far entries that are not held are from a kink of r."""
        if self.regularizer is None:
            return torch.full_like(y, torch.inf)
        return self.regularizer.distance(self._coefficients, y)

    def cross(self, y: Tensor, v: Tensor) -> list[Tensor | None]:
        """Return the leaves of d<dr/dy, v>/dx."""
        xs = leaves_of(self.x_layout, self.x)
        if self.regularizer is None:
            return [None] * len(xs)
        with torch.enable_grad():
            coefficients = self.regularizer.coefficients(self.x_layout.nest(xs), self.y_layout)
            return gradients([(self.regularizer.gradient(coefficients, y) * v).sum()], xs)

    @property
    def _coefficients(self) -> tuple[Tensor, ...]:
        assert self.regularizer is not None
        if self._weights is None:  # by hand, since a compiled step cannot hold the lock of a cached_property
            with torch.no_grad():
                self._weights = self.regularizer.coefficients(self.x_layout.unflatten(self.x), self.y_layout)
        return self._weights
