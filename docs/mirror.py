"""Write the tables of the pages that mirror the code (`make pages`); a test asks that they are up to date."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from bilevel import Status

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "bilevel"


def statuses() -> str:
    """Return the table of statuses: name, whether ok, text."""
    rows = [f"| `{status.name}` | {'yes' if status.ok else 'no'} | {status.value} |" for status in Status]
    return "\n".join(["| Status | ok | Its text |", "|---|---|---|", *rows])


def house() -> str:
    """Return the table of modules, top floor first: floor, room, files, and the first line of the docstring."""
    rows = []
    for number, names in reversed(list(enumerate(_floors()))):
        for name in sorted(names):
            folder, file = PACKAGE / name, PACKAGE / f"{name}.py"
            if folder.is_dir():
                files = sorted(path.stem for path in folder.rglob("*.py") if path.stem != "__init__")
                rows.append((number, name, ", ".join(f"`{stem}`" for stem in files), folder / "__init__.py"))
            elif file.exists():
                rows.append((number, name, "", file))
    lines = [f"| {number} | `{name}` | {files} | {_first_line(path)} |" for number, name, files, path in rows]
    return "\n".join(["| Floor | Room | Files | What it is |", "|---|---|---|---|", *lines])


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "errors.md": ("statuses", statuses),
    "architecture.md": ("house", house),
}


def mirrored(page: str) -> str:
    """Return a page with its table as the code has it now."""
    name, make = TABLES[page]
    begin, end = f"<!-- {name}: written by `make pages` -->", f"<!-- end of {name} -->"
    text = (DOCS / page).read_text()
    fresh = f"{begin}\n\n{make()}\n\n{end}"
    written, times = re.subn(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: fresh, text, flags=re.DOTALL)
    if times != 1:
        raise ValueError(f"docs/{page} must hold '{begin}' and '{end}' once")
    return written


def _floors() -> list[set[str]]:
    path = DOCS.parent / "tests" / "test_architecture.py"
    spec = importlib.util.spec_from_file_location("house_rules", path)
    assert spec is not None
    assert spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    floors: list[set[str]] = rules.FLOORS
    return floors


def _first_line(path: Path) -> str:
    line = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    return line.replace("|", "\\|")


if __name__ == "__main__":
    for page in TABLES:
        (DOCS / page).write_text(mirrored(page))
