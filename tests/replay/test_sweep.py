"""The sweep: exact on a closed form, within its budget by weak references, and not to be fooled."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bilevel.replay import Binomial, Disk, Host, KAry, Memory, Schedule, Sqrt, Store, StoreAll, reverse
from bilevel.status import CheckpointError, OutOfMemory, ReplayMismatch

SCHEDULES = [StoreAll(), StoreAll(graphs=False), Sqrt(), Sqrt(graphs=False), KAry(2), KAry(3), KAry(50), Binomial(1),
             Binomial(4), Binomial(50)]  # fmt: skip


class State(NamedTuple):
    y: Tensor
    momentum: Tensor
    count: int


class Linear:
    """y' = y - 0.1 m', m' = 0.9 m + a_t y: linear, so that its adjoint is a product of matrices."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def rate(self, step: int) -> float:
        return 1.0 + 0.3 * (step % 5)

    def after(self, step: int, state: State) -> State:
        momentum = 0.9 * state.momentum + self.rate(step) * state.y
        after = State(state.y - 0.1 * momentum, momentum, state.count + 1)
        self.alive.add(after.y)
        return after

    def advance(self, step: int, state: State) -> State:
        self.calls.append(("advance", step))
        self.watch(state)
        return self.after(step, state)

    def linearize(self, step: int, state: State) -> tuple[State, Callable[[Any], Any]]:
        self.calls.append(("linearize", step))
        self.watch(state)
        held = state.y  # as a graph would

        def pull(a: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            assert held is not None
            self.calls.append(("pull", step))
            y, m = a
            m = m - 0.1 * y
            return y + self.rate(step) * m, 0.9 * m

        return self.after(step, state), pull

    def watch(self, state: State) -> None:
        gc.collect(0)
        self.most = max(self.most, len([y for y in self.alive if y is not state.y]))


def start() -> State:
    return State(torch.tensor([1.0, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0)


def head(state: State) -> tuple[Tensor, Tensor]:
    return state.y.clone(), torch.zeros_like(state.y)


def expected(steps: int) -> list[Tensor]:
    """The cotangent of the start by products of matrices."""
    whole = torch.eye(2, dtype=torch.float64)
    for step in range(steps):
        r = Linear().rate(step)
        whole = torch.tensor([[1 - 0.1 * r, -0.09], [r, 0.9]], dtype=torch.float64) @ whole
    s0 = torch.stack(list(start()[:2]))
    return list(whole.T @ torch.stack([(whole @ s0)[0], torch.zeros(2, dtype=torch.float64)]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 16, 61])
def test_the_cotangent_is_exact_and_every_step_is_pulled_once(schedule: Schedule, steps: int) -> None:
    process = Linear()
    found, took = reverse(process, start(), steps, head, schedule=schedule)
    torch.testing.assert_close(list(found), expected(steps), rtol=1e-13, atol=1e-13)
    assert [step for what, step in process.calls if what == "pull"] == list(range(steps - 1, -1, -1))
    assert sum(what == "linearize" for what, _ in process.calls) == steps == took.steps
    advanced = sum(what == "advance" for what, _ in process.calls)
    assert advanced == took.advances <= schedule.advances(steps)
    assert took.peak_states <= schedule.peak(steps)
    if not isinstance(schedule, KAry):
        assert (took.advances, took.peak_states) == (schedule.advances(steps), schedule.peak(steps))
    assert took.state_bytes == 32


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("steps", [1, 7, 61])
def test_live_states_never_exceed_the_budget(schedule: Schedule, steps: int) -> None:
    process = Linear()
    kept = start()
    process.alive.add(kept.y)
    reverse(process, kept, steps, head, schedule=schedule)
    assert process.most <= schedule.peak(steps)
    del kept
    gc.collect()
    assert not list(process.alive), "all states are freed at the end"


def test_no_steps_are_the_head_alone() -> None:
    found, took = reverse(Linear(), start(), 0, head)
    assert torch.equal(found[0], start().y)
    assert took.steps == took.advances == 0


def test_steps_are_counted_from_first() -> None:
    process = Linear()
    reverse(process, start(), 3, head, first=7)
    assert [step for what, step in process.calls if what == "pull"] == [9, 8, 7]


@pytest.mark.parametrize("schedule", [Sqrt(), Sqrt(graphs=False), KAry(3), Binomial(4)], ids=str)
@pytest.mark.parametrize("kind", [Memory, Host, Disk])
def test_stores_change_no_bit(schedule: Schedule, kind: type[Store], tmp_path: Path) -> None:
    store = kind(tmp_path / "states") if kind is Disk else kind()
    found, _ = reverse(Linear(), start(), 40, head, schedule=schedule, store=store)
    plain, _ = reverse(Linear(), start(), 40, head, schedule=StoreAll())
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])
    if kind is Disk:
        assert not list((tmp_path / "states").iterdir())


# -- what must not go unnoticed ---------------------------------------------------------------------------------------


class Forgetful(Linear):
    """The rate depends on how often it was asked for: what an iterator of batches does when steps are repeated."""

    asked = 0

    def rate(self, step: int) -> float:
        self.asked += 1
        return 1.0 + 0.3 * (self.asked % 7)


RECOMPUTING = [Sqrt(), Sqrt(graphs=False), StoreAll(graphs=False), KAry(2), KAry(3), Binomial(1), Binomial(4)]


@pytest.mark.parametrize("schedule", RECOMPUTING, ids=str)
def test_order_tied_to_a_call_count_is_a_mismatch(schedule: Schedule) -> None:
    with pytest.raises(
        ReplayMismatch, match=r"before step \d+ differs from the first time in 'y' by at least"
    ) as caught:
        reverse(Forgetful(), start(), 20, head, schedule=schedule)
    assert caught.value.leaf == "y"
    assert caught.value.difference > 1e-6
    assert 0 < caught.value.step <= 20
    reverse(Forgetful(), start(), 20, head, schedule=schedule, verify=False)  # no one looked


class Noisy(Linear):
    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def linearize(self, step: int, state: State) -> tuple[State, Callable[[Any], Any]]:
        return super().linearize(step, state._replace(y=state.y * (1 + self.noise)))


def test_rounding_is_tolerated_where_allowed_with_a_warning() -> None:
    with pytest.raises(ReplayMismatch):
        reverse(Noisy(1e-15), start(), 20, head)
    with pytest.warns(UserWarning, match="kernels are not deterministic"):
        found, _ = reverse(Noisy(1e-9), start(), 20, head, tol=1e-6)
    torch.testing.assert_close(list(found), expected(20), rtol=1e-7, atol=1e-7)
    with pytest.raises(ReplayMismatch):
        reverse(Noisy(1e-4), start(), 20, head, tol=1e-6)


class InPlace(Linear):
    """Edits the state it is given, as `data.add_` does."""

    def advance(self, step: int, state: State) -> State:
        after = super().advance(step, state)
        if step == 5:
            state.y.mul_(1.01)
        return after


def test_a_state_changed_in_place_is_a_mismatch() -> None:
    with pytest.raises(ReplayMismatch):
        reverse(InPlace(), start(), 20, head, schedule=KAry(7))


class Restless(Linear):
    def after(self, step: int, state: State) -> State:
        return super().after(step, state)._replace(count=len(self.calls))


def test_counters_are_compared_too() -> None:
    with pytest.raises(ReplayMismatch, match="'count'"):
        reverse(Restless(), start(), 20, head)


class Hungry(Linear):
    def linearize(self, step: int, state: State) -> tuple[State, Callable[[Any], Any]]:
        if step == 17:
            torch.empty(2**60, dtype=torch.uint8)
        return super().linearize(step, state)


def test_out_of_memory_names_the_bytes_and_what_would_fit() -> None:
    with pytest.raises(OutOfMemory, match=r"of 8 states held \(32 bytes each, 256 in all.*Binomial\(snapshots=\d\)"):
        reverse(Hungry(), start(), 20, head)


class Broken(Linear):
    def advance(self, step: int, state: State) -> State:
        raise RuntimeError("mine")


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="mine"):
        reverse(Broken(), start(), 20, head)


# -- files ------------------------------------------------------------------------------------------------------------


class Stopped(Linear):
    """Stops at the n-th call, and counts the calls of all processes."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def after(self, step: int, state: State) -> State:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().after(step, state)


@pytest.mark.parametrize(
    "schedule", [Sqrt(), *(pytest.param(s, marks=pytest.mark.slow) for s in (Sqrt(graphs=False), Binomial(3)))], ids=str
)
def test_a_visit_stopped_anywhere_goes_on_with_the_same_bits(schedule: Schedule, tmp_path: Path) -> None:
    plain, took = reverse(Linear(), start(), 8, head, schedule=schedule)
    for stop in range(took.advances + 8):
        store = Disk(tmp_path / str(stop))
        with pytest.raises(KeyboardInterrupt):
            reverse(Stopped(stop), start(), 8, head, schedule=schedule, store=store, fingerprint="a")
        process = Linear()
        found, _ = reverse(process, start(), 8, head, schedule=schedule, store=store, fingerprint="a")
        assert torch.equal(found[0], plain[0])
        assert torch.equal(found[1], plain[1])
        assert sum(what != "pull" for what, _ in process.calls) <= took.advances + 8
    assert sum(what != "pull" for what, _ in process.calls) <= 5, "what was done is not done again"


@pytest.mark.slow
def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, sys, torch
        from bilevel.replay import Disk, Sqrt, reverse
        class Slow:
            def advance(self, step, state):
                return state * (1 + 0.1 / (step + 1)) - 0.01 * state**2
            def linearize(self, step, state):
                print("linearize", step, flush=True)
                if step == int(sys.argv[2]):
                    os.kill(os.getpid(), 9)
                return self.advance(step, state), lambda a: a * (1 + 0.1 / (step + 1) - 0.02 * state)
        x = torch.linspace(0.1, 2, 7, dtype=torch.float64)
        found, _ = reverse(Slow(), x, 30, lambda s: 2 * s, store=Disk(sys.argv[1]))
        print(found.tolist())
    """)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def run(folder: str, kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / folder), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    whole = run("a", -1)
    assert run("b", 14).returncode == -9
    assert (tmp_path / "b" / "replay-progress.bin").exists()
    resumed = run("b", -1)
    assert resumed.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]
    assert len(resumed.stdout.splitlines()) < len(whole.stdout.splitlines())


def stopped(folder: Path, fingerprint: str = "a") -> None:
    with pytest.raises(KeyboardInterrupt):
        reverse(Stopped(23), start(), 16, head, store=Disk(folder), fingerprint=fingerprint)


def test_another_visit_does_not_use_the_files(tmp_path: Path) -> None:
    stopped(tmp_path, "a")
    (tmp_path / "mine.bin").write_text("mine")
    process = Linear()
    reverse(process, start(), 16, head, store=Disk(tmp_path), fingerprint="b")
    assert sum(what != "pull" for what, _ in process.calls) == 28
    assert (tmp_path / "mine.bin").exists()
    stopped(tmp_path, "a")
    process = Linear()
    other = start()
    other.y[0] = 7.0
    reverse(process, other, 16, head, store=Disk(tmp_path), fingerprint="a")
    assert sum(what != "pull" for what, _ in process.calls) == 28


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_damaged_files_are_found(harm: str, tmp_path: Path) -> None:
    stopped(tmp_path)
    path = tmp_path / "replay-state-4.bin"
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[-3] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-5]), "empty": b""}[harm])
    with pytest.raises(CheckpointError, match=r"replay-state-4.bin is damaged.*delete the files replay-\*.bin"):
        reverse(Linear(), start(), 16, head, store=Disk(tmp_path), fingerprint="a")


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"could not write \d+ bytes.*No space left"):
        reverse(Linear(), start(), 16, head, store=Disk(tmp_path))
    assert not list(tmp_path.iterdir())


def test_files_hold_every_kind_of_state(tmp_path: Path) -> None:
    shelf = Disk(tmp_path).open("")
    value = {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "none": torch.ones(0, 2),
        "nest": [State(torch.ones(()), torch.arange(3), 4), (1.5, None, "text", {"a": True})],
    }
    shelf.put("a", value)
    found = shelf.get("a")
    assert isinstance(found["nest"][0], State)
    assert found["nest"][1] == value["nest"][1]
    for one, other in zip(
        [value["half"], value["mask"], value["none"], *value["nest"][0][:2]],
        [found["half"], found["mask"], found["none"], *found["nest"][0][:2]],
        strict=True,
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    with pytest.raises(CheckpointError, match="holds a set"):
        shelf.put("b", {1, 2})
