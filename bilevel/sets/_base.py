"""What a closed convex set is: its Euclidean projection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel.layout import Layout

Projection: TypeAlias = Callable[[Tensor], Tensor]
"""Projects flat vectors, `[d] -> [d]` or, with blocks, `[m, d] -> [m, d]` row by row."""


class Set(ABC):
    """A closed convex set K. A set of your own needs `project`; implementations here are frozen dataclasses."""

    @abstractmethod
    def project(self, point: Tensor) -> Tensor:
        """Return `argmin_{z in K} ‖z - point‖`, shaped like `point`, which counts as one vector whatever its shape."""

    def violation(self, point: Tensor) -> Tensor:
        """Return the distance `‖point - project(point)‖`, 0-dim; 0 in the set."""
        distance: Tensor = torch.linalg.vector_norm(point - self.project(point))
        return distance

    def bind(self, layout: Layout) -> Projection:
        """Return the projection of the flat vectors of `layout`; all leaves of one block are one vector.

        Raises:
            InvalidProblem: the set does not fit the variables.
        """
        if layout.blocks is None:
            return self.project
        return lambda flat: torch.stack([self.project(row) for row in flat])


def project_bare(constraint: Set, point: Tensor) -> Tensor:
    """Return a projection of a tensor of any shape through that of flat vectors."""
    layout = Layout.of(point.new_empty(point.shape), name="point")
    return constraint.bind(layout)(point.reshape(-1)).reshape(point.shape)


def is_list(value: Any) -> bool:
    """Whether a value is a list or tuple of any kind."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def is_nested(value: Any) -> bool:
    """Whether a value may be a structure, to be understood only beside the variables."""
    return isinstance(value, Mapping) or is_list(value)
