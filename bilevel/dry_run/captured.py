"""What belongs to the user and an objective could change: kept, compared, put back."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.modules import FunctionalModule

LIBRARIES = {"torch", "numpy", "pandas", "scipy", "sklearn"}
FURTHEST = 10_000
"""Objects to look into before the search gives up."""


def modules_held(*functions: Callable[..., Any] | None) -> tuple[list[nn.Module], list[nn.Module]]:
    """Find the modules that functions hold: in closures, globals they name, defaults, partials, attributes, containers.

    Returns:
        Modules that must not change, and modules that a `functional(module, commit_buffers=True)` is meant to change.
    """
    found: list[nn.Module] = []
    committed: list[nn.Module] = []
    for value in _reachable(functions):
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, FunctionalModule) and value.source is not value.template:
            committed.append(value.source)
    return found, committed


def _reachable(roots: Iterable[Any]) -> Iterator[Any]:
    queue, seen = deque(roots), set[int]()
    while queue and len(seen) < FURTHEST:
        value = queue.popleft()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            queue += _children(value)


def _children(value: Any) -> Iterator[Any]:
    """Yield what a value holds, as far as user code is concerned: never libraries, classes, or the parts of modules."""
    if isinstance(value, Tensor | str | bytes | int | float | type | ModuleType | nn.Module | FunctionalModule):
        return
    if (getattr(value, "__module__", None) or type(value).__module__).split(".")[0] in LIBRARIES:
        return
    if isinstance(value, FunctionType):
        yield from (_content(cell) for cell in value.__closure__ or ())
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from (value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(fields := getattr(value, "__dict__", None), dict):
        yield from fields.values()
        if callable(value):
            yield type(value).__call__


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function and the functions and comprehensions inside it look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is assigned later
        return None


class Kept:
    """Copies of tensors, to tell which have changed and to put them back.

    Args:
        tensors: names and tensors.
        limit: bytes beyond which nothing is copied, and only the versions of the tensors are watched.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], limit: float = math.inf) -> None:
        named = list(tensors)
        copied = sum(tensor.numel() * tensor.element_size() for _, tensor in named) <= limit
        self._kept = [
            (name, tensor, tensor._version, tensor.detach().clone() if copied else None) for name, tensor in named
        ]

    @classmethod
    def of_module(cls, module: nn.Module) -> Kept:
        """Keep all parameters and buffers of a module; `changed` then gives their names."""
        return cls([*module.named_parameters(), *module.named_buffers()])

    def changed(self) -> str | None:
        """Return the name of the first tensor that changed; by value, as not every change moves the version."""
        for name, tensor, version, copy in self._kept:
            if tensor._version != version if copy is None else not _same(tensor, copy):
                return name
        return None

    def restore(self) -> None:
        """Put the values back where they changed."""
        for _, tensor, _, copy in self._kept:
            if copy is not None and not _same(tensor, copy):
                with torch.no_grad():
                    tensor.copy_(copy)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.device.type == "meta" or torch.equal(one, other):
        return True
    return bool(((one == other) | (one != one) & (other != other)).all())
