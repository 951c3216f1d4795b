"""Sphinx configuration: furo, Markdown pages, and docstrings as they stand in the code."""

from __future__ import annotations

import re
from importlib.metadata import version as installed
from typing import Any

project = "bilevel"
author = "The bilevel developers"
copyright = "The bilevel developers"
version = release = installed("bilevel")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"bilevel {version}"
default_role = "code"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Cost"]

SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Cost|Notes|References|Example|Examples|Attributes):$")
SPECIAL = re.compile(r"(`[^`]*`)|([*|\\]|\w_(?=\W|$))")


def _escaped(line: str) -> str:
    """Escape what reStructuredText would read as markup, outside of code."""
    return SPECIAL.sub(lambda found: found.group(1) or re.sub(r"([*|\\_])", r"\\\1", found.group(2)), line)


def prepare_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn docstrings, written to be read as text, into reStructuredText before napoleon sees them.

    Indented paragraphs outside of sections are formulas: literal blocks. Doctests stay as they are.
    """
    prepared: list[str] = []
    section = formula = doctest = False
    for line in lines:
        indented, empty = line.startswith("    "), not line.strip()
        if not empty and not indented:
            section, formula = bool(SECTION.match(line)), False
        if not section and indented and not formula and (not prepared or not prepared[-1].strip()):
            prepared += ["::", ""]
            formula = True
        doctest = not empty and (doctest or line.lstrip().startswith(">>>"))
        prepared.append(line if formula or doctest else _escaped(line))
    lines[:] = prepared


def mend_property(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Undo napoleon where it took the first words of a property, up to a colon, for a type."""
    kinds = [line for line in lines if line.startswith(":type: ")]
    if what == "property" and kinds:
        first = next(index for index, line in enumerate(lines) if line.strip())
        lines[first] = f"{kinds[0].removeprefix(':type: ')}: {lines[first]}"
        lines.remove(kinds[0])


def setup(app: Any) -> None:
    """Register what comes before and after napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)
    app.connect("autodoc-process-docstring", mend_property, priority=600)
