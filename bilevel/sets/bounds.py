"""Bounds on single entries, read off a set."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.layout import Layout, named_leaves
from bilevel.sets._base import Set
from bilevel.sets.elementwise import Box, NonNegative
from bilevel.sets.product import Product
from bilevel.status import InvalidProblem


def bounds(constraint: Set | None, layout: Layout, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of each entry, infinite where there is no bound.

    Args:
        constraint: Box, NonNegative, a Product of these, or None.
        layout: of the variables.
        like: a flat vector of them.

    Raises:
        InvalidProblem: the set couples entries.

    Example:
        >>> y = torch.zeros(2)
        >>> bounds(NonNegative(), Layout.of(y, name="y"), y)
        (tensor([0., 0.]), tensor([inf, inf]))
    """
    low, high = torch.full_like(like, -torch.inf), torch.full_like(like, torch.inf)
    if constraint is None:
        return low, high
    parts = named_leaves(constraint.structure) if isinstance(constraint, Product) else [("", constraint)]
    for name, part in parts:
        if part is not None and not isinstance(part, Box | NonNegative):
            where = f" for '{name}'" if name else ""
            raise InvalidProblem(
                f"expected bounds on single entries (Box, NonNegative, or a Product of these), got {part!r}{where}."
            )
    project = constraint.bind(layout)
    return project(low), project(high)
