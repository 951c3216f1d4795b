"""What torch says about a faulty objective, in words that help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bilevel.layout import named_leaves
from bilevel.oracles import Level, Oracles, tensors_in
from bilevel.status import BilevelError, InvalidProblem


def detached(level: Level) -> InvalidProblem:
    """Say that an objective has no graph to x and y."""
    return InvalidProblem(
        f"the {level} objective is detached from x and y (.item(), .detach(), numpy, no_grad, or a constant?); "
        "compute it from them with torch operations."
    )


@contextmanager
def explained(oracles: Oracles, level: Level, xs: list[Tensor], ys: list[Tensor], batch: Any) -> Iterator[None]:
    """Raise what torch says about the block, one call of an objective, as InvalidProblem where the cause is known."""
    try:
        yield
    except BilevelError:
        raise
    except RuntimeError as error:
        text = str(error).strip()
        first = text.splitlines()[0] if text else ""
        if "in-place" in text or "inplace" in text or "in place" in text:
            leaf = _edited(oracles, level, xs, ys)
            raise InvalidProblem(
                f"the {level} objective changes {leaf or 'a tensor'} in place: {first} "
                "Write y = y + ... instead of y += ..."
            ) from error
        if "numpy() on" in text:
            raise detached(level) from error
        device = oracles.x_layout.device
        strays = [
            f"'{name or 'batch'}' {tuple(leaf.shape)} on {leaf.device}"
            for name, leaf in named_leaves(batch)
            if isinstance(leaf, Tensor) and leaf.device != device
        ]
        if "same device" in text or "not on the expected device" in text or strays:
            listed = "; ".join(strays) or "a tensor captured by the function is not"
            raise InvalidProblem(
                f"the {level} objective mixes devices: x and y are on {device}, but {listed}."
            ) from error
        own = oracles.x_layout.leaf_dtype or oracles.x_layout.dtype
        dtypes = [
            f"'{name or 'batch'}' is {leaf.dtype}"
            for name, leaf in named_leaves(batch)
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != own
        ]
        if "dtype" in text or "scalar type" in text:
            listed = "; ".join(dtypes) or "a tensor captured by the function is not"
            raise InvalidProblem(
                f"the {level} objective mixes dtypes: x and y are {own}, but {listed} ({first}). Convert with .to(...)."
            ) from error
        error.add_note(
            f"raised by the {level} objective in the dry run at step 0, called with {_shapes(xs, ys, batch)}"
        )
        raise


def _edited(oracles: Oracles, level: Level, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> str | None:
    """Name the leaf that an objective edits: the one without which torch would not complain."""
    count = len(xs)
    names = [f"x's leaf '{name}'" for name in oracles.x_layout.names] + [
        f"y's leaf '{name}'" for name in oracles.y_layout.names
    ]
    for index, name in enumerate(names):
        copies = [leaf.detach().clone() for leaf in (*xs, *ys)]
        copies[index].requires_grad_()
        try:
            with torch.enable_grad():
                oracles.call(level, 0, copies[:count], copies[count:])
        except RuntimeError:
            return name
    return None


def _shapes(xs: list[Tensor], ys: list[Tensor], batch: Any) -> str:
    of = {"x": xs, "y": ys, "batch": tensors_in(batch)}
    return ", ".join(f"{name}: {[tuple(tensor.shape) for tensor in tensors]}" for name, tensors in of.items())
