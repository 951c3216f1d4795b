"""The visit itself: run a computation forward as a schedule says, and pull a cotangent back through its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from bilevel.replay._digest import Digest, compare, digest, size_in_bytes
from bilevel.replay.schedules import Action, Advance, Drop, Reverse, Schedule, Sqrt
from bilevel.replay.stores import Memory, Shelf, Store
from bilevel.status import OutOfMemory

S = TypeVar("S")
A = TypeVar("A")


class Process(Protocol[S, A]):
    """A computation in steps. Both functions must not change the state they are given."""

    def advance(self, step: int, state: S) -> S:
        """Return the state after a step."""

    def linearize(self, step: int, state: S) -> tuple[S, Callable[[A], A]]:
        """Return the state after a step, and the map that pulls a cotangent back through it; it is called once."""


class Visited(NamedTuple):
    """What a visit took.

    Args:
        steps: visited, T.
        advances: steps run without being visited.
        peak_states: states (with their graphs) held at once, the one being computed not included.
        state_bytes: size of one state.
    """

    steps: int
    advances: int
    peak_states: int
    state_bytes: int


def reverse(
    process: Process[S, A],
    state: S,
    steps: int,
    head: Callable[[S], A],
    *,
    first: int = 0,
    schedule: Schedule | None = None,
    store: Store | None = None,
    verify: bool = True,
    tol: float | None = None,
    fingerprint: str = "",
) -> tuple[A, Visited]:
    """Run T steps and visit them from the last to the first: `a = head(s_T)`, then `a = pull_t(a)` for t = T-1 .. 0.

    It holds if a step run again gives the same state; that is verified at the states between visits.

    Args:
        process: the steps and their pullbacks.
        state: before the first step; nested tuples, dicts and lists of tensors and numbers, of the same structure after
            each step.
        steps: T >= 0.
        head: called once, with the last state.
        first: number of the first step; `process` and errors count from it.
        schedule: which states to store; `Sqrt()` if None.
        store: where; `Memory()` if None.
        verify: compare digests of the states between visits with those of the first time.
        tol: difference allowed there, relative; None: none on a CPU, 1e-6 elsewhere (with a warning).
        fingerprint: of whatever the process depends on besides the state, for stores that recover.

    Returns:
        The last `a`, and what it took.

    Raises:
        ReplayMismatch: a state computed again differs.
        CheckpointError: a stored state is damaged.
        OutOfMemory: memory ran out; the message gives the bytes and a schedule that takes less.

    Cost:
        That of the schedule; two digests a visit of one or several steps.

    References:
        Griewank and Walther, "Evaluating derivatives", 2nd edition, 2008, chapter 12.

    Example:
        >>> class Square:
        ...     def advance(self, step, state):
        ...         return state * state
        ...     def linearize(self, step, state):
        ...         return state * state, lambda a: 2 * state * a
        >>> float(reverse(Square(), torch.tensor(1.1), 3, torch.ones_like)[0])  # d s^8 / ds = 8 s^7
        15.589...
    """
    size = size_in_bytes(state)
    schedule = (Sqrt() if schedule is None else schedule).fitted(steps, size)
    if steps == 0:
        return head(state), Visited(0, 0, 1, size)
    key = f"{fingerprint}|{first}|{steps}|{schedule}|{_text(state)}"
    shelf = (Memory() if store is None else store).open(key)
    visit = _Visit(process, head, first, steps, shelf, tol, verify=verify)
    try:
        adjoint = visit.run(schedule, state)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        visit.pulls.clear()
        raise OutOfMemory(_advice(schedule, steps, size, visit.peak)) from error
    shelf.close()
    return adjoint, Visited(steps, visit.advances, visit.peak, size)


@dataclass
class _Visit(Generic[S, A]):
    """One visit under way."""

    process: Process[S, A]
    head: Callable[[S], A]
    first: int
    steps: int
    shelf: Shelf
    tol: float | None
    verify: bool
    advances: int = 0
    peak: int = 1
    stored: set[int] = field(default_factory=set)
    digests: dict[int, dict[str, Any]] = field(default_factory=dict)
    pulls: list[Callable[[A], A]] = field(default_factory=list)
    adjoint: A | None = None
    recovered: bool = False

    def run(self, schedule: Schedule, state: S) -> A:
        done = self._recover()
        if not self.shelf.has("state-0") and done < 0:
            self.shelf.put("state-0", state)
        self.stored.add(0)
        del state
        for number, action in enumerate(schedule.actions(self.steps)):
            if isinstance(action, Drop):
                self.shelf.drop(f"state-{action.step}")
                self.stored.discard(action.step)
            elif number <= done:
                if isinstance(action, Advance):
                    self.stored.update(action.stops)
            else:
                self._do(action, number)
        if self.adjoint is None:
            raise AssertionError("the schedule visited no step")
        return self.adjoint

    def _do(self, action: Action, number: int) -> None:
        if isinstance(action, Advance):
            self._advance(action)
        elif isinstance(action, Reverse):
            self._reverse(action)
            if self.shelf.recovers:
                kept = {str(step): _plain(value) for step, value in self.digests.items() if step <= action.start}
                self.shelf.put("progress", {"action": number, "adjoint": self.adjoint, "digests": kept})

    def _recover(self) -> int:
        """Return the number of the last action that need not be repeated, -1 without any."""
        if not self.shelf.recovers:
            return -1
        self.recovered = True
        if not self.shelf.has("progress"):
            return -1
        progress = self.shelf.get("progress")
        self.adjoint = progress["adjoint"]
        self.digests = {int(step): _digests(value) for step, value in progress["digests"].items()}
        return int(progress["action"])

    def _advance(self, action: Advance) -> None:
        start, state = action.start, None
        first_pass = self.adjoint is None
        for stop in action.stops:
            if self.recovered and self.shelf.has(f"state-{stop}"):
                state = self.shelf.get(f"state-{stop}")
            else:
                state = self.shelf.get(f"state-{start}") if state is None else state
                for step in range(start, stop):
                    state = self.process.advance(self.first + step, state)
                self.advances += stop - start
                self.shelf.put(f"state-{stop}", state)
            self.stored.add(stop)
            self.peak = max(self.peak, len(self.stored))
            self._check(stop, state, record=first_pass)
            start = stop

    def _reverse(self, action: Reverse) -> None:
        state = self.shelf.get(f"state-{action.source}")
        for step in range(action.source, action.start):
            state = self.process.advance(self.first + step, state)
        self.advances += action.start - action.source
        self._check(action.start, state, record=True)  # the visit before this one will end there
        for step in range(action.start, action.stop):
            state, pull = self.process.linearize(self.first + step, state)
            self.pulls.append(pull)
        del pull
        self.peak = max(self.peak, len(self.stored) + action.stop - action.start - 1)
        self._check(action.stop, state, record=False)
        self.digests.pop(action.stop, None)
        if action.stop == self.steps:
            self.adjoint = self.head(state)
        del state
        while self.pulls:
            assert self.adjoint is not None
            self.adjoint = self.pulls.pop()(self.adjoint)

    def _check(self, step: int, state: S, *, record: bool) -> None:
        if not self.verify:
            return
        if step in self.digests:
            compare(self.first + step, self.digests[step], state, self.tol)
        elif record and 0 < step < self.steps:
            self.digests[step] = digest(state)


def _plain(digests: dict[str, Any]) -> dict[str, Any]:
    return {name: {"digest": list(value)} if isinstance(value, Digest) else value for name, value in digests.items()}


def _digests(plain: dict[str, Any]) -> dict[str, Any]:
    return {name: Digest(*value["digest"]) if isinstance(value, dict) else value for name, value in plain.items()}


def _text(state: Any) -> str:
    """Return what tells one initial state from another."""
    brief = digest(state).items()
    return repr([(n, int(v.bits), v.sample[:8].tolist()) if isinstance(v, Digest) else (n, v) for n, v in brief])


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _advice(schedule: Schedule, steps: int, size: int, peak: int) -> str:
    held = schedule.peak(steps)
    fewer = max(1, peak // 2)
    return (
        f"memory ran out with {peak} of {held} states held ({size} bytes each, {held * size} in all, and the graphs of "
        f"steps with {schedule}). Binomial(snapshots={fewer}) takes {fewer * size} bytes of states and one graph at a "
        "time; store=Host() or Disk(folder) moves states elsewhere; microbatches make a graph smaller."
    )
