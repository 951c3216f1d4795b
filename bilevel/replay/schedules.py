"""Checkpoint schedules: which states to store and which steps to repeat, so that steps can be visited backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import comb, isqrt
from typing import NamedTuple, TypeAlias, final

from bilevel.status import InvalidProblem


class Advance(NamedTuple):
    """Run on from the stored state `start`, storing the state at each of `stops` (ascending)."""

    start: int
    stops: tuple[int, ...]


class Reverse(NamedTuple):
    """Run on from the stored state `source` to `start`, then visit steps `stop - 1` down to `start`."""

    source: int
    start: int
    stop: int


class Drop(NamedTuple):
    """Forget the stored state `step`."""

    step: int


Action: TypeAlias = Advance | Reverse | Drop


class Schedule(ABC):
    """Says how to visit steps T-1 down to 0, given that the state before step 0 is stored."""

    @abstractmethod
    def actions(self, steps: int) -> Iterator[Action]:
        """Yield what to do, in order; every step is visited once, and every state is dropped in the end."""

    @abstractmethod
    def peak(self, steps: int) -> int:
        """Return the largest number of states held at once, the first one included (a bound for `KAry`)."""

    @abstractmethod
    def advances(self, steps: int) -> int:
        """Return how many steps are run without being visited, the first pass included (a bound for `KAry`)."""

    def fitted(self, steps: int, state_bytes: int) -> Schedule:
        """Return the schedule for states of this size; schedules with a budget in bytes count it in states here.

        Raises:
            InvalidProblem: not even one state fits the budget.
        """
        return self


@final
@dataclass(frozen=True)
class StoreAll(Schedule):
    """Hold everything: the most memory and the least time.

    Args:
        graphs: hold the derivative of each step (its graph) as it is run, so that no step is run twice; if not, hold
            its state only, and differentiate each step when it is visited.

    Cost:
        T states and, with `graphs`, T graphs. T steps with their derivatives, and without `graphs` T - 1 plain ones.

    Example:
        >>> StoreAll().peak(100), StoreAll().advances(100)
        (100, 0)
    """

    graphs: bool = True

    def actions(self, steps: int) -> Iterator[Action]:
        """Yield one pass forward and one backward."""
        yield from _segment(0, steps, graphs=self.graphs)

    def peak(self, steps: int) -> int:
        """Return T."""
        return steps

    def advances(self, steps: int) -> int:
        """Return 0 with graphs, else T - 1."""
        return 0 if self.graphs else steps - 1


@final
@dataclass(frozen=True)
class Sqrt(Schedule):
    """Store the states between about sqrt(T) segments; run each segment once more when its turn comes.

    With `k = isqrt(T)` segments, the longest of `L = ceil(T / k)` steps, at most `k + L - 1 <= 2 sqrt(T)` states are
    held.

    Args:
        graphs: while a segment is visited, hold the graphs of its steps, at most L. If not, hold their states and
            differentiate step by step: for steps whose graph is much larger than a state.

    Cost:
        T steps with their derivatives; T - L plain ones with `graphs`, else 2 T - L - k.

    References:
        Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost", 2016, arXiv 1604.06174, section 4.

    Example:
        >>> Sqrt().peak(10_000), Sqrt().advances(10_000)
        (199, 9900)
    """

    graphs: bool = True

    def actions(self, steps: int) -> Iterator[Action]:
        """Yield a first pass that stores boundaries, then the segments from the last to the first."""
        bounds = self._bounds(steps)
        if len(bounds) > 2:
            yield Advance(0, tuple(bounds[1:-1]))
        for start, stop in zip(bounds[-2::-1], bounds[:0:-1], strict=True):
            yield from _segment(start, stop, graphs=self.graphs)

    def peak(self, steps: int) -> int:
        """Return k + L - 1."""
        k = isqrt(steps)
        return k - (-steps // k) - 1

    def advances(self, steps: int) -> int:
        """Return T - L with graphs, else 2 T - L - k, with the length L of the last segment."""
        bounds = self._bounds(steps)
        return bounds[-2] if self.graphs else bounds[-2] + steps - (len(bounds) - 1)

    @staticmethod
    def _bounds(steps: int) -> list[int]:
        k = isqrt(steps)
        return [i * steps // k for i in range(k + 1)]


@final
@dataclass(frozen=True)
class KAry(Schedule):
    """Split the steps into k parts, run to each boundary, and treat the parts from right to left in the same way.

    With `h = ceil(log_k T)` levels it holds at most `1 + (k - 1) h` states and runs at most `h (k - 1) / k T` plain
    steps; both are attained at T = k^h. The tree is expanded where the visit has arrived, nowhere else.

    Args:
        k: parts, at least 2.

    Raises:
        InvalidProblem: k is no int of at least 2.

    Cost:
        T steps with their derivatives, and the plain steps above. `Binomial` with as many states runs fewer.

    References:
        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML training with metagradient descent", 2025, arXiv
        2503.13751 (REPLAY).

    Example:
        >>> KAry(2).peak(1024), KAry(2).advances(1024)
        (11, 5120)
    """

    k: int = 2

    def __post_init__(self) -> None:
        _check("KAry(k=...)", self.k, 2)

    def actions(self, steps: int) -> Iterator[Action]:
        """Yield the tree from right to left."""
        stack = [(0, steps)]
        while stack:
            start, stop = stack.pop()
            length = stop - start
            if length == 1:
                yield from _segment(start, stop, graphs=True)
                continue
            parts = min(self.k, length)
            bounds = [start + i * length // parts for i in range(parts + 1)]
            yield Advance(start, tuple(bounds[1:-1]))
            stack += pairwise(bounds)

    def peak(self, steps: int) -> int:
        """Return 1 + (k - 1) h, or T where that is less."""
        return min(steps, 1 + (self.k - 1) * self._levels(steps))

    def advances(self, steps: int) -> int:
        """Return h (k - 1) / k T, rounded down; T - 1 where k >= T."""
        return steps - 1 if self.k >= steps else self._levels(steps) * (self.k - 1) * steps // self.k

    def _levels(self, steps: int) -> int:
        levels, reach = 0, 1
        while reach < steps:
            levels, reach = levels + 1, reach * self.k
        return levels


@final
@dataclass(frozen=True)
class Binomial(Schedule):
    """Hold at most so many states, and run the fewest steps that this allows.

    With c states and `r` the least integer with `C(c + r, c) >= T`, exactly `r T - C(c + r, c + 1)` plain steps are
    run; each split is chosen in closed form. From c = T on it is one pass.

    Args:
        snapshots: c >= 1, the states that may be held, the first one included.
        memory: or the bytes that they may take.

    Raises:
        InvalidProblem: neither or both are given, or one is no int of at least 1.

    Cost:
        T steps with their derivatives, and the plain steps above: at most 2 T of them from c = 89 on for T = 4096.

    References:
        Griewank, Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26, 2000.

    Example:
        >>> Binomial(11).advances(1024)  # KAry(2) holds as many and runs 5120
        3641
    """

    snapshots: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if (self.snapshots is None) == (self.memory is None):
            raise InvalidProblem("Binomial needs either snapshots (a number of states) or memory (in bytes).")
        name = "memory" if self.snapshots is None else "snapshots"
        _check(f"Binomial({name}=...)", getattr(self, name), 1)

    def fitted(self, steps: int, state_bytes: int) -> Schedule:
        """Return the schedule with as many states as fit into `memory`."""
        if self.memory is None:
            return self
        if self.memory < state_bytes:
            raise InvalidProblem(
                f"Binomial(memory={self.memory}) holds no state of {state_bytes} bytes; give at least that, or store "
                "states on disk."
            )
        return Binomial(min(self.memory // max(state_bytes, 1), steps))

    def actions(self, steps: int) -> Iterator[Action]:
        """Yield the optimal reversal: advance to the split, treat the right part with one state less, then the left."""
        stack = [(0, steps, self._count())]
        while stack:
            start, stop, slots = stack.pop()
            length = stop - start
            if length == 1:
                yield from _segment(start, stop, graphs=True)
            elif slots == 1:
                for step in range(stop - 1, start, -1):
                    yield Reverse(start, step, step + 1)
                yield from _segment(start, start + 1, graphs=True)
            else:
                middle = start + _split(length, slots)
                yield Advance(start, (middle,))
                stack += [(start, middle, slots), (middle, stop, slots - 1)]

    def peak(self, steps: int) -> int:
        """Return c, or T where that is less."""
        return min(self._count(), steps)

    def advances(self, steps: int) -> int:
        """Return r T - C(c + r, c + 1)."""
        c = self._count()
        r = _repeats(steps, c)
        return r * steps - _reach(c + 1, r - 1)

    def _count(self) -> int:
        if self.snapshots is None:
            raise InvalidProblem("Binomial(memory=...) must know the size of a state first: call fitted().")
        return self.snapshots


def _segment(start: int, stop: int, *, graphs: bool) -> Iterator[Action]:
    """Yield the visit of the steps from a stored state on, all at once or one by one, and drop what it stored."""
    if graphs:
        yield Reverse(start, start, stop)
        yield Drop(start)
        return
    if stop - start > 1:
        yield Advance(start, tuple(range(start + 1, stop)))
    for step in range(stop - 1, start - 1, -1):
        yield Reverse(step, step, step + 1)
        yield Drop(step)


def _reach(c: int, r: int) -> int:
    """Return how many steps c states allow if none is run forward more than r times."""
    return comb(c + r, c) if r >= 0 else 0


def _repeats(length: int, c: int) -> int:
    """Return the least r whose reach covers the length."""
    r = 0
    while _reach(c, r) < length:
        r += 1
    return r


def _split(length: int, c: int) -> int:
    """Return m that minimizes `m + t(length - m, c - 1) + t(m, c)`; both parts then need no more repeats than now."""
    r = _repeats(length, c)
    return max(_reach(c, r - 2), length - _reach(c - 1, r), 1)


def _check(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidProblem(f"{name} must be an int of at least {least}, got {value!r}.")
