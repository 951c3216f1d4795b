"""The aggregated objective `mu f + (1 - mu) g`: its gradient in y and the products with its second derivatives."""

from __future__ import annotations

from torch import Tensor

from bilevel.linearization import Leaves, join, second_derivatives
from bilevel.oracles import Oracles


class Aggregated:
    """Differentiate `mu f + (1 - mu) g` twice at one (x, y): one graph serves every product that follows.

    Products are made in the way that the oracles use for g, and a declared regularizer enters by formula. Each counts
    as one HVP or cross product; building counts as one gradient of g and, unless mu is 0, one of f.

    Args:
        oracles: of the problem.
        x: `[p]`.
        y: `[d]` or `[m, d]`.
        mu: weight of the upper objective, 0 <= mu <= 1; with 0 it is not evaluated.
        upper_step: names the upper batch.
        lower_step: names the lower batch.

    Attributes:
        value: `mu f + (1 - mu) g`, 0-dim.
        gradient: `mu df/dy + (1 - mu) dg/dy`, shaped like y.
    """

    def __init__(
        self, oracles: Oracles, x: Tensor, y: Tensor, mu: float, upper_step: int = 0, lower_step: int = 0
    ) -> None:
        lower = oracles.lower_at(lower_step)

        def evaluate(xs: Leaves, ys: Leaves) -> Tensor:
            if mu == 0.0:
                return lower(xs, ys)
            return mu * oracles.upper_at(upper_step)(xs, ys) + (1 - mu) * lower(xs, ys)

        oracles.count(gradients=1 if mu == 0.0 else 2)
        self._oracles, self._x, self._y, self._weight = oracles, x, y, 1 - mu
        self._core = second_derivatives(oracles.way, evaluate, oracles.x_layout, oracles.y_layout, x, y)
        self._declared = oracles.declared(x)
        self._diagonal = self._declared.curvature(y)
        self.value = self._core.value + self._weight * self._declared.value(y)
        self.gradient = self._core.gradient
        if self._diagonal is not None:
            self.gradient = self.gradient + self._weight * self._declared.add_gradient(y.new_zeros(()), y)

    def hvp(self, v: Tensor) -> Tensor:
        """Return the product of the second derivative in y with v, shaped like y."""
        self._count("hvps")
        product = self._core.hvp(v)
        return product if self._diagonal is None else product + self._weight * self._diagonal * v

    def cross(self, v: Tensor) -> Tensor:
        """Return the derivative in x of `<gradient, v>`, `[p]`."""
        self._count("crosses")
        layout = self._oracles.x_layout
        product = join(layout, self._core.cross(v), (), self._x)
        if self._diagonal is None:
            return product
        return product + self._weight * join(layout, self._declared.cross(self._y, v), (), self._x)

    def _count(self, kind: str) -> None:
        each = self._core.gradients_per_product
        self._oracles.count(**({"gradients": each} if each else {kind: 1}))
