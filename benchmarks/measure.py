"""Seconds and memory of a function, measured so that a busy machine disturbs little."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile

Work: TypeAlias = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Median seconds of a function, and the median over pairs of its seconds divided by those of the other one."""

    seconds: float
    ratio: float


def compare(work: Work, other: Work, pairs: int, device: torch.device) -> Timing:
    """Time two functions in turn, the one that goes first alternating."""
    for function in (work, other):
        function()
    times = []
    gc.disable()
    try:
        for index in range(pairs):
            if index % 2:
                theirs, ours = seconds(other, device), seconds(work, device)
            else:
                ours, theirs = seconds(work, device), seconds(other, device)
            times.append((ours, theirs))
    finally:
        gc.enable()
    return Timing(median(ours for ours, _ in times), median(ours / theirs for ours, theirs in times))


def seconds(work: Work, device: torch.device) -> float:
    """Return the seconds of one call: of this process on a CPU, between two device events elsewhere."""
    if device.type != "cuda":
        begin = time.process_time()
        work()
        return time.process_time() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


def added_mb(work: Work, device: torch.device) -> float:
    """Return by how much the tensors alive during one call exceed those alive before, at the peak, in 10^6 bytes.

    On a CPU the allocator's own record of every block is added up; scratch memory inside the matrix library is not
    part of it.
    """
    work()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        work()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    blocks = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for block in sorted(blocks, key=lambda event: event.start_ns()):
        held += block.nbytes()
        peak = max(peak, held)
    return peak / 1e6
