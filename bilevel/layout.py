"""Nested variables and one flat vector: the map between what users write and what algorithms compute with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel.status import InvalidProblem

Variables: TypeAlias = Any
"""A Tensor, or nested dicts, lists and tuples of Tensors."""


def named_leaves(variables: Variables, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted name, leaf)` in order; a bare tensor is named by the prefix alone."""
    if isinstance(variables, Mapping):
        for key, child in variables.items():
            yield from named_leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(variables, Sequence) and not isinstance(variables, str | bytes):
        for index, child in enumerate(variables):
            yield from named_leaves(child, f"{prefix}[{index}]")
    else:
        yield prefix, variables


def rebuild(like: Variables, leaves: Iterator[Any]) -> Variables:
    """Return the structure of `like` with its leaves replaced, in order, by `leaves`."""
    if isinstance(like, Mapping):
        return {key: rebuild(child, leaves) for key, child in like.items()}
    if isinstance(like, Sequence) and not isinstance(like, str | bytes):
        children = [rebuild(child, leaves) for child in like]
        if isinstance(like, tuple):
            return type(like)(*children) if hasattr(like, "_fields") else tuple(children)
        return children
    return next(leaves)


@dataclass(frozen=True)
class Layout:
    """Where each leaf of nested variables lies in one flat vector `[d]` (or `[m, d]`: one row a block).

    Leaves are told apart by their dotted `names`; `shapes` exclude the leading block dimension. All methods accept
    further leading dimensions before the last, so `[k, d]` holds k points.

    Example:
        >>> layout = Layout.of({"w": torch.ones(2, 3), "b": torch.zeros(3)})
        >>> layout.size, layout.names
        (9, ('w', 'b'))
        >>> layout.unflatten(layout.flatten({"w": torch.ones(2, 3), "b": torch.zeros(3)}))["w"].shape
        torch.Size([2, 3])
    """

    skeleton: Variables
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    blocks: int | None = None

    @classmethod
    def of(cls, variables: Variables, *, name: str = "x", blocks: int | None = None) -> Layout:
        """Read the layout off `variables`.

        Args:
            variables: floating-point tensors, bare or nested in dicts, lists and tuples, all of one dtype and device.
            name: what to call the variables in messages.
            blocks: if given, every leaf has this leading dimension.

        Raises:
            InvalidProblem: a leaf is no floating-point tensor, leaves differ in dtype or device, or there are none.
        """
        pairs = [(leaf_name or name, leaf) for leaf_name, leaf in named_leaves(variables)]
        for leaf_name, leaf in pairs:
            _check_leaf(name, leaf_name, leaf, blocks)
        if sum(leaf.numel() for _, leaf in pairs) == 0:
            what = "no hyperparameters: x" if name == "x" else f"no variables: {name}"
            raise InvalidProblem(f"{what} has no entries; give at least one number to optimize.")
        _check_agreement(name, pairs)
        first = pairs[0][1]
        lead = 0 if blocks is None else 1
        return cls(
            skeleton=rebuild(variables, iter(range(len(pairs)))),
            names=tuple(leaf_name for leaf_name, _ in pairs),
            shapes=tuple(leaf.shape[lead:] for _, leaf in pairs),
            dtype=first.dtype,
            device=first.device,
            blocks=blocks,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each leaf (of one block)."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Length d of the flat vector (of one block)."""
        return sum(self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the flat vector: `[d]`, or `[m, d]` with blocks."""
        return (self.size,) if self.blocks is None else (self.blocks, self.size)

    def flatten(self, variables: Variables) -> Tensor:
        """Return a detached copy of `variables` as one flat vector `[d]` or `[m, d]`.

        Raises:
            InvalidProblem: the structure or a shape differs from this layout's.
        """
        pairs = list(named_leaves(variables))
        lead = () if self.blocks is None else (self.blocks,)
        shapes = [(*lead, *shape) for shape in self.shapes]
        got = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for _, leaf in pairs]
        if got != shapes:
            raise InvalidProblem(f"expected leaves {dict(zip(self.names, shapes, strict=True))}, got {got}.")
        # A single leaf would come back as a view of the user's tensor: clone, so that nothing of theirs can change.
        return self.concat([leaf.detach().to(self.device, self.dtype) for _, leaf in pairs]).clone()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return the leaves as views of `flat` (`[..., d]`), shapes `[..., *shape]`."""
        leaves = flat.split(self.sizes, dim=-1) if len(self.sizes) > 1 else (flat,)
        lead = flat.shape[:-1]
        return [leaf.view(lead + shape) for leaf, shape in zip(leaves, self.shapes, strict=True)]

    def concat(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return leaves `[..., *shape]` as one vector `[..., d]`; the inverse of `views`."""
        rows = [
            leaf.reshape(*leaf.shape[: leaf.dim() - len(shape)], -1)
            for leaf, shape in zip(leaves, self.shapes, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def nest(self, leaves: Sequence[Any]) -> Variables:
        """Put leaves back into the user's structure."""
        return rebuild(self.skeleton, iter(leaves))

    def unflatten(self, flat: Tensor) -> Variables:
        """Return the user's structure with leaves that are views of `flat`."""
        return self.nest(self.views(flat))

    def name_of(self, index: int) -> str:
        """Name the leaf that holds flat index `index`, for messages."""
        for name, size in zip(self.names, self.sizes, strict=True):
            if index < size:
                return name
            index -= size
        raise IndexError(f"flat index {index} is past the end of a vector of length {self.size}")


def _check_leaf(name: str, leaf_name: str, leaf: Any, blocks: int | None) -> None:
    if not isinstance(leaf, Tensor):
        raise InvalidProblem(
            f"{name}: leaf '{leaf_name}' is a {type(leaf).__name__}, not a Tensor; use torch.tensor(...)."
        )
    if not leaf.dtype.is_floating_point:
        raise InvalidProblem(
            f"{name}: leaf '{leaf_name}' has dtype {leaf.dtype}, which has no gradient; relax it to floating point, "
            "or search over it from outside (Optuna)."
        )
    if blocks is not None and (leaf.dim() == 0 or leaf.shape[0] != blocks):
        raise InvalidProblem(
            f"{name}: leaf '{leaf_name}' has shape {tuple(leaf.shape)}, but blocks={blocks} comes first."
        )
    strides = zip(leaf.shape, leaf.stride(), strict=True)
    if any(stride == 0 and length > 1 for length, stride in strides):
        raise InvalidProblem(
            f"{name}: leaf '{leaf_name}' shares memory between its entries (an expanded view); pass {leaf_name}.clone()."
        )


def _check_agreement(name: str, pairs: Sequence[tuple[str, Tensor]]) -> None:
    first_name, first = pairs[0]
    seen: list[tuple[int, int, int, str]] = []
    for leaf_name, leaf in pairs:
        if leaf.dtype != first.dtype:
            raise InvalidProblem(
                f"{name}: '{first_name}' is {first.dtype} but '{leaf_name}' is {leaf.dtype}; use one dtype for all leaves."
            )
        if leaf.device != first.device:
            raise InvalidProblem(
                f"{name}: '{first_name}' is on {first.device} but '{leaf_name}' on {leaf.device}; use one device."
            )
        if leaf.numel() == 0:
            continue
        last = sum((n - 1) * s for n, s in zip(leaf.shape, leaf.stride(), strict=True))
        start = leaf.storage_offset()
        seen.append((leaf.untyped_storage().data_ptr(), start, start + last, leaf_name))
    seen.sort()
    for (storage, _, end, one), (other_storage, start, _, other) in zip(seen, seen[1:], strict=False):
        if storage == other_storage and start <= end:
            raise InvalidProblem(f"{name}: leaves '{one}' and '{other}' overlap in memory; clone one, or pass it once.")
