"""Nested variables and one flat vector: the map between what users write and what algorithms compute with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel.status import InvalidProblem

Variables: TypeAlias = Any
"""A Tensor, or nested dicts, lists and tuples of Tensors."""

HALF = (torch.float16, torch.bfloat16)


def named_leaves(variables: Variables, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted name, leaf)` in order; a bare tensor is named by the prefix alone."""
    if isinstance(variables, Tensor):  # first: asking about Mapping is slow
        yield prefix, variables
    elif isinstance(variables, Mapping):
        for key, child in variables.items():
            yield from named_leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(variables, Sequence) and not isinstance(variables, str | bytes):
        for index, child in enumerate(variables):
            yield from named_leaves(child, f"{prefix}[{index}]")
    else:
        yield prefix, variables


def rebuild(like: Variables, leaves: Iterator[Any]) -> Variables:
    """Return the structure of `like` with its leaves replaced, in order, by `leaves`."""
    if isinstance(like, int | Tensor):  # most are, and to ask for abstract types is slow
        return next(leaves)
    if isinstance(like, dict | Mapping):
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
    leaf_dtype: torch.dtype | None = None

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
            # Steps of 1e-4 vanish in half precision: hold the vector in float32 and hand out leaves in the user's type.
            dtype=torch.float32 if first.dtype in HALF else first.dtype,
            device=first.device,
            blocks=blocks,
            leaf_dtype=first.dtype if first.dtype in HALF else None,
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each leaf (of one block)."""
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """Length d of the flat vector (of one block)."""
        return sum(self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the flat vector: `[d]`, or `[m, d]` with blocks."""
        return (self.size,) if self.blocks is None else (self.blocks, self.size)

    def flatten(self, variables: Variables) -> Tensor:
        """Return a detached copy of `variables` as one flat vector `[d]` or `[m, d]`.

        Dicts are read by key, so their order does not matter.

        Raises:
            InvalidProblem: the structure or a shape differs from this layout's.
        """
        lead = () if self.blocks is None else (self.blocks,)
        shapes = [(*lead, *shape) for shape in self.shapes]
        leaves = self.leaves(variables)
        got = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
        if got != shapes:
            found = {name: tuple(getattr(leaf, "shape", ())) for name, leaf in named_leaves(variables)}
            raise InvalidProblem(f"expected leaves {dict(zip(self.names, shapes, strict=True))}, got {found}.")
        # A single leaf would come back as a view of the user's tensor: clone, so that nothing of theirs can change.
        return self.concat([leaf.detach().to(self.device, self.dtype) for leaf in leaves]).clone()

    def leaves(self, variables: Variables) -> list[Any]:
        """Return the leaves of `variables` in order, with their graphs.

        Raises:
            InvalidProblem: the structure differs from this layout's.
        """
        return list(_in_order(self.skeleton, variables))

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return the leaves as views of `flat` (`[..., d]`), shapes `[..., *shape]`."""
        leaves = flat.split_with_sizes(self.sizes, dim=-1) if len(self.sizes) > 1 else (flat,)
        lead = flat.shape[:-1]
        return [
            leaf if len(shape) == 1 else leaf.view(lead + shape)
            for leaf, shape in zip(leaves, self.shapes, strict=True)
        ]

    def concat(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return leaves `[..., *shape]` as one vector `[..., d]`; the inverse of `views`."""
        rows = [
            leaf if len(shape) == 1 else leaf.reshape(*leaf.shape[: leaf.dim() - len(shape)], -1)
            for leaf, shape in zip(leaves, self.shapes, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def nest(self, leaves: Sequence[Any]) -> Variables:
        """Put leaves back into the user's structure, in the user's dtype."""
        cast = leaves if self.leaf_dtype is None else [leaf.to(self.leaf_dtype) for leaf in leaves]
        skeleton = self.skeleton
        if type(skeleton) is dict and all(type(place) is int for place in skeleton.values()):
            return dict(zip(skeleton, cast, strict=True))  # what most are, at a third of the time
        return rebuild(skeleton, iter(cast))

    def unflatten(self, flat: Tensor) -> Variables:
        """Return the user's structure with leaves that are views of `flat`."""
        return self.nest(self.views(flat))

    def align(self, structure: Any, default: Any, *, what: str) -> list[Any]:
        """Return what `structure` holds for each leaf, in order.

        Args:
            structure: nested like the variables. Anything else than a dict, list or tuple stands for all leaves below
                its place; at the place of a leaf, anything is an entry.
            default: the entry of leaves whose dict keys are left out.
            what: what to call the structure in messages.

        Raises:
            InvalidProblem: an unknown key, a list of another length, or a dict where a list should be.
        """
        return list(_aligned(self.skeleton, structure, default, what))

    def spread(self, structure: Any, default: float, *, what: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return numbers given for all entries, by leaf or by entry as one tensor that broadcasts to the flat vector.

        Args:
            structure: a number; a tensor shaped like the flat vector (`[d]` or `[m, d]`); or entries for each leaf as
                in `align`: numbers, sequences of numbers, arrays, or tensors that broadcast to the leaf's shape, or to
                it after a leading dimension m (one entry a block) where that fails.
            default: for leaves left out.
            what: what to call the structure in messages.
            dtype: of the result; the layout's by default.

        Returns:
            A tensor `[]`, `[d]` or `[m, d]` on the layout's device, differentiable in the tensors of `structure`.

        Raises:
            InvalidProblem: an entry is no number, has another shape or is on another device.
        """
        dtype = self.dtype if dtype is None else dtype
        if not _is_container(structure):
            whole = self._entry(structure, what, "all leaves", dtype)
            if whole.dim() == 0 or tuple(whole.shape) in {(self.size,), self.shape}:
                return whole
            if len(self.names) > 1:
                raise InvalidProblem(
                    f"{what}: expected a scalar, a flat tensor of shape {self.shape} or a structure with leaves "
                    f"{self.names}, got a tensor of shape {tuple(whole.shape)}."
                )
        entries = self.align(structure, default, what=what)
        leaves = [self._entry(entry, what, name, dtype) for name, entry in zip(self.names, entries, strict=True)]
        rows = [
            _expand(leaf, shape, self.blocks, what, name)
            for leaf, shape, name in zip(leaves, self.shapes, self.names, strict=True)
        ]
        by_block = any(row.dim() > len(shape) for row, shape in zip(rows, self.shapes, strict=True))
        lead = self.shape[:-1] if by_block else ()
        return self.concat([row.expand((*lead, *shape)) for row, shape in zip(rows, self.shapes, strict=True)])

    def _entry(self, value: Any, what: str, name: str, dtype: torch.dtype) -> Tensor:
        if not isinstance(value, Tensor):
            try:
                return torch.as_tensor(value, dtype=dtype, device=self.device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InvalidProblem(f"{what}: {value!r} for '{name}' is not a number or a tensor.") from error
        if value.device != self.device and value.dim() > 0:
            raise InvalidProblem(f"{what}: '{name}' is on {value.device}, the variables on {self.device}.")
        return value.to(dtype)

    def part(self, node: Variables) -> tuple[slice, Layout]:
        """Return where the leaves below a node of `skeleton` lie in the flat vector, and their own layout."""
        indices = [index for _, index in named_leaves(node)]
        first, last = indices[0], indices[-1] + 1
        start = sum(self.sizes[:first])
        own = replace(
            self,
            skeleton=rebuild(node, iter(range(len(indices)))),
            names=self.names[first:last],
            shapes=self.shapes[first:last],
        )
        return slice(start, start + own.size), own

    def name_of(self, index: int) -> str:
        """Name the leaf that holds flat index `index`, for messages."""
        for name, size in zip(self.names, self.sizes, strict=True):
            if index < size:
                return name
            index -= size
        raise IndexError(f"flat index {index} is past the end of a vector of length {self.size}")


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def _in_order(skeleton: Variables, variables: Variables) -> Iterator[Any]:
    if isinstance(skeleton, Mapping):
        if not isinstance(variables, Mapping) or skeleton.keys() != variables.keys():
            got = list(variables) if isinstance(variables, Mapping) else type(variables).__name__
            raise InvalidProblem(f"expected a dict with keys {list(skeleton)}, got {got}.")
        for key, child in skeleton.items():
            yield from _in_order(child, variables[key])
    elif _is_container(skeleton):
        if not _is_container(variables) or isinstance(variables, Mapping) or len(skeleton) != len(variables):
            raise InvalidProblem(f"expected a sequence of length {len(skeleton)}, got {_describe(variables)}.")
        for child, value in zip(skeleton, variables, strict=True):
            yield from _in_order(child, value)
    else:
        yield variables


def _aligned(skeleton: Variables, structure: Any, default: Any, what: str) -> Iterator[Any]:
    if not _is_container(skeleton):
        yield structure
    elif not _is_container(structure):
        for _ in named_leaves(skeleton):
            yield structure
    elif isinstance(skeleton, Mapping) and isinstance(structure, Mapping):
        unknown = [key for key in structure if key not in skeleton]
        if unknown:
            raise InvalidProblem(f"{what}: unknown keys {unknown}; the variables have {list(skeleton)}.")
        for key, child in skeleton.items():
            yield from _aligned(child, structure.get(key, default), default, what)
    elif isinstance(skeleton, Mapping) or isinstance(structure, Mapping) or len(skeleton) != len(structure):
        raise InvalidProblem(f"{what}: expected nesting like {_describe(skeleton)}, got {_describe(structure)}.")
    else:
        for child, value in zip(skeleton, structure, strict=True):
            yield from _aligned(child, value, default, what)


def _describe(structure: Any) -> str:
    if isinstance(structure, Mapping):
        return f"a dict with keys {list(structure)}"
    return f"a {type(structure).__name__}" + (f" of length {len(structure)}" if _is_container(structure) else "")


def _expand(entry: Tensor, shape: torch.Size, blocks: int | None, what: str, name: str) -> Tensor:
    """Return `entry` as `[*shape]` or `[m, *shape]`."""
    if _broadcasts(entry.shape, shape):
        return entry.expand(shape)
    if blocks is not None and entry.shape[0] == blocks and _broadcasts(entry.shape[1:], shape):
        missing = len(shape) - (entry.dim() - 1)
        return entry.reshape(blocks, *[1] * missing, *entry.shape[1:]).expand(blocks, *shape)
    raise InvalidProblem(
        f"{what}: shape {tuple(entry.shape)} given for leaf '{name}' does not broadcast to its shape {tuple(shape)}"
        + ("." if blocks is None else f", with or without the leading {blocks} blocks.")
    )


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    return len(shape) <= len(target) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(target), strict=False)
    )


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


def _check_agreement(name: str, pairs: Sequence[tuple[str, Tensor]]) -> None:
    first_name, first = pairs[0]
    for leaf_name, leaf in pairs:
        if leaf.dtype != first.dtype:
            raise InvalidProblem(
                f"{name}: '{first_name}' is {first.dtype} but '{leaf_name}' is {leaf.dtype}; "
                "use one dtype for all leaves."
            )
        if leaf.device != first.device:
            raise InvalidProblem(
                f"{name}: '{first_name}' is on {first.device} but '{leaf_name}' on {leaf.device}; use one device."
            )
    _check_memory(name, [(leaf_name, leaf) for leaf_name, leaf in pairs if leaf.numel() > 0])


def _check_memory(name: str, pairs: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse leaves that share an entry with themselves or another leaf; interleaved views share none."""
    spans = sorted((leaf.data_ptr(), leaf.data_ptr() + _extent(leaf), i) for i, (_, leaf) in enumerate(pairs))
    cluster: list[int] = []
    base = end = 0
    for start, stop, index in spans:
        if start >= end:
            _check_cluster(name, [pairs[i] for i in cluster], base, end)
            cluster, base, end = [], start, stop
        cluster.append(index)
        end = max(end, stop)
    _check_cluster(name, [pairs[i] for i in cluster], base, end)


def _check_cluster(name: str, pairs: Sequence[tuple[str, Tensor]], base: int, end: int) -> None:
    """Mark the bytes of leaves whose memory ranges meet, one leaf after the other."""
    if len(pairs) < 2 and all(leaf.is_contiguous() for _, leaf in pairs):
        return
    owner = torch.full((end - base,), -1, dtype=torch.int32)
    for index, (leaf_name, leaf) in enumerate(pairs):
        size = leaf.element_size()
        strides = [stride * size for stride in leaf.stride()]
        cells = owner.as_strided((*leaf.shape, size), (*strides, 1), leaf.data_ptr() - base)
        taken = int(cells.max())
        if taken >= 0:
            raise InvalidProblem(
                f"{name}: leaves '{pairs[taken][0]}' and '{leaf_name}' overlap in memory; clone one, or pass it once."
            )
        cells.fill_(index)
        if int((owner == index).sum()) < leaf.numel() * size:
            raise InvalidProblem(
                f"{name}: leaf '{leaf_name}' shares memory between its entries (an overlapping view); "
                f"pass {leaf_name}.clone()."
            )


def _extent(leaf: Tensor) -> int:
    last = sum((length - 1) * stride for length, stride in zip(leaf.shape, leaf.stride(), strict=True))
    return (last + 1) * leaf.element_size()
