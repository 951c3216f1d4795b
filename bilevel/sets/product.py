"""Sets on parts of the variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.layout import Layout
from bilevel.sets._base import Projection, Set, is_list, project_bare
from bilevel.status import InvalidProblem


@final
@dataclass(frozen=True, eq=False)
class Product(Set):
    """Constrain parts of the variables, each by a set of its own.

    Args:
        structure: nested like the variables, with a Set or None (free) at each leaf. A set higher up constrains all
            leaves below it together. Left out dict keys are free.

    Raises:
        InvalidProblem: an entry is no Set, or (at `bind`) the nesting differs or a set does not fit its leaf.

    Example:
        >>> from bilevel.sets import Simplex
        >>> layout = Layout.of({"rate": torch.zeros(1), "mix": torch.zeros(2)})
        >>> Product({"mix": Simplex()}).bind(layout)(torch.tensor([-7.0, 3.0, 0.0]))
        tensor([-7.,  1.,  0.])
    """

    structure: Any

    def parts(self, layout: Layout) -> list[tuple[slice, Layout, Set]]:
        """Return the sets in the order of the flat vector, each with its place and the layout of what it constrains."""
        found: list[tuple[slice, Layout, Set]] = []
        _collect(layout, layout.skeleton, self.structure, found)
        return found

    def project(self, point: Tensor) -> Tensor:
        """Return the projection of a bare tensor, for a structure that is a bare set; else use `bind`."""
        return project_bare(self, point)

    def bind(self, layout: Layout) -> Projection:
        """Return the projection of flat vectors, part by part."""
        parts = [(place, part.bind(own)) for place, own, part in self.parts(layout)]

        def project(flat: Tensor) -> Tensor:
            pieces, at = [], 0
            for place, part in parts:
                pieces += [flat[..., at : place.start], part(flat[..., place])]
                at = place.stop
            return torch.cat([*pieces, flat[..., at:]], dim=-1)

        return project


def _collect(layout: Layout, node: Any, structure: Any, parts: list[tuple[slice, Layout, Set]]) -> None:
    if structure is None:
        return
    if isinstance(structure, Set):
        place, own = layout.part(node)
        parts.append((place, own, structure))
    elif isinstance(structure, Mapping) and isinstance(node, Mapping) and structure.keys() <= node.keys():
        for key, child in node.items():
            _collect(layout, child, structure.get(key), parts)
    elif is_list(structure) and is_list(node) and len(structure) == len(node):
        for child, entry in zip(node, structure, strict=True):
            _collect(layout, child, entry, parts)
    else:
        names = layout.part(node)[1].names
        raise InvalidProblem(f"Product: {structure!r} does not fit the leaves {names}; give Sets nested like them.")
