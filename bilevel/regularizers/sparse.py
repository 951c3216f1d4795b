"""Declared terms with a kink at 0 in each entry, which makes entries vanish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.layout import Layout, Variables
from bilevel.regularizers._base import Coefficients, Regularizer, Weight
from bilevel.regularizers._kinks import entry_distance, entry_slack, soft
from bilevel.regularizers._weights import check_number, check_weight, evaluate


@final
@dataclass(frozen=True, eq=False)
class L1(Regularizer):
    """Weigh absolute values: `r(y) = sum_j a_j |y_j|`, `a_j >= 0`: the lasso, weighted if a is not one number.

    Its kink at 0 is what makes entries vanish; there `gradient` gives 0 and `curvature` is 0 everywhere.

    Args:
        weight: a, given like the weight of `L2`: one number, or one a leaf, a group or an entry.
        groups: as in `L2`.

    Raises:
        InvalidProblem: the weight is a negative number, or not a number.

    References:
        R. Tibshirani, "Regression shrinkage and selection via the lasso", JRSS B 58, 1996.

    Example:
        >>> lasso = L1(lambda x: x.exp())
        >>> layout = Layout.of(torch.zeros(3), name="y")
        >>> coefficients = lasso.coefficients(torch.tensor([0.0, 0.0, -torch.inf]), layout)
        >>> lasso.prox(coefficients, torch.tensor([2.0, -0.3, -3.0]), step=0.5)
        tensor([ 1.5000,  0.0000, -3.0000])
    """

    weight: Weight
    groups: Any = None

    def __post_init__(self) -> None:
        check_number("L1(weight)", self.weight)

    @property
    def smooth(self) -> bool:
        """Whether r is twice differentiable: no."""
        return False

    def coefficients(self, x: Variables, layout: Layout) -> Coefficients:
        """Return (a,)."""
        return (evaluate("L1(weight)", self.weight, self.groups, x, layout),)

    def check(self, x: Variables, layout: Layout) -> None:
        """Refuse weights that are negative, infinite or not a number."""
        check_weight("L1(weight)", self.weight, self.groups, x, layout)

    def value(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `sum_j a_j |y_j|`."""
        return (coefficients[0] * y.abs()).sum()

    def gradient(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `a_j sign(y_j)`, with sign(0) = 0: at 0 one of many subgradients."""
        return coefficients[0] * y.sign()

    def curvature(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(y)

    def prox(self, coefficients: Coefficients, v: Tensor, step: float | Tensor) -> Tensor:
        """Return `sign(v_j) max(|v_j| - step a_j, 0)`."""
        return soft(v, step * coefficients[0])

    def held(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `y_j = 0 and a_j > 0`."""
        return (y == 0) & (coefficients[0] > 0)

    def slack(self, coefficients: Coefficients, y: Tensor, gradient: Tensor) -> Tensor:
        """Return `a_j - |gradient_j|` where held."""
        return entry_slack(coefficients[0], y, gradient)

    def distance(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `|y_j|` where `a_j > 0` and not held."""
        return entry_distance(coefficients[0], y)


@final
@dataclass(frozen=True, eq=False)
class ElasticNet(Regularizer):
    """Weigh absolute values and squares: `r(y) = sum_j a_j |y_j| + 1/2 w_j y_j²`, `a_j, w_j >= 0`.

    Its kink at 0 is what makes entries vanish. There `gradient` gives `w_j y_j = 0`, the least subgradient of r alone
    (a minimizer of g + r has, in general, another one), and `curvature` leaves the kink out.

    Args:
        l1: a, given like the weight of `L2`.
        l2: w, given like the weight of `L2`.
        groups: as in `L2`, for both; a 0-dim weight stays one for all entries.

    Raises:
        InvalidProblem: a weight is a negative number, or not a number.

    References:
        H. Zou, T. Hastie, "Regularization and variable selection via the elastic net", JRSS B 67, 2005.

    Example:
        >>> lasso = ElasticNet(l1=1.0)
        >>> layout = Layout.of(torch.zeros(3), name="y")
        >>> lasso.prox(lasso.coefficients(None, layout), torch.tensor([2.0, -0.3, -3.0]), step=0.5)
        tensor([ 1.5000,  0.0000, -2.5000])
    """

    l1: Weight
    l2: Weight = 0.0
    groups: Any = None

    def __post_init__(self) -> None:
        check_number("ElasticNet(l1)", self.l1)
        check_number("ElasticNet(l2)", self.l2)

    @property
    def smooth(self) -> bool:
        """Whether r is twice differentiable: no."""
        return False

    def coefficients(self, x: Variables, layout: Layout) -> Coefficients:
        """Return (a, w)."""
        return (
            evaluate("ElasticNet(l1)", self.l1, self.groups, x, layout),
            evaluate("ElasticNet(l2)", self.l2, self.groups, x, layout),
        )

    def check(self, x: Variables, layout: Layout) -> None:
        """Refuse weights that are negative, infinite or not a number."""
        check_weight("ElasticNet(l1)", self.l1, self.groups, x, layout)
        check_weight("ElasticNet(l2)", self.l2, self.groups, x, layout)

    def value(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `sum_j a_j |y_j| + 1/2 w_j y_j²`."""
        l1, l2 = coefficients
        return (l1 * y.abs() + 0.5 * l2 * y.square()).sum()

    def gradient(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `a_j sign(y_j) + w_j y_j`, with sign(0) = 0: at 0 one of many subgradients."""
        l1, l2 = coefficients
        return l1 * y.sign() + l2 * y

    def curvature(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `w_j`, the curvature where y_j is not 0."""
        return coefficients[1].expand(y.shape)

    def prox(self, coefficients: Coefficients, v: Tensor, step: float | Tensor) -> Tensor:
        """Return `sign(v_j) max(|v_j| - step a_j, 0) / (1 + step w_j)`."""
        l1, l2 = coefficients
        return soft(v, step * l1) / (1 + step * l2)

    def held(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `y_j = 0 and a_j > 0`."""
        return (y == 0) & (coefficients[0] > 0)

    def slack(self, coefficients: Coefficients, y: Tensor, gradient: Tensor) -> Tensor:
        """Return `a_j - |gradient_j|` where held."""
        return entry_slack(coefficients[0], y, gradient)

    def distance(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `|y_j|` where `a_j > 0` and not held."""
        return entry_distance(coefficients[0], y)
