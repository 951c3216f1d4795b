"""Batches of a loader, made repeatable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, final

from torch import Generator
from torch.utils.data import DataLoader

from bilevel.data._base import DataSource, Device, check_not_empty, checked, moved
from bilevel.data._seeding import mixed, seeded
from bilevel.status import DataExhausted, InvalidProblem


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
        >>> import torch
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
        epoch, position = self._locate(checked(step), seed)
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
        check_not_empty(batch)
        cursor.batch = batch if self.device is None else moved(batch, self.device)
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
