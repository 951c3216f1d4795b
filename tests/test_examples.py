"""Every example runs, in a process of its own, with warnings as errors; those that take `--small` at a smaller size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    size = ["--small"] if "--small" in path.read_text() else []
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(path), *size],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
