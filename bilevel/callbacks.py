"""What may watch a solve, and stop it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bilevel.layout import Variables, named_leaves, rebuild
from bilevel.status import InvalidProblem


@dataclass(frozen=True)
class Event:
    """What a callback sees after each step.

    Args:
        step: steps made.
        x: upper variables after the step, structured like x0; views that must not be changed.
        y: lower variables, likewise.
        row: the newest row of the history.
        state: the solver's state.
    """

    step: int
    x: Variables
    y: Variables
    row: dict[str, Any]
    state: Any


Callback: TypeAlias = Callable[[Event], bool | None]
"""Called after each step; a true answer stops the solve."""


class EarlyStopping:
    """Stop when a monitored number has not improved for `patience` steps.

    Args:
        patience: steps to wait, > 0.
        monitor: event -> number, smaller is better; the upper value by default. Use a split of its own here, never the
            test data.
        min_delta: an improvement must be larger than this, >= 0.

    Example:
        >>> stop = EarlyStopping(patience=2, monitor=lambda event: event.row["upper_value"])
        >>> [stop(Event(i, None, None, {"upper_value": 1.0}, None)) for i in range(3)]
        [False, False, True]
    """

    def __init__(self, patience: int, monitor: Callable[[Event], float] | None = None, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise InvalidProblem(f"EarlyStopping needs patience >= 1 and min_delta >= 0, got {patience}, {min_delta}.")
        self.patience, self.min_delta = patience, min_delta
        self.monitor = monitor or (lambda event: float(event.row["upper_value"]))
        self.best, self.waited = float("inf"), 0

    def __call__(self, event: Event) -> bool:
        """Return whether to stop."""
        value = self.monitor(event)
        if value < self.best - self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience


class KeepBest:
    """Keep the x, and the y found at it, that do best on a number of your own: the loss on data held back for that.

    It is for solvers that find y at x and then move x, as those that train or solve anew at every step do: the y of an
    event belongs to the x before its step. The last x is not seen.

    Args:
        x0: where the solve starts.
        monitor: (x, y) -> number, smaller is better. Use data that neither objective sees, never the test data.

    Attributes:
        x, y, value: the best so far; y is None and the value infinite before the first step.
        step: the number of steps that led to x.
        values: of all x seen, in order.

    Example:
        >>> import torch
        >>> keep = KeepBest(torch.tensor(0.0), lambda x, y: abs(float(y) - 2))
        >>> for i in (1, 2, 3):
        ...     _ = keep(Event(i, torch.tensor(float(i)), torch.tensor(float(i)), {}, None))
        >>> float(keep.x), float(keep.y), keep.step, keep.values
        (1.0, 2.0, 1, [1.0, 0.0, 1.0])
    """

    def __init__(self, x0: Variables, monitor: Callable[[Variables, Variables], float]) -> None:
        self.x, self.y, self.value, self.step = x0, None, float("inf"), 0
        self.monitor, self.values = monitor, list[float]()
        self._before = _copied(x0)

    def __call__(self, event: Event) -> None:
        """Look at the pair that this step was about."""
        found = self.monitor(self._before, event.y)
        self.values.append(found)
        if found < self.value:
            self.x, self.y, self.value, self.step = self._before, _copied(event.y), found, event.step - 1
        self._before = _copied(event.x)


def _copied(variables: Variables) -> Variables:
    return rebuild(variables, iter([leaf.detach().clone() for _, leaf in named_leaves(variables)]))


class CSVLogger:
    """Append each row of the history to a CSV file as it comes: one short write a step.

    A solve that starts over (its steps are not after the last one's) starts the file over.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._last_step: int | None = None

    def __call__(self, event: Event) -> None:
        """Write the newest row."""
        goes_on = self._last_step is not None and event.step > self._last_step
        with self.path.open("a" if goes_on else "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(event.row))
            if not goes_on:
                writer.writeheader()
            writer.writerow(event.row)
        self._last_step = event.step
