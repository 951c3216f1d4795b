"""Seeds made of several parts, and code run in a seeded random state that leaves no trace."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Generator


def mixed(*parts: Any) -> int:
    """Return a seed in [0, 2^63) that differs, for all practical purposes, for different parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


@contextmanager
def seeded(seed: int, generators: Sequence[Generator] = ()) -> Iterator[None]:
    """Seed the random states of the main process's CPU (torch, `random`, numpy), and put them back at the end.

    Args:
        seed: >= 0.
        generators: more generators to treat the same way.
    """
    # torch.manual_seed would also seed every accelerator.
    torch_states = [(generator, generator.get_state()) for generator in (torch.default_generator, *generators)]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (what augmentations draw from)
    try:
        for index, (generator, _) in enumerate(torch_states):
            generator.manual_seed(mixed(seed, index))
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield
    finally:
        for generator, state in torch_states:
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
