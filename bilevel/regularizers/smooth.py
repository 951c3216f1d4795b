"""A smooth declared term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from bilevel.layout import Layout, Variables
from bilevel.regularizers._base import Coefficients, Regularizer, Weight
from bilevel.regularizers._weights import check_number, check_weight, evaluate


@final
@dataclass(frozen=True, eq=False)
class L2(Regularizer):
    """Weigh squares: `r(y) = 1/2 sum_j w_j y_j²`, `w_j >= 0`.

    Args:
        weight: w, a number or a function of x (in the user's structure) that returns one of

            - a 0-dim tensor: one weight for all entries;
            - a structure nested like y: entries that broadcast to the leaves of y. A left out dict key means 0;
            - a flat tensor `[d]`; if y is a single tensor, anything that broadcasts to it;
            - with `groups`, a vector `[n_groups]`.

            With m blocks the weights are shared, unless the entry has a leading m (`[m, ...]`, and does not broadcast
            to one block without it); a flat tensor may be `[m, d]`.
        groups: integers, the group of each entry of y (from 0): a flat tensor, or a structure like y whose entries
            broadcast to the leaves. Left out leaves, and entries -1, have weight 0.

    Raises:
        InvalidProblem: the weight is a negative number, or not a number.

    Example:
        >>> import torch
        >>> layout = Layout.of({"w": torch.ones(2), "b": torch.ones(1)}, name="y")
        >>> L2(lambda x: {"w": x.exp()}).coefficients(torch.zeros(2), layout)
        (tensor([1., 1., 0.]),)
        >>> ridge = L2(3.0)
        >>> ridge.value(ridge.coefficients(None, layout), torch.tensor([1.0, 2.0, 0.0]))
        tensor(7.5000)
    """

    weight: Weight
    groups: Any = None

    def __post_init__(self) -> None:
        check_number("L2(weight)", self.weight)

    @property
    def smooth(self) -> bool:
        """Whether r is twice differentiable: yes."""
        return True

    def coefficients(self, x: Variables, layout: Layout) -> Coefficients:
        """Return (w,)."""
        return (evaluate("L2(weight)", self.weight, self.groups, x, layout),)

    def check(self, x: Variables, layout: Layout) -> None:
        """Refuse weights that are negative, infinite or not a number."""
        check_weight("L2(weight)", self.weight, self.groups, x, layout)

    def value(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `1/2 sum_j w_j y_j²`."""
        return 0.5 * (coefficients[0] * y.square()).sum()

    def gradient(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `w_j y_j`."""
        return coefficients[0] * y

    def curvature(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `w_j`."""
        return coefficients[0].expand(y.shape)

    def prox(self, coefficients: Coefficients, v: Tensor, step: float | Tensor) -> Tensor:
        """Return `v_j / (1 + step w_j)`."""
        return v / (1 + step * coefficients[0])
