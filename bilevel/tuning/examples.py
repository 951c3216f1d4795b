"""Examples in the forms that users have them: arrays, frames, tensors, data sets, loaders; checked before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bilevel.data import DataSource, Full, Loader, Shuffled
from bilevel.data._seeding import seeded
from bilevel.status import DataExhausted, InvalidProblem, NonFinite


class Held(NamedTuple):
    """Examples to judge on, all in memory: inputs `[n, *]` and targets `[n]` or `[n, *]`."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Training:
    """Examples to train on.

    Args:
        source: of batches `(inputs, targets, index)`, or `(inputs, targets)` where nothing asks for the index.
        count: n.
        first: some of the examples, to try things out on.
        labels: least and largest of all targets, where they are integers; else None.
    """

    source: DataSource
    count: int
    first: Held
    labels: tuple[int, int] | None


def training(data: Any, like: Tensor, batch_size: int | None, *, indexed: bool) -> Training:
    """Return training examples as a source of batches.

    Args:
        data: `(inputs, targets)` of tensors, NumPy arrays or pandas frames; a Dataset of such pairs; or a DataLoader,
            or another re-iterable of batches.
        like: a parameter of the model: floating-point inputs get its dtype; arrays, and the batches of data sets and
            loaders, its device.
        batch_size: of random batches; None: everything at once, or the loader's own batches.
        indexed: whether batches must carry the indices of their examples.

    Raises:
        InvalidProblem: the data have another form or size, or an option does not fit it.
        DataExhausted: there are no examples.
        NonFinite: an input or a target is NaN or infinite.
    """
    if _is_pair(data) or isinstance(data, TensorDataset):
        held = held_out(data, like, "train")
        source: DataSource = Full((*held, torch.arange(len(held.targets), device=like.device)) if indexed else held)
        if batch_size is not None:
            _check_batch_size(batch_size, len(held.targets))
            source = Shuffled(tuple(held), batch_size=batch_size, with_index=indexed)
        return Training(source, len(held.targets), held, labels_of(held.targets))
    if isinstance(data, Dataset):
        if batch_size is None:
            raise InvalidProblem("train is a Dataset: say batch_size=..., or pass a DataLoader or a pair of tensors.")
        _check_batch_size(batch_size, len(data))  # type: ignore[arg-type]
        loader: Any = DataLoader(_Indexed(data) if indexed else data, batch_size=batch_size, shuffle=True)
    else:
        loader = data
        if indexed:
            raise InvalidProblem("data_weight needs to know which example is which: pass train as a pair of tensors "
                                 "or as a Dataset, not as a loader.")  # fmt: skip
        if batch_size is not None:
            raise InvalidProblem("batch_size is that of the loader; leave it out, or pass a Dataset.")
    source = Loader(loader, like.device)  # refuses what can be iterated only once
    count, first, seen = 0, None, []
    for batch in _epoch(loader, "train"):
        held = _checked(_moved(batch[:2] if indexed else batch, like), like, "train", count)
        count += len(held.targets)
        first = held if first is None else first
        seen.append(held.targets if held.targets.is_floating_point() else torch.stack(held.targets.aminmax()))
    if first is None:
        raise _empty("train")
    source.batch(0, 0)  # a loader that the look above has used up says so here
    return Training(source, count, first, labels_of(torch.cat(seen)))


def held_out(data: Any, like: Tensor, name: str) -> Held:
    """Return examples to judge on as two tensors; a Dataset or a loader is read once, and put in memory.

    Raises:
        InvalidProblem: the data have another form or size.
        DataExhausted: there are no examples.
        NonFinite: an input or a target is NaN or infinite.
    """
    if isinstance(data, TensorDataset):
        data = data.tensors
    if _is_pair(data):
        return _checked(data, like, name, 0)
    loader = DataLoader(data, batch_size=256) if isinstance(data, Dataset) else data
    parts: list[Held] = []
    for batch in _epoch(loader, name):
        parts.append(_checked(_moved(batch, like), like, name, sum(len(part.targets) for part in parts)))
    if not parts:
        raise _empty(name)
    return Held(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))


def converted(batch: Any, like: Tensor) -> Held:
    """Return the inputs and targets of a batch as tensors, floating-point ones in the dtype of `like`."""
    return Held(_tensor(batch[0], like), _tensor(batch[1], like))


def _is_pair(data: Any) -> bool:
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    # A list of two batches is a loader; two arrays, or lists of numbers, are a pair.
    return not any(isinstance(part, tuple | list) and part and not isinstance(part[0], int | float) for part in data)


def _epoch(loader: Any, name: str) -> Iterator[Any]:
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable) or isinstance(loader, str | dict | Tensor):
        hint = " It can be iterated only once." if isinstance(loader, Iterator) else ""
        raise InvalidProblem(
            f"{name} must be a pair (inputs, targets), a Dataset of pairs or a DataLoader, got "
            f"{type(loader).__name__}.{hint}"
        )
    with seeded(0):  # what shuffling and augmentation draw is not the user's
        yield from loader


def _checked(batch: Any, like: Tensor, name: str, first: int) -> Held:
    """Return a batch as tensors, or say what is wrong with it."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise InvalidProblem(f"{name} must give pairs (inputs, targets), got {got}.")
    held = Held(*(_readable(part, like, f"{name} {what}") for part, what in zip(batch, Held._fields, strict=True)))
    if any(part.device != like.device for part in held):
        devices = " and ".join(str(part.device) for part in held)
        raise InvalidProblem(f"{name} is on {devices}, the model on {like.device}; move one of them with .to(...).")
    if any(part.dim() == 0 for part in held) or len(held.inputs) != len(held.targets):
        shapes = [tuple(part.shape) for part in held]
        raise InvalidProblem(f"{name}: inputs {shapes[0]} and targets {shapes[1]} must have one row an example.")
    if held.inputs.numel() == 0:
        raise _empty(name)
    for part, what in zip(held, Held._fields, strict=True):
        bad = ~part.isfinite().flatten(1).all(1) if part.dim() > 1 else ~part.isfinite()
        if bool(bad.any()):
            where = first + int(bad.nonzero()[0])
            raise NonFinite(f"{name}: {int(bad.sum())} rows of the {what} hold NaN or infinite numbers, the first is "
                            f"row {where}; fill them in or drop them.")  # fmt: skip
    return held


def _readable(part: Any, like: Tensor, what: str) -> Tensor:
    try:
        return _tensor(part, like)
    except (TypeError, ValueError) as error:
        raise InvalidProblem(f"{what}: not numbers ({error}); encode texts and categories as numbers.") from error


def _tensor(part: Any, like: Tensor) -> Tensor:
    if not isinstance(part, Tensor):
        array = np.asarray(part)
        # A copy: frames hand out views that may not be written to. Their columns may have several types.
        part = torch.as_tensor(np.array(array, np.float64 if array.dtype == object else None), device=like.device)
    made: Tensor = part
    if made.is_floating_point():
        return made.to(like.dtype)
    return made.long() if not made.is_complex() else made


def labels_of(*targets: Tensor) -> tuple[int, int] | None:
    """Return the least and the largest label, None if targets are no integers."""
    if any(part.is_floating_point() for part in targets):
        return None
    return min(int(part.min()) for part in targets), max(int(part.max()) for part in targets)


def _moved(batch: Any, like: Tensor) -> Any:
    """Return a batch of a loader with its tensors on the model's device."""
    if not isinstance(batch, tuple | list):
        return batch
    return [part.to(like.device) if isinstance(part, Tensor) else part for part in batch]


def _check_batch_size(batch_size: int, count: int) -> None:
    if count == 0:
        raise _empty("train")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= count:
        raise InvalidProblem(f"batch_size must be an int from 1 to the {count} training examples, got {batch_size!r}.")


def _empty(name: str) -> DataExhausted:
    return DataExhausted(f"{name} has no examples: it is empty, or was used up before.")


class _Indexed(Dataset[tuple[Any, Any, int]]):
    """A data set whose items carry their index."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        inputs, target = self.data[index]
        return inputs, target, index
