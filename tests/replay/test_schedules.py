"""Schedules visit every step once, backward, within the states and the plain steps that their formulas say."""

from __future__ import annotations

from functools import cache
from math import isqrt

import pytest

from bilevel.replay import Advance, Binomial, KAry, Reverse, Schedule, Sqrt, StoreAll
from bilevel.status import InvalidProblem

LENGTHS = [*range(1, 130), 256, 599, 1000, 1024]


def walk(schedule: Schedule, steps: int) -> tuple[int, int]:
    """Return (peak states, plain steps) of a schedule, having checked that it is one."""
    stored, advances, peak, awaited = {0}, 0, 1, steps
    for action in schedule.actions(steps):
        if isinstance(action, Advance):
            assert action.start in stored
            at = action.start
            for stop in action.stops:
                assert stop > at
                advances, at = advances + stop - at, stop
                stored.add(stop)
            peak = max(peak, len(stored))
        elif isinstance(action, Reverse):
            assert action.source in stored
            assert action.stop == awaited
            advances, awaited = advances + action.start - action.source, action.start
            peak = max(peak, len(stored) + action.stop - action.start - 1)
        else:
            stored.remove(action.step)
    assert not stored
    assert awaited == 0
    return peak, advances


@pytest.mark.parametrize("schedule", [StoreAll(), StoreAll(graphs=False), Sqrt(), Sqrt(graphs=False)], ids=str)
def test_store_all_and_sqrt_are_as_their_formulas(schedule: Schedule) -> None:
    for steps in LENGTHS:
        assert walk(schedule, steps) == (schedule.peak(steps), schedule.advances(steps))


def test_formulas_of_store_all_and_sqrt() -> None:
    for steps in LENGTHS:
        k = isqrt(steps)
        longest = max((i + 1) * steps // k - i * steps // k for i in range(k))
        last = steps - (k - 1) * steps // k
        assert Sqrt().peak(steps) == k + longest - 1 <= 2 * steps**0.5
        assert Sqrt().advances(steps) == steps - last
        assert Sqrt(graphs=False).advances(steps) == 2 * steps - last - k
        assert (StoreAll().advances(steps), StoreAll(graphs=False).advances(steps)) == (0, steps - 1)
    assert Sqrt().peak(10_000) == 199


@pytest.mark.parametrize("k", [2, 3, 4, 5, 8, 16, 5000])
def test_k_ary_trees_stay_within_their_formulas(k: int) -> None:
    for steps in LENGTHS:
        peak, advances = walk(KAry(k), steps)
        levels = next(h for h in range(20) if k**h >= steps)
        assert peak <= 1 + (k - 1) * levels
        assert peak <= KAry(k).peak(steps)
        assert advances <= levels * (k - 1) / k * steps + 1e-9
        assert advances <= KAry(k).advances(steps)


@pytest.mark.parametrize(("k", "levels"), [(2, 10), (3, 5), (4, 5), (8, 3), (32, 2), (100, 1)])
def test_k_ary_trees_attain_their_formulas_at_powers(k: int, levels: int) -> None:
    steps = k**levels
    expected = (1 + (k - 1) * levels, levels * (k - 1) * steps // k)
    assert walk(KAry(k), steps) == (KAry(k).peak(steps), KAry(k).advances(steps)) == expected


@cache
def least(length: int, c: int) -> int:
    """The fewest plain steps by dynamic programming."""
    if length == 1:
        return 0
    if c == 1:
        return length * (length - 1) // 2
    return min(m + least(length - m, c - 1) + least(m, c) for m in range(1, length))


@pytest.mark.parametrize("c", [1, 2, 3, 4, 5, 8, 12])
def test_binomial_is_optimal(c: int) -> None:
    for steps in range(1, 60):
        peak, advances = walk(Binomial(c), steps)
        assert peak == Binomial(c).peak(steps) == min(c, steps)
        assert advances == Binomial(c).advances(steps) == least(steps, c)


def test_binomial_is_never_worse_than_a_tree_with_as_many_states() -> None:
    for steps in LENGTHS:
        for k in (2, 3, 4, 8, 16, 32):
            peak, advances = walk(KAry(k), steps)
            assert Binomial(peak).advances(steps) <= advances
    # Measured ratios of the specification.
    assert round(4.0 / (Binomial(9).advances(256) / 256), 2) == 1.39
    assert round(5.0 / (Binomial(11).advances(1024) / 1024), 1) == 1.4


def test_binomial_with_room_for_all_is_one_pass() -> None:
    for c in (64, 100):
        assert walk(Binomial(c), 64) == (64, 63)


def test_a_budget_in_bytes_is_a_number_of_states() -> None:
    assert Binomial(memory=1000).fitted(64, 99) == Binomial(10)
    assert Binomial(memory=10**9).fitted(64, 99) == Binomial(64)
    assert Binomial(7).fitted(64, 99) == Binomial(7)
    with pytest.raises(InvalidProblem, match="holds no state of 99 bytes"):
        Binomial(memory=98).fitted(64, 99)


@pytest.mark.parametrize(
    "make",
    [Binomial, lambda: Binomial(3, memory=100), lambda: Binomial(0), lambda: Binomial(memory=True), lambda: KAry(1),
     lambda: KAry(2.0), lambda: Binomial(memory=10).peak(3)],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(make) -> None:
    with pytest.raises(InvalidProblem):
        make()
