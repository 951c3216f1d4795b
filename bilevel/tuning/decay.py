"""Weight decay: which of its values goes to which entry of which parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from bilevel.space import PerInput, PerLayer, PerParameter, PerUnit, Real, Space
from bilevel.status import InvalidProblem

WHOLE = "model"
"""Name of a layer that is the model itself."""


@dataclass(frozen=True)
class Decay:
    """How a vector of values is dealt out.

    Args:
        size: how many values; None: one, 0-dim, for all entries.
        places: parameter -> (first value, one past the last, shape that broadcasts to the parameter).
        names: what the values belong to: (name, first value, one past the last), in order.
        by_layer: whether each name has one value.
    """

    size: int | None
    places: Mapping[str, tuple[int, int, tuple[int, ...]]]
    names: tuple[tuple[str, int, int], ...] = ()
    by_layer: bool = False

    @classmethod
    def of(cls, space: Space, parameters: Mapping[str, Tensor]) -> Decay:
        """Return the deal that a space asks for.

        Raises:
            InvalidProblem: the space touches nothing in the model.
        """
        if isinstance(space, Real):
            return cls(None, {})
        if isinstance(space, PerLayer):
            return _by_layer(space, parameters)
        sizes: dict[tuple[str, int], int] = {}
        keys: dict[str, tuple[tuple[str, int], tuple[int, ...]]] = {}
        for name, value in parameters.items():
            key, shape = _key(space, name, tuple(value.shape))
            sizes[key], keys[name] = prod(shape), (key, shape)
        if all(value.dim() < 2 for value in parameters.values()) and isinstance(space, PerInput):
            raise InvalidProblem("space['weight_decay']: PerInput touches nothing, the model has no weight matrix.")
        starts, total = {}, 0
        for key, size in sizes.items():
            starts[key], total = total, total + size
        places = {name: (starts[key], starts[key] + sizes[key], shape) for name, (key, shape) in keys.items()}
        return cls(total, places, tuple((key[0], starts[key], starts[key] + size) for key, size in sizes.items()))

    def dealt(self, values: Tensor) -> Any:
        """Return what `bilevel.L2` takes as weight: a number, or parameter -> values that broadcast to it."""
        if self.size is None:
            return values
        return {name: values[first:end].view(shape) for name, (first, end, shape) in self.places.items()}

    def named(self, values: Tensor) -> Any:
        """Return the values as a user reads them: a float, floats by layer, or vectors by layer or parameter."""
        if self.size is None:
            return float(values)
        if self.by_layer:
            return {name: float(values[first]) for name, first, _ in self.names}
        return {name: values[first:end] for name, first, end in self.names}


def _key(space: Space, name: str, shape: tuple[int, ...]) -> tuple[tuple[str, int], tuple[int, ...]]:
    """Return whose values a parameter takes, and in which shape; parameters with the same key share them."""
    layer = name.rpartition(".")[0]
    if isinstance(space, PerUnit) and shape:
        return (layer or WHOLE, shape[0]), (shape[0], *[1] * (len(shape) - 1))
    if isinstance(space, PerInput):
        return (name, 0), ((1, shape[1], *[1] * (len(shape) - 2)) if len(shape) > 1 else ())
    assert isinstance(space, PerParameter | PerUnit)
    return (name, 0), shape


def _by_layer(space: PerLayer, parameters: Mapping[str, Tensor]) -> Decay:
    known = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    wanted = known if space.layers is None else list(space.layers)
    unknown = [layer for layer in wanted if layer not in known]
    if unknown or not wanted:
        raise InvalidProblem(f"space['weight_decay']: PerLayer(layers={wanted}) touches nothing: {unknown} own no "
                             f"trainable parameter. Layers that do are {known}.")  # fmt: skip
    numbers = {layer: i for i, layer in enumerate(wanted)}
    places = {
        name: (numbers[layer], numbers[layer] + 1, ())
        for name in parameters
        if (layer := name.rpartition(".")[0]) in numbers
    }
    names = tuple((layer or WHOLE, i, i + 1) for i, layer in enumerate(wanted))
    return Decay(len(wanted), places, names, by_layer=True)
