"""What is kept of a state that is gone, so that the same state computed again can be told from another one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.status import PrecisionWarning, ReplayMismatch

SAMPLED = 256
"""Entries of each tensor that are kept as they are."""
DRIFT = 1e-6
"""Relative difference that recomputing on an accelerator may make."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Digest(NamedTuple):
    """A tensor in brief: the sum of its bit patterns, its norm, and some of its entries."""

    bits: Tensor
    norm: Tensor
    sample: Tensor


def named(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(name, leaf)` of nested tuples, dicts and lists, named by their fields and keys."""
    dot = f"{prefix}." if prefix else ""
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        for field in state._fields:
            yield from named(getattr(state, field), f"{dot}{field}")
    elif isinstance(state, dict):
        for key, child in state.items():
            yield from named(child, f"{dot}{key}")
    elif isinstance(state, list | tuple):
        for index, child in enumerate(state):
            yield from named(child, f"{prefix}[{index}]")
    else:
        yield prefix or "state", state


def size_in_bytes(state: Any) -> int:
    """Return the bytes of the tensors of a state."""
    return sum(leaf.numel() * leaf.element_size() for _, leaf in named(state) if isinstance(leaf, Tensor))


def digest(state: Any) -> dict[str, Any]:
    """Return a digest of each tensor of a state, and its other leaves as they are."""
    return {name: _brief(leaf) if isinstance(leaf, Tensor) else leaf for name, leaf in named(state)}


def compare(step: int, expected: dict[str, Any], state: Any, tol: float | None) -> None:
    """Raise if a state differs from the digest of what it was.

    Args:
        step: before which the state stands.
        expected: its digest.
        state: the state as computed again.
        tol: largest difference allowed, relative to the largest entry sampled; None: 0 on a CPU, `DRIFT` elsewhere.

    Raises:
        ReplayMismatch: it differs by more.
    """
    found = digest(state)
    if found.keys() != expected.keys():
        raise _mismatch(step, "the structure", float("nan"))
    for name, then in expected.items():
        now = found[name]
        if not isinstance(then, Digest):
            if now != then:
                raise _mismatch(step, name, float("nan"))
            continue
        if not isinstance(now, Digest) or now.sample.shape != then.sample.shape:
            raise _mismatch(step, name, float("nan"))
        if bool((now.bits == then.bits).all()):
            continue
        difference = float((now.sample - then.sample).abs().max())
        apart = max(difference, abs(float(now.norm - then.norm)))
        scale = float(then.sample.abs().max())
        allowed = (0.0 if now.sample.device.type == "cpu" else DRIFT) if tol is None else tol
        if not apart <= allowed * max(scale, float(then.norm) / max(then.sample.numel(), 1) ** 0.5) or allowed == 0:
            raise _mismatch(step, name, difference)
        warnings.warn(
            f"the state before step {step} came out {difference:.2g} off in '{name}' when computed again: kernels are "
            "not deterministic. torch.use_deterministic_algorithms(True) mends that.",
            PrecisionWarning,
            stacklevel=2,
        )


def _brief(leaf: Tensor) -> Digest:
    flat = leaf.detach().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    bits = flat.to(torch.uint8) if flat.dtype == torch.bool else flat
    # Whole words of 8 bytes, which add up without a conversion, and what is left over.
    whole = len(bits) - len(bits) % (8 // min(bits.element_size(), 8))
    total = _words(bits[whole:], INTEGERS[bits.element_size()])
    if whole:
        total = total + _words(bits[:whole].clone() if bits.data_ptr() % 8 else bits[:whole], torch.int64)
    sample = flat[:: max(1, -(-flat.numel() // SAMPLED))].double()
    norm: Tensor = torch.linalg.vector_norm(flat if flat.is_floating_point() else flat.double()).double()
    return Digest(total, norm, sample if len(sample) else sample.new_zeros(1))


def _words(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.view(dtype).sum(dtype=torch.int64)


def _mismatch(step: int, leaf: str, difference: float) -> ReplayMismatch:
    size = "" if difference != difference else f" by at least {difference:.2g}"
    return ReplayMismatch(
        f"the state before step {step} differs from the first time in '{leaf}'{size}: the steps are not the same when "
        "run again, and the gradient would be that of another training run. Make batches, augmentation and dropout "
        "functions of the step (a DataSource, torch's global generator), kernels deterministic "
        "(torch.use_deterministic_algorithms(True)), and change no state in place.",
        step=step,
        leaf=leaf,
        difference=difference,
    )
