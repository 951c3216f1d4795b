"""Solver states as plain nested dicts: NamedTuples and statuses become data that loads without running code."""

from __future__ import annotations

import sys
from typing import Any

from bilevel.status import InvalidProblem, Status

KIND = "__kind__"


def pack(value: Any) -> Any:
    """Return `value` with NamedTuples as dicts and statuses as names; tensors and numbers stay.

    Example:
        >>> pack(Status.CONVERGED)
        {'__kind__': 'status', 'name': 'CONVERGED'}
    """
    if isinstance(value, Status):
        return {KIND: "status", "name": value.name}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {KIND: kind} | {name: pack(getattr(value, name)) for name in value._fields}
    if isinstance(value, tuple | list):
        return type(value)(pack(child) for child in value)
    return {key: pack(child) for key, child in value.items()} if isinstance(value, dict) else value


def unpack(value: Any) -> Any:
    """Return what `pack` was given. Only NamedTuple classes of modules imported already are looked up.

    Raises:
        InvalidProblem: a class is unknown here, or has other fields.
    """
    if isinstance(value, tuple | list):
        return type(value)(unpack(child) for child in value)
    if not isinstance(value, dict):
        return value
    if KIND not in value:
        return {key: unpack(child) for key, child in value.items()}
    if value[KIND] == "status":
        return Status[value["name"]]
    module, _, name = value[KIND].partition(":")
    kind = getattr(sys.modules.get(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")):
        raise InvalidProblem(f"the saved state names {value[KIND]!r}, which is no state class here; import its module.")
    fields = {key: unpack(child) for key, child in value.items() if key != KIND}
    if set(fields) != set(kind._fields):
        raise InvalidProblem(f"the saved {name} has fields {sorted(fields)}, expected {sorted(kind._fields)}.")
    return kind(**fields)
