"""Declared separable terms of the lower objective: everything about them is a formula, nothing is traced through y."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel.layout import Layout, Variables, named_leaves
from bilevel.status import InvalidProblem, NonFinite

Weight: TypeAlias = float | Callable[[Variables], Any]
"""A number >= 0, or a function of x that returns numbers >= 0 (see `L2` for the shapes)."""

Coefficients: TypeAlias = tuple[Tensor, ...]


class Regularizer(ABC):
    """A term `r(y; c(x)) = sum_j r_j(y_j; c_j(x))` of the lower objective. Implementations are frozen dataclasses.

    Its parameters c, the coefficients, are computed once for each x; the methods in y are closed formulas in them, so
    the library needs no graph through y, and differentiates in x by differentiating these formulas.

    Points y are flat, `[d]`, or `[m, d]` with m blocks; coefficients broadcast to them.
    """

    @property
    @abstractmethod
    def smooth(self) -> bool:
        """Whether r is twice differentiable in y; if not, it needs a solver that uses `prox`."""

    @abstractmethod
    def coefficients(self, x: Variables, layout: Layout) -> Coefficients:
        """Return the coefficients at x, differentiable in x.

        Args:
            x: the upper variables, nested as the user gave them.
            layout: of y.

        Returns:
            Tensors `[]`, `[d]` or `[m, d]` of the dtype of y.

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
        """Return dr/dy, shaped like y."""

    @abstractmethod
    def curvature(self, coefficients: Coefficients, y: Tensor) -> Tensor:
        """Return the diagonal of d²r/dy², shaped like y, where it exists."""

    @abstractmethod
    def prox(self, coefficients: Coefficients, v: Tensor, step: float | Tensor) -> Tensor:
        """Return `argmin_y r(y) + ‖y - v‖² / (2 step)`, shaped like v, differentiable almost everywhere.

        Args:
            coefficients: what `coefficients` returned.
            v: `[d]` or `[m, d]`.
            step: > 0, broadcastable to v.
        """


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
        _check_number("L2(weight)", self.weight)

    @property
    def smooth(self) -> bool:
        """Whether r is twice differentiable: yes."""
        return True

    def coefficients(self, x: Variables, layout: Layout) -> Coefficients:
        """Return (w,)."""
        return (_evaluate("L2(weight)", self.weight, self.groups, x, layout),)

    def check(self, x: Variables, layout: Layout) -> None:
        """Refuse weights that are negative, infinite or not a number."""
        _check("L2(weight)", self.weight, self.groups, x, layout)

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
        _check_number("ElasticNet(l1)", self.l1)
        _check_number("ElasticNet(l2)", self.l2)

    @property
    def smooth(self) -> bool:
        """Whether r is twice differentiable: no."""
        return False

    def coefficients(self, x: Variables, layout: Layout) -> Coefficients:
        """Return (a, w)."""
        return (
            _evaluate("ElasticNet(l1)", self.l1, self.groups, x, layout),
            _evaluate("ElasticNet(l2)", self.l2, self.groups, x, layout),
        )

    def check(self, x: Variables, layout: Layout) -> None:
        """Refuse weights that are negative, infinite or not a number."""
        _check("ElasticNet(l1)", self.l1, self.groups, x, layout)
        _check("ElasticNet(l2)", self.l2, self.groups, x, layout)

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
        threshold = step * l1
        # Strictly less: at v = 0 with a = 0 the derivative in v must be that of the identity, and NaN must stay.
        shrunk = torch.where(v.abs() < threshold, torch.zeros_like(v), v - threshold * v.sign())
        return shrunk / (1 + step * l2)


def _check_number(what: str, weight: Weight) -> None:
    if callable(weight):
        return
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise InvalidProblem(
            f"{what} must be a number or a function of x, got {type(weight).__name__}; "
            "for a constant tensor write lambda x: tensor."
        )
    if not (isfinite(weight) and weight >= 0):
        raise InvalidProblem(f"{what} = {weight} must be finite and >= 0.")


def _evaluate(what: str, weight: Weight, groups: Any, x: Variables, layout: Layout) -> Tensor:
    """Return a weight at x as a tensor `[]`, `[d]` or `[m, d]`."""
    given = weight(x) if callable(weight) else weight
    if groups is None or not isinstance(given, Tensor) or given.dim() == 0:
        return layout.spread(given, 0.0, what=what)
    ids = _group_ids(groups, layout)
    # One more weight, 0, is what the id -1 of entries without a group points at.
    padded = torch.cat([given, given.new_zeros(*given.shape[:-1], 1)], dim=-1)
    return layout.spread(padded[..., ids].expand(*given.shape[:-1], layout.size), 0.0, what=what)


def _group_ids(groups: Any, layout: Layout) -> Tensor:
    ids = layout.spread(groups, -1, what="groups", dtype=torch.long)
    if ids.dim() > 1:
        raise InvalidProblem("groups: blocks share their groups; give ids for one block.")
    return ids


def _check(what: str, weight: Weight, groups: Any, x: Variables, layout: Layout) -> None:
    if groups is not None and callable(weight):
        _check_groups(what, weight, groups, x, layout)
    with torch.no_grad():
        values = _evaluate(what, weight, groups, x, layout)
    bad = ~(values.isfinite() & (values >= 0))
    if not bad.any():
        return
    first = int(bad.reshape(-1).nonzero()[0])
    value = float(values.reshape(-1)[first])
    where = f" for '{layout.name_of(first % layout.size)}'" if values.dim() else ""
    name = f"{what}, {getattr(weight, '__name__', 'the function')}(x),"
    if value < 0 and isfinite(value):
        raise InvalidProblem(f"{name} is {value}{where}; weights are >= 0. Map x through exp or softplus.")
    raise NonFinite(
        f"{name} is {value}{where} ({values.dtype}) at {_largest(x)}. Bound x with upper_set=Box(...), "
        "start it lower, or use float64: exp overflows float32 above 88.7."
    )


def _check_groups(what: str, weight: Callable[[Variables], Any], groups: Any, x: Variables, layout: Layout) -> None:
    for name, leaf in named_leaves(groups):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.dtype == torch.bool):
            raise InvalidProblem(f"groups: '{name or 'groups'}' has dtype {leaf.dtype}; give integers.")
    ids = _group_ids(groups, layout)
    with torch.no_grad():
        given = weight(x)
    if isinstance(given, Tensor) and given.dim() == 0:
        return
    if not isinstance(given, Tensor) or given.shape[:-1] not in (torch.Size(), torch.Size(layout.shape[:-1])):
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise InvalidProblem(f"{what}: with groups, return a vector of one weight a group, got {shape}.")
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= given.shape[-1]:
        raise InvalidProblem(
            f"{what}: group ids run from {low} to {high}, but x gives {given.shape[-1]} weights; "
            "ids count from 0 (-1: no group)."
        )


def _largest(x: Variables) -> str:
    leaves = [(name or "x", leaf) for name, leaf in named_leaves(x) if isinstance(leaf, Tensor) and leaf.numel()]
    if not leaves:
        return "x"
    name, leaf = max(leaves, key=lambda pair: float(pair[1].detach().abs().nan_to_num(nan=torch.inf).max()))
    flat = leaf.detach().reshape(-1)
    index = int(flat.abs().nan_to_num(nan=torch.inf).argmax())
    return f"{name} = {float(flat[index]):.6g}" + (f" (entry {index})" if leaf.numel() > 1 else "")
