"""Data held in memory: all of it at each step, or in random parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Generator, Tensor

from bilevel.data._base import Data, DataSource, Device, check_not_empty, checked, moved
from bilevel.data._seeding import mixed
from bilevel.layout import named_leaves, rebuild
from bilevel.status import DataExhausted, InvalidProblem


@final
@dataclass(frozen=True, eq=False)
class Full(DataSource):
    """Give all the data at every step, without a copy.

    Args:
        data: tensors or numpy arrays, bare or nested in dicts, lists and tuples; other objects pass unchanged. Arrays
            become tensors that share their memory and dtype where that is possible.

    Raises:
        DataExhausted: a tensor has no entries.
        InvalidProblem: an array has a dtype that tensors lack.

    Example:
        >>> X, t = torch.ones(5, 2), torch.zeros(5)
        >>> Full((X, t)).batch(step=7, seed=0)[0] is X
        True
    """

    data: Data

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", _tensors(self.data))
        check_not_empty(self.data)

    @property
    def deterministic(self) -> bool:
        """Whether all steps give the same batch: yes."""
        return True

    def batch(self, step: int, seed: int) -> Any:
        """Return the data."""
        return self.data

    def to(self, device: Device) -> Full:
        """Return a source of the data on a device."""
        return Full(moved(self.data, device))


@final
@dataclass(frozen=True, eq=False)
class Shuffled(DataSource):
    """Give the examples of each epoch in a new random order, `batch_size` at a time.

    The order of epoch `step // batches_per_epoch` is a permutation drawn on the data's device from a generator seeded
    by (seed, epoch). Devices draw different permutations.

    Args:
        data: tensors or numpy arrays with the same number n of examples, bare or nested in dicts, lists and tuples.
        batch_size: 1 to n.
        drop_last: leave out the last, smaller batch of an epoch.
        axis: the axis of the examples; 1 if the data have a leading block dimension (blocks share the indices).
        with_index: append the indices of the examples `[batch_size]`, for weights by example: to a tuple or a list as
            the last item, to a bare tensor as `(batch, index)`, to a dict as `"index"`.

    Raises:
        DataExhausted: there are no examples.
        InvalidProblem: numbers of examples or devices differ, or the batch size does not fit.

    Example:
        >>> source = Shuffled((torch.arange(6), torch.arange(6)), batch_size=2, with_index=True)
        >>> digits, same, index = source.batch(step=0, seed=0)
        >>> bool((digits == index).all()), len(source)
        (True, 3)
    """

    data: Data
    batch_size: int
    drop_last: bool = True
    axis: int = 0
    with_index: bool = False
    size: int = field(init=False)
    _order: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", _tensors(self.data))
        object.__setattr__(self, "size", _count(self.data, self.axis))
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InvalidProblem(f"Shuffled(batch_size=...) must be a positive int, got {self.batch_size!r}.")
        if self.batch_size > self.size:
            raise InvalidProblem(
                f"batch_size={self.batch_size} exceeds the {self.size} examples; lower it, or use Full."
            )
        if self.with_index and isinstance(self.data, Mapping) and "index" in self.data:
            raise InvalidProblem("with_index=True adds the key 'index', which the data already have; rename it.")

    @property
    def deterministic(self) -> bool:
        """Whether all steps give the same batch: no."""
        return False

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def batch(self, step: int, seed: int) -> Any:
        """Return copies of the examples of a step."""
        epoch, position = divmod(checked(step), len(self))
        start = position * self.batch_size
        index = self._permutation(seed, epoch)[start : start + self.batch_size]
        chosen = rebuild(self.data, (leaf.index_select(self.axis, index) for _, leaf in named_leaves(self.data)))
        if not self.with_index:
            return chosen
        # A slice of the kept permutation: clone, so that a loss that edits it changes no later batch.
        return _appended(chosen, index.clone())

    def to(self, device: Device) -> Shuffled:
        """Return a source of the data on a device; the orders differ from one kind of device to another."""
        return Shuffled(moved(self.data, device), self.batch_size, self.drop_last, self.axis, self.with_index)

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        found = self._order.get((seed, epoch))
        if found is None:
            device = next(leaf.device for _, leaf in named_leaves(self.data))
            generator = Generator(device).manual_seed(mixed("order", seed, epoch))
            found = torch.randperm(self.size, generator=generator, device=device)
            self._order.clear()
            self._order[seed, epoch] = found
        return found


def _count(data: Data, axis: int) -> int:
    """Return the number of examples along an axis of all leaves."""
    leaves = [(name or "data", leaf) for name, leaf in named_leaves(data)]
    for name, leaf in leaves:
        if not isinstance(leaf, Tensor) or not -leaf.dim() <= axis < leaf.dim():
            shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise InvalidProblem(f"Shuffled: '{name}' has no axis {axis} to draw examples from: {shape}.")
    lengths = {name: leaf.shape[axis] for name, leaf in leaves}
    if not lengths:
        raise DataExhausted("empty batch: the data hold no tensor.")
    if len(set(lengths.values())) > 1:
        raise InvalidProblem(f"Shuffled: numbers of examples along axis {axis} differ: {lengths}.")
    if len({leaf.device for _, leaf in leaves}) > 1:
        raise InvalidProblem(f"Shuffled: devices differ: { {name: str(leaf.device) for name, leaf in leaves} }.")
    check_not_empty(data)
    return int(lengths.popitem()[1])


def _tensors(data: Data) -> Data:
    return rebuild(data, (_tensor(name or "data", leaf) for name, leaf in named_leaves(data)))


def _tensor(name: str, leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray):
        return leaf
    shareable = leaf.flags.writeable and all(stride >= 0 for stride in leaf.strides)
    try:
        return torch.from_numpy(leaf if shareable else leaf.copy())
    except TypeError as error:
        raise InvalidProblem(f"'{name}' is an array of dtype {leaf.dtype}, which tensors lack; convert it.") from error


def _appended(batch: Data, index: Tensor) -> Data:
    if isinstance(batch, Mapping):
        return {**batch, "index": index}
    if isinstance(batch, list):
        return [*batch, index]
    return (*batch, index) if isinstance(batch, tuple) else (batch, index)
