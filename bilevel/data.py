"""Where batches come from: a source is a pure function of the step and the seed, so any step can be replayed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from bilevel._seeding import mixed, seeded
from bilevel.layout import named_leaves, rebuild
from bilevel.status import DataExhausted, InvalidProblem

Data: TypeAlias = Any
"""A Tensor, or nested dicts, lists and tuples of Tensors."""

Device: TypeAlias = str | int | torch.device


class DataSource(ABC):
    """Gives the batch of each step. Implementations are pure: the same (step, seed) gives the same batch, in any order.

    Nothing a source does changes the global random state or the user's data.
    """

    @property
    @abstractmethod
    def deterministic(self) -> bool:
        """Whether all steps and seeds give the same batch."""

    @abstractmethod
    def batch(self, step: int, seed: int) -> Any:
        """Return the batch of a step.

        Args:
            step: >= 0.
            seed: any integer; it names one of many orders of the data.

        Raises:
            DataExhausted: there is no such batch.
        """

    def to(self, device: Device) -> DataSource:
        """Return this source with its batches on a device.

        Raises:
            InvalidProblem: the source cannot be moved.
        """
        raise InvalidProblem(f"{type(self).__name__} cannot be moved to {device}; override to(), or move its data.")


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
        _check_not_empty(self.data)

    @property
    def deterministic(self) -> bool:
        """Whether all steps give the same batch: yes."""
        return True

    def batch(self, step: int, seed: int) -> Any:
        """Return the data."""
        return self.data

    def to(self, device: Device) -> Full:
        """Return a source of the data on a device."""
        return Full(_moved(self.data, device))


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
        epoch, position = divmod(_checked(step), len(self))
        start = position * self.batch_size
        index = self._permutation(seed, epoch)[start : start + self.batch_size]
        chosen = rebuild(self.data, (leaf.index_select(self.axis, index) for _, leaf in named_leaves(self.data)))
        if not self.with_index:
            return chosen
        # A slice of the kept permutation: clone, so that a loss that edits it changes no later batch.
        return _appended(chosen, index.clone())

    def to(self, device: Device) -> Shuffled:
        """Return a source of the data on a device; the orders differ from one kind of device to another."""
        return Shuffled(_moved(self.data, device), self.batch_size, self.drop_last, self.axis, self.with_index)

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        found = self._order.get((seed, epoch))
        if found is None:
            device = next(leaf.device for _, leaf in named_leaves(self.data))
            generator = Generator(device).manual_seed(mixed("order", seed, epoch))
            found = torch.randperm(self.size, generator=generator, device=device)
            self._order.clear()
            self._order[seed, epoch] = found
        return found


@dataclass
class _Cursor:
    """Where a `Loader` stands: its running iterator, the batch it handed out last, and where epochs started."""

    place: tuple[int, int] | None = None
    position: int = -1
    iterator: Iterator[Any] | None = None
    held: tuple[int, int, int] | None = None
    batch: Any = None
    starts: dict[int, list[int]] = field(default_factory=dict)


@final
@dataclass(frozen=True, eq=False)
class Loader(DataSource):
    """Give the batches of a torch `DataLoader`, or of anything that can be iterated again and again.

    Each epoch's `iter()` and each `next()` runs in a random state (torch's CPU generator, `random`, numpy, and
    generators that the loader or its samplers hold) seeded by (seed, epoch, position) and put back afterwards. So a
    batch depends on (step, seed) alone, shuffling and augmentation in the main process included; those of workers too,
    as torch seeds workers at `iter()`.

    Args:
        loader: a re-iterable of batches. If it has a length, that is the number of batches it gives in an epoch.
        device: where to put the tensors of each batch; left alone if None.

    Raises:
        DataExhausted: the loader is empty.
        InvalidProblem: it can be iterated only once, or its workers keep random states between epochs.

    Cost:
        The next step takes one batch. Any other replays the loader from the start of the step's epoch, and from the
        last epoch seen if the loader has no length.

    Notes:
        A data set with a random state of its own, or with random operations on another device, is not made repeatable.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(4)), batch_size=2, shuffle=True)
        >>> source = Loader(loader)
        >>> first, third = source.batch(0, seed=0), source.batch(2, seed=0)
        >>> bool((source.batch(0, seed=0)[0] == first[0]).all())
        True
    """

    loader: Iterable[Any]
    device: Device | None = None
    _cursor: _Cursor = field(default_factory=_Cursor, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.loader, Iterator) or not isinstance(self.loader, Iterable):
            raise InvalidProblem(
                f"Loader needs batches it can iterate again, but a {type(self.loader).__name__} gives them once or not "
                "at all; pass a DataLoader, a list of batches, or an object whose __iter__ starts anew."
            )
        match self.loader:
            case DataLoader(num_workers=workers, persistent_workers=persistent, in_order=in_order):
                replayable = workers == 0 or (in_order and not persistent)
            case _:
                replayable = True
        if not replayable:
            raise InvalidProblem(
                "persistent workers keep their random state between epochs, and in_order=False has no fixed order, "
                "so that no batch can be replayed; use DataLoader(persistent_workers=False, in_order=True)."
            )
        if self._length() == 0:
            raise DataExhausted("loader has length 0: no data, or drop_last=True and fewer examples than batch_size.")

    @property
    def deterministic(self) -> bool:
        """Whether all steps give the same batch: not known, so no."""
        return False

    def batch(self, step: int, seed: int) -> Any:
        """Return the batch of a step; the same object again if asked for the same step twice in a row."""
        epoch, position = self._locate(_checked(step), seed)
        if self._cursor.held != (seed, epoch, position):
            self._seek(seed, epoch, position)
        return self._cursor.batch

    def to(self, device: Device) -> Loader:
        """Return a source that puts its batches on a device."""
        return Loader(self.loader, device)

    def __reduce__(self) -> tuple[type[Loader], tuple[Any, ...]]:
        """Copy and pickle without the running iterator."""
        return Loader, (self.loader, self.device)

    def _length(self) -> int | None:
        if not isinstance(self.loader, Sized):
            return None
        try:
            return len(self.loader)
        except TypeError:  # a DataLoader over a data set without a length
            return None

    def _locate(self, step: int, seed: int) -> tuple[int, int]:
        length = self._length()
        if length is not None:
            return divmod(step, length)
        starts = self._cursor.starts.setdefault(seed, [0])
        while True:
            epoch = max(index for index, start in enumerate(starts) if start <= step)
            position = step - starts[epoch]
            if epoch + 1 < len(starts):
                return epoch, position
            given = self._seek(seed, epoch, position)
            if given > position:
                return epoch, position
            starts.append(starts[epoch] + given)

    def _seek(self, seed: int, epoch: int, position: int) -> int:
        """Move to a batch, and return how many batches of its epoch were given so far.

        Raises:
            DataExhausted: the epoch is empty, or shorter than the loader's length.
        """
        cursor = self._cursor
        if cursor.held == (seed, epoch, position):
            return position + 1
        if cursor.iterator is None or cursor.place != (seed, epoch) or cursor.position >= position:
            self._start(seed, epoch)
        batch = None
        while cursor.position < position:
            try:
                batch = self._next(seed, epoch)
            except StopIteration:
                cursor.iterator = None
                return self._ended(cursor.position + 1, epoch)
            except BaseException:
                cursor.iterator = None  # it may be broken, and must not look exhausted next time
                raise
            cursor.position += 1
        _check_not_empty(batch)
        cursor.batch = batch if self.device is None else _moved(batch, self.device)
        cursor.held = (seed, epoch, position)
        return position + 1

    def _start(self, seed: int, epoch: int) -> None:
        cursor = self._cursor
        cursor.iterator = None  # ends a loader's workers before the next ones start
        with seeded(mixed("iter", seed, epoch), _generators(self.loader)):
            cursor.iterator = iter(self.loader)
        cursor.place, cursor.position = (seed, epoch), -1

    def _next(self, seed: int, epoch: int) -> Any:
        assert self._cursor.iterator is not None
        with seeded(mixed("next", seed, epoch, self._cursor.position + 1), _generators(self.loader)):
            return next(self._cursor.iterator)

    def _ended(self, given: int, epoch: int) -> int:
        length = self._length()
        if given == 0 and epoch > 0:
            raise DataExhausted(f"the loader gave nothing in epoch {epoch}: its __iter__ must start anew each time.")
        if given == 0:
            raise DataExhausted("the loader gave no batch at all.")
        if length is not None:
            raise DataExhausted(f"the loader has length {length} but gave {given} batches in epoch {epoch}.")
        return given


def _generators(loader: Any) -> list[Generator]:
    """Return the generators that a DataLoader and its samplers hold."""
    if not isinstance(loader, DataLoader):
        return []
    holders = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, Generator)}.values())


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
    _check_not_empty(data)
    return int(lengths.popitem()[1])


def _checked(step: int) -> int:
    if step < 0:
        raise InvalidProblem(f"step must be >= 0, got {step}.")
    return step


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


def _moved(data: Data, device: Device) -> Data:
    leaves = (leaf for _, leaf in named_leaves(data))
    return rebuild(data, (leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves))


def _appended(batch: Data, index: Tensor) -> Data:
    if isinstance(batch, Mapping):
        return {**batch, "index": index}
    if isinstance(batch, list):
        return [*batch, index]
    return (*batch, index) if isinstance(batch, tuple) else (batch, index)


def _check_not_empty(data: Data) -> None:
    for name, leaf in named_leaves(data):
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            raise DataExhausted(f"empty batch: '{name or 'data'}' has shape {tuple(leaf.shape)}.")
