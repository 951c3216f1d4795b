"""What all tests share: one thread a worker, the devices of this machine, a generator, and how pages are run."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Two workers with two threads each would fight over two cores, and sums would depend on the number of threads.
torch.set_num_threads(1)

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Take memory addresses out of test ids (values that hold a function): workers must collect the same ids."""
    plain = metafunc.parametrize

    def parametrize(*args: Any, ids: Any = None, **options: Any) -> None:
        made = ids
        if callable(ids):
            made = lambda value: ADDRESS.sub("", str(ids(value)))  # noqa: E731
        plain(*args, ids=made, **options)

    metafunc.parametrize = parametrize  # type: ignore[method-assign]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Each kind of device that a contract must hold on; `cuda` is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator: tests draw from it, never from the global random state."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def run_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, Any]]:
    """Return a function that runs all python blocks of a Markdown page, in order and in one namespace.

    A block with prompts is a doctest: what it shows must be what it prints. Files go to a temporary folder.
    """
    monkeypatch.chdir(tmp_path)

    def run(page: Path) -> dict[str, Any]:
        text, names = page.read_text(), {"__name__": "__page__"}
        for found in PROGRAM.finditer(text):
            block, line = found.group(1), text.count("\n", 0, found.start(1))
            if block.startswith(">>>"):
                examples = doctest.DocTestParser().get_doctest(block, names, page.name, str(page), line)
                runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
                report: list[str] = []
                runner.run(examples, out=report.append, clear_globs=False)
                assert runner.failures == 0, "".join(report)
                names.update(examples.globs)
            else:
                # Blank lines above, so that a traceback shows the line of the page.
                exec(compile("\n" * line + block, str(page), "exec"), names)
        return names

    return run
