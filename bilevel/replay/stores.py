"""Where stored states live: as they are, in host memory, or on disk."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from bilevel.layout import named_leaves, rebuild
from bilevel.packing import pack, unpack
from bilevel.status import CheckpointError

PREFIX = "replay-"
MAGIC = b"bilevel replay 1\n"
AGAIN = f"delete the files {PREFIX}*.bin of this folder to start the visit again."


class Shelf(ABC):
    """States stored during one visit, by key."""

    recovers = False
    """Whether what was put is still there after this process has ended."""

    @abstractmethod
    def put(self, key: str, value: Any) -> None:
        """Store nested tensors and numbers."""

    @abstractmethod
    def get(self, key: str) -> Any:
        """Return what was put, on the device where it was.

        Raises:
            CheckpointError: it is damaged.
        """

    @abstractmethod
    def has(self, key: str) -> bool:
        """Whether something usable is stored there."""

    @abstractmethod
    def drop(self, key: str) -> None:
        """Forget what is stored there, if anything."""

    @abstractmethod
    def close(self) -> None:
        """Forget everything."""


class Store(ABC):
    """Where to keep states."""

    @abstractmethod
    def open(self, fingerprint: str) -> Shelf:
        """Return the shelf of one visit; `fingerprint` tells it from others, for shelves that recover."""


@final
@dataclass(frozen=True)
class Memory(Store):
    """Keep states where they are.

    Example:
        >>> shelf = Memory().open("")
        >>> shelf.put("a", torch.ones(2))
        >>> shelf.get("a")
        tensor([1., 1.])
    """

    def open(self, fingerprint: str) -> Shelf:
        """Return an empty shelf."""
        return _Held(to_host=False)


@final
@dataclass(frozen=True)
class Host(Store):
    """Keep states in the memory of the host; pinned, where they come from an accelerator.

    Copies are waited for in both directions, so none is read before it is complete.

    Cost:
        Two copies a state over the bus.
    """

    def open(self, fingerprint: str) -> Shelf:
        """Return an empty shelf."""
        return _Held(to_host=True)


@final
@dataclass(frozen=True)
class Disk(Store):
    """Keep states, and how far the visit has come, in files; a process that was killed goes on from there.

    Each file is written under another name, flushed and then renamed, and carries a SHA-256 of its contents. Files of
    an earlier visit of something else are deleted, files that are not ours are left alone, and all of ours are deleted
    when the visit is complete.

    Args:
        folder: for the files; made if it is not there. One visit at a time.

    Cost:
        Each state is written and read once; after each segment the gradient so far is written, too.
    """

    folder: str | Path

    def open(self, fingerprint: str) -> Shelf:
        """Return the shelf that an earlier process left, if it had the same fingerprint, else an empty one."""
        return _Files(Path(self.folder), fingerprint)


class _Held(Shelf):
    def __init__(self, *, to_host: bool) -> None:
        self._to_host = to_host
        self._values: dict[str, Any] = {}
        self._devices: dict[str, list[torch.device | None]] = {}

    def put(self, key: str, value: Any) -> None:
        if self._to_host:
            leaves = [leaf for _, leaf in named_leaves(value)]
            self._devices[key] = [leaf.device if isinstance(leaf, Tensor) else None for leaf in leaves]
            value = rebuild(value, (_on_host(leaf) for leaf in leaves))
        self._values[key] = value

    def get(self, key: str) -> Any:
        value = self._values[key]
        if not self._to_host:
            return value
        leaves = (leaf for _, leaf in named_leaves(value))
        moved = (
            leaf if device is None else leaf.to(device) for leaf, device in zip(leaves, self._devices[key], strict=True)
        )
        return rebuild(value, moved)

    def has(self, key: str) -> bool:
        return key in self._values

    def drop(self, key: str) -> None:
        self._values.pop(key, None)
        self._devices.pop(key, None)

    def close(self) -> None:
        self._values.clear()
        self._devices.clear()


def _on_host(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.device.type == "cpu":
        return leaf
    return torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True).copy_(leaf)


class _Files(Shelf):
    recovers = True

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"{PREFIX}*.part"):
            partial.unlink()
        if not (self.has("visit") and self.get("visit") == {"fingerprint": fingerprint}):
            self.close()
            self.put("visit", {"fingerprint": fingerprint})

    def put(self, key: str, value: Any) -> None:
        tensors: list[Tensor] = []
        skeleton = json.dumps(_encoded(pack(value), tensors)).encode()
        path, partial = self._path(key), self._path(key).with_suffix(".part")
        digest = hashlib.sha256(skeleton)
        blocks = [_bytes_of(tensor) for tensor in tensors]
        for block in blocks:
            digest.update(block)
        try:
            with partial.open("wb") as file:
                file.write(MAGIC + digest.hexdigest().encode() + b"\n" + str(len(skeleton)).encode() + b"\n" + skeleton)
                for block in blocks:
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            size = sum(len(block) for block in blocks)
            raise CheckpointError(
                f"could not write {size} bytes to {path} ({error}); free some space, hold fewer states "
                "(Binomial(snapshots=...)), or use Memory()."
            ) from error

    def get(self, key: str) -> Any:
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}); {AGAIN}") from error
        try:
            if not data.startswith(MAGIC):
                raise ValueError("no such header")
            found, length, rest = data[len(MAGIC) :].split(b"\n", 2)
            if hashlib.sha256(rest).hexdigest().encode() != found:
                raise ValueError("the checksum differs")
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged ({error}, {len(data)} bytes); {AGAIN}") from error
        skeleton = json.loads(rest[: int(length)])
        return unpack(_decoded(skeleton, memoryview(rest)[int(length) :]))

    def has(self, key: str) -> bool:
        if not self._path(key).exists():
            return False
        try:
            self.get(key)
        except CheckpointError:
            return False
        return True

    def drop(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        for path in self.folder.glob(f"{PREFIX}*.bin"):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{PREFIX}{key}.bin"


TENSOR = "__tensor__"


def _encoded(value: Any, tensors: list[Tensor]) -> Any:
    """Return packed nested values as JSON can hold them; tensors go to a list and leave their shape behind."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {TENSOR: str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "on": str(value.device)}
    if isinstance(value, dict):
        return {"__dict__": [[key, _encoded(child, tensors)] for key, child in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [_encoded(child, tensors) for child in value]}
    if isinstance(value, list):
        return [_encoded(child, tensors) for child in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"a state holds a {type(value).__name__}, which no file here can; use tensors and numbers.")


def _decoded(value: Any, data: memoryview) -> Any:
    """Return what `_encoded` was given; tensors are read off the data in the same order."""
    offset = 0

    def decode(node: Any) -> Any:
        nonlocal offset
        if isinstance(node, list):
            return [decode(child) for child in node]
        if not isinstance(node, dict):
            return node
        if "__dict__" in node:
            return {key: decode(child) for key, child in node["__dict__"]}
        if "__tuple__" in node:
            return tuple(decode(child) for child in node["__tuple__"])
        dtype, shape = getattr(torch, node[TENSOR]), node["shape"]
        tensor = torch.empty(shape, dtype=dtype)
        size = tensor.numel() * tensor.element_size()
        if size:
            flat = torch.frombuffer(bytearray(data[offset : offset + size]), dtype=torch.uint8)
            tensor = flat.view(dtype).view(shape)
        offset += size
        return tensor.to(node["on"])

    return decode(value)


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
