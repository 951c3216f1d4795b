"""What a data source is: a pure function of the step and the seed, so any step can be replayed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import torch
from torch import Tensor

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

    @property
    def held(self) -> int | None:
        """For how many steps each batch is given, where it states a lower problem of its own (tasks); None elsewhere.

        Solvers that go on from the last y would carry one task's answer into the next, and refuse such a source. Both
        levels of a problem see the same seed of it, so that they see the same tasks.
        """
        return None

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


def batch_after(source: DataSource | None, first: int, steps: int) -> int:
    """Return which batch some steps lead to: the next one, or still their own where each batch states tasks."""
    return first + steps - (1 if steps and source is not None and source.held else 0)


def checked(step: int) -> int:
    """Return the step, or refuse a negative one."""
    if step < 0:
        raise InvalidProblem(f"step must be >= 0, got {step}.")
    return step


def moved(data: Data, device: Device) -> Data:
    """Return the data with all tensors on a device."""
    leaves = (leaf for _, leaf in named_leaves(data))
    return rebuild(data, (leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves))


def check_not_empty(data: Data) -> None:
    """Refuse tensors without entries: means over them are not numbers."""
    for name, leaf in named_leaves(data):
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            raise DataExhausted(f"empty batch: '{name or 'data'}' has shape {tuple(leaf.shape)}.")
