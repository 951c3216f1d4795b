"""Machine-readable results: `{"meta": {...}, "rows": [...]}` with flat rows, and the table that people read."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def meta() -> Row:
    """Return what a figure depends on besides the code: hardware, versions, commit."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bilevel": _version(),
        "commit": _commit(),
    }


def write_json(path: str | Path, rows: Sequence[Row]) -> None:
    """Write meta and rows; numbers that are not finite become null, which every JSON reader takes."""
    document = {"meta": meta(), "rows": [{key: _plain(value) for key, value in row.items()} for row in rows]}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")


def table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Return rows as an aligned text table; missing cells are a dash.

    Example:
        >>> print(table([{"method": "cg", "error": 0.00123}, {"method": "none"}]))
        method  error
        ------  -------
        cg      0.00123
        none    -
    """
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    cells = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version() -> str | None:
    try:
        return version("bilevel")
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return found.stdout.strip() or None
