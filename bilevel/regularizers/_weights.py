"""Weights of declared terms: a number or a function of x, spread over the entries of y and checked."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from bilevel.layout import Layout, Variables, named_leaves
from bilevel.regularizers._base import Weight
from bilevel.status import InvalidProblem, NonFinite


def check_number(what: str, weight: Weight) -> None:
    """Refuse a constant that is no number >= 0; functions are checked at an x.

    Raises:
        InvalidProblem: it is not a number, negative or not finite.
    """
    if callable(weight):
        return
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise InvalidProblem(
            f"{what} must be a number or a function of x, got {type(weight).__name__}; "
            "for a constant tensor write lambda x: tensor."
        )
    if not (isfinite(weight) and weight >= 0):
        raise InvalidProblem(f"{what} = {weight} must be finite and >= 0.")


def evaluate(what: str, weight: Weight, groups: Any, x: Variables, layout: Layout) -> Tensor:
    """Return a weight at x as a tensor `[]`, `[d]` or `[m, d]`."""
    given = weight(x) if callable(weight) else weight
    if groups is None or not isinstance(given, Tensor) or given.dim() == 0:
        return layout.spread(given, 0.0, what=what)
    ids = group_ids(groups, layout)
    # One more weight, 0, is what the id -1 of entries without a group points at.
    padded = torch.cat([given, given.new_zeros(*given.shape[:-1], 1)], dim=-1)
    return layout.spread(padded[..., ids].expand(*given.shape[:-1], layout.size), 0.0, what=what)


def group_ids(groups: Any, layout: Layout) -> Tensor:
    """Return the group of each entry `[]` or `[d]`, -1 for none.

    Raises:
        InvalidProblem: the groups fit no leaf, or differ between blocks.
    """
    ids = layout.spread(groups, -1, what="groups", dtype=torch.long)
    if ids.dim() > 1:
        raise InvalidProblem("groups: blocks share their groups; give ids for one block.")
    return ids


def check_weight(what: str, weight: Weight, groups: Any, x: Variables, layout: Layout) -> None:
    """Refuse a weight at x that is negative, infinite or not a number, and groups that do not fit it.

    Raises:
        NonFinite: a weight is infinite or not a number.
        InvalidProblem: a weight is negative, or has a shape that fits nothing.
    """
    if groups is not None and callable(weight):
        _check_fit(what, weight, groups, x, layout)
    with torch.no_grad():
        values = evaluate(what, weight, groups, x, layout)
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


def check_groups(groups: Any, layout: Layout) -> None:
    """Refuse group ids that are no integers from -1 to d - 1, or fit no leaf.

    Raises:
        InvalidProblem: so.
    """
    ids = _integers(groups, layout)
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= layout.size:
        raise InvalidProblem(
            f"groups: ids run from {low} to {high}, but {layout.size} entries make at most {layout.size} groups; ids "
            "count from 0 (-1: no group)."
        )


def _integers(groups: Any, layout: Layout) -> Tensor:
    for name, leaf in named_leaves(groups):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.dtype == torch.bool):
            raise InvalidProblem(f"groups: '{name or 'groups'}' has dtype {leaf.dtype}; give integers.")
    return group_ids(groups, layout)


def _check_fit(what: str, weight: Callable[[Variables], Any], groups: Any, x: Variables, layout: Layout) -> None:
    ids = _integers(groups, layout)
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
