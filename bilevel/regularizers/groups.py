"""Declared terms with a kink where a whole group of entries is 0, which makes groups vanish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.layout import Layout, Variables
from bilevel.regularizers._base import Coefficients, Regularizer, Weight
from bilevel.regularizers._kinks import entry_distance, entry_slack, group_norm, group_sum, shrunk, soft
from bilevel.regularizers._weights import check_groups, check_number, check_weight, evaluate, group_ids


@final
@dataclass(frozen=True, eq=False)
class GroupL1(Regularizer):
    """Weigh norms of groups: `r(y) = sum_G w_G ‖y_G‖`, `w_G >= 0`, Euclidean norms: the group lasso.

    Its kink at `y_G = 0` is what makes whole groups vanish; there `gradient` and `curvature` are 0.

    Args:
        weight: w, a number or a function of x that returns one or a vector `[n_groups]` (`[m, n_groups]`: one row a
            block). The square root of the group's size, which many papers multiply by, is not included.
        groups: integers, the group of each entry of y (from 0): a flat tensor, or a structure like y whose entries
            broadcast to the leaves. Left out leaves, and entries -1, are not penalized. Blocks share their groups, and
            each block has norms of its own.

    Raises:
        InvalidProblem: the weight is a negative number, or not a number.

    References:
        M. Yuan, Y. Lin, "Model selection and estimation in regression with grouped variables", JRSS B 68, 2006.

    Example:
        >>> group_lasso = GroupL1(2.5, groups=torch.tensor([0, 0, 1]))
        >>> layout = Layout.of(torch.zeros(3), name="y")
        >>> group_lasso.prox(group_lasso.coefficients(None, layout), torch.tensor([3.0, 4.0, 2.0]), step=1.0)
        tensor([1.5000, 2.0000, 0.0000])
    """

    weight: Weight
    groups: Any

    def __post_init__(self) -> None:
        check_number("GroupL1(weight)", self.weight)

    @property
    def smooth(self) -> bool:
        """Whether r is twice differentiable: no."""
        return False

    @property
    def by_entry(self) -> bool:
        """Whether r is a sum over single entries: no."""
        return False

    def coefficients(self, x: Variables, layout: Layout) -> Coefficients:
        """Return (w of each entry's group, group ids)."""
        return _by_entry("GroupL1(weight)", self.weight, self.groups, x, layout)

    def check(self, x: Variables, layout: Layout) -> None:
        """Refuse weights that are negative, infinite or not a number, and groups that do not fit."""
        _check("GroupL1(weight)", self.weight, self.groups, x, layout)

    def value(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `sum_G w_G ‖y_G‖`."""
        weight, ids = coefficients
        return (weight * y * _direction(y, ids)).sum()

    def gradient(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `w_G y_G / ‖y_G‖`, 0 where `y_G = 0`: there one of many subgradients."""
        weight, ids = coefficients
        return weight * _direction(y, ids)

    def curvature(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return the diagonal `w_G (1 - y_j² / ‖y_G‖²) / ‖y_G‖`, 0 where `y_G = 0`."""
        weight, ids = coefficients
        return weight * _bend(y, ids)

    def prox(self, coefficients: Coefficients, v: Tensor, step: float | Tensor) -> Tensor:
        """Return `v_G max(1 - step w_G / ‖v_G‖, 0)`."""
        weight, ids = coefficients
        return shrunk(v, ids, step * weight)

    def hvp(self, coefficients: Coefficients, y: Tensor, v: Tensor) -> Tensor:
        """Return `w_G (v_G - u_G <u_G, v_G>) / ‖y_G‖` with `u_G = y_G / ‖y_G‖`."""
        weight, ids = coefficients
        return weight * _bend_along(y, ids, v)

    def held(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `y_G = 0 and w_G > 0`."""
        weight, ids = coefficients
        return (group_norm(y, ids) == 0) & (weight > 0)

    def slack(self, coefficients: Coefficients, y: Tensor, gradient: Tensor) -> Tensor:
        """Return `w_G - ‖gradient_G‖` where held."""
        weight, ids = coefficients
        return torch.where(self.held(coefficients, y), weight - group_norm(gradient, ids), torch.inf)

    def distance(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `‖y_G‖` where `w_G > 0` and not held."""
        weight, ids = coefficients
        norm = group_norm(y, ids)
        return torch.where((norm > 0) & (weight > 0), norm, torch.inf)


@final
@dataclass(frozen=True, eq=False)
class SparseGroupL1(Regularizer):
    """Weigh absolute values and norms of groups: `r(y) = sum_j a_j |y_j| + sum_G w_G ‖y_G‖`, `a_j, w_G >= 0`.

    It makes whole groups vanish, and entries in the groups that stay: the sparse group lasso.

    Args:
        l1: a, given like the weight of `L2` (by number, leaf or entry).
        group: w, given like the weight of `GroupL1`.
        groups: as in `GroupL1`. Entries without a group have the first term only.

    Raises:
        InvalidProblem: a weight is a negative number, or not a number.

    References:
        N. Simon, J. Friedman, T. Hastie, R. Tibshirani, "A sparse-group lasso", J. Computational and Graphical
        Statistics 22, 2013.

    Example:
        >>> both = SparseGroupL1(l1=1.0, group=2.5, groups=torch.tensor([0, 0, 1]))
        >>> layout = Layout.of(torch.zeros(3), name="y")
        >>> both.prox(both.coefficients(None, layout), torch.tensor([4.0, 5.0, 2.0]), step=1.0)
        tensor([1.5000, 2.0000, 0.0000])
    """

    l1: Weight
    group: Weight
    groups: Any

    def __post_init__(self) -> None:
        check_number("SparseGroupL1(l1)", self.l1)
        check_number("SparseGroupL1(group)", self.group)

    @property
    def smooth(self) -> bool:
        """Whether r is twice differentiable: no."""
        return False

    @property
    def by_entry(self) -> bool:
        """Whether r is a sum over single entries: no."""
        return False

    def coefficients(self, x: Variables, layout: Layout) -> Coefficients:
        """Return (a, w of each entry's group, group ids)."""
        return (
            evaluate("SparseGroupL1(l1)", self.l1, None, x, layout),
            *_by_entry("SparseGroupL1(group)", self.group, self.groups, x, layout),
        )

    def check(self, x: Variables, layout: Layout) -> None:
        """Refuse weights that are negative, infinite or not a number, and groups that do not fit."""
        check_weight("SparseGroupL1(l1)", self.l1, None, x, layout)
        _check("SparseGroupL1(group)", self.group, self.groups, x, layout)

    def value(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `sum_j a_j |y_j| + sum_G w_G ‖y_G‖`."""
        l1, weight, ids = coefficients
        return (l1 * y.abs() + weight * y * _direction(y, ids)).sum()

    def gradient(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `a_j sign(y_j) + w_G y_j / ‖y_G‖`, 0 at kinks."""
        l1, weight, ids = coefficients
        return l1 * y.sign() + weight * _direction(y, ids)

    def curvature(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return that of the norms; see `GroupL1`."""
        _, weight, ids = coefficients
        return weight * _bend(y, ids)

    def prox(self, coefficients: Coefficients, v: Tensor, step: float | Tensor) -> Tensor:
        """Shrink the entries by `step a_j`, then the groups by `step w_G`."""
        l1, weight, ids = coefficients
        return shrunk(soft(v, step * l1), ids, step * weight)

    def hvp(self, coefficients: Coefficients, y: Tensor, v: Tensor) -> Tensor:
        """Return that of the norms; see `GroupL1`."""
        _, weight, ids = coefficients
        return weight * _bend_along(y, ids, v)

    def held(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return `y_G = 0 and w_G > 0`, or `y_j = 0 and a_j > 0`."""
        l1, weight, ids = coefficients
        return ((group_norm(y, ids) == 0) & (weight > 0)) | ((y == 0) & (l1 > 0))

    def slack(self, coefficients: Coefficients, y: Tensor, gradient: Tensor) -> Tensor:
        """Return `w_G - ‖soft(gradient_G, a_G)‖` in vanished groups, `a_j - |gradient_j|` for entries of the others."""
        l1, weight, ids = coefficients
        vanished = (group_norm(y, ids) == 0) & (weight > 0)
        of_group = weight - group_norm(soft(gradient, l1), ids)
        return torch.where(vanished, of_group, entry_slack(l1, y, gradient))

    def distance(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return the lesser of `|y_j|` and `‖y_G‖` where not held, as far as these have a weight."""
        l1, weight, ids = coefficients
        norm = group_norm(y, ids)
        of_group = torch.where((norm > 0) & (weight > 0), norm, torch.inf)
        either = torch.minimum(of_group, entry_distance(l1, y))
        return torch.where(self.held(coefficients, y), torch.inf, either)


def _by_entry(what: str, weight: Weight, groups: Any, x: Variables, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return (the weight of each entry's group `[d]` or `[m, d]`, ids `[d]`); no group is group d, weight 0."""
    ids = group_ids(groups, layout).expand(layout.size)
    ids = torch.where(ids < 0, layout.size, ids)
    by_entry = evaluate(what, weight, groups, x, layout)
    return torch.where(ids < layout.size, by_entry, 0.0), ids


def _check(what: str, weight: Weight, groups: Any, x: Variables, layout: Layout) -> None:
    check_groups(groups, layout)
    check_weight(what, weight, groups, x, layout)


def _direction(y: Tensor, ids: Tensor) -> Tensor:
    """Return `y_G / ‖y_G‖`, 0 where `y_G = 0`."""
    return y * _inverse(group_norm(y, ids))


def _bend(y: Tensor, ids: Tensor) -> Tensor:
    """Return the diagonal of the norms' second derivative, 0 where `y_G = 0`."""
    return _inverse(group_norm(y, ids)) * (1 - _direction(y, ids).square())


def _bend_along(y: Tensor, ids: Tensor, v: Tensor) -> Tensor:
    """Return the norms' second derivative times v: `(v_G - u_G <u_G, v_G>) / ‖y_G‖`, 0 where `y_G = 0`."""
    u = _direction(y, ids)
    return _inverse(group_norm(y, ids)) * (v - u * group_sum(u * v, ids))


def _inverse(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, 1 / torch.where(norm > 0, norm, 1.0), 0.0)
