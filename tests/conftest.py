"""What all tests share: one thread a worker, the devices of this machine, and a generator of their own."""

from __future__ import annotations

import pytest
import torch

# Two workers with two threads each would fight over two cores, and sums would depend on the number of threads.
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Each kind of device that a contract must hold on; `cuda` is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator: tests draw from it, never from the global random state."""
    return torch.Generator().manual_seed(0)
