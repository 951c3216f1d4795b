"""Pictures of letters in twelve typefaces, drawn from the DejaVu fonts that matplotlib brings."""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bilevel.extras import extra
from bilevel.status import InvalidProblem

GLYPHS = "DejaVu fonts (Bitstream Vera licence, changes in the public domain), as shipped by matplotlib (PSF-like)"
FACES = (
    "Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique", "SansMono", "SansMono-Bold", "SansMono-Oblique",
    "SansMono-BoldOblique", "Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic",
)  # fmt: skip
TRAIN, TEST = ("LATIN", "GREEK", "CYRILLIC"), ("ARMENIAN", "GEORGIAN")
VALIDATION = 0.2
"""Share of the letters of the training scripts that is held out to choose by."""
FILLED = 0.75
"""Size of the type, relative to the picture."""


class Letters(NamedTuple):
    """Letters as `[letters, 12, size, size]`, float32 in [0, 1]: each in twelve faces, black on white inverted.

    No picture is that of another letter, whatever the split.
    """

    train: Tensor
    validation: Tensor
    test: Tensor


@cache
def letters(size: int = 16) -> Letters:
    """Draw the letters that all twelve faces have: Latin, Greek and Cyrillic ones to learn on, others to test.

    The others are Armenian and Georgian. A fifth of the first, chosen at random but always the same, is held out to
    validate. Letters that do not fit the picture are left out, and so are those that look in any face exactly like an
    earlier one (A, Alpha): two classes of a task always differ, and no letter of one split is in another.

    Args:
        size: height and width in pixels, at least 8.

    Raises:
        InvalidProblem: matplotlib is not installed, or the size is too small.
    """
    if size < 8:
        raise InvalidProblem(f"letters of {size} pixels cannot be told apart; size must be at least 8.")
    fonts = _fonts(size)
    seen: set[tuple[int, bytes]] = set()
    known, unknown = (_drawn(fonts, scripts, size, seen) for scripts in (TRAIN, TEST))
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    held = round(VALIDATION * len(known))
    return Letters(known[order[held:]], known[order[:held]], unknown)


def _fonts(size: int) -> list[Any]:
    with extra("plot", {"matplotlib": "matplotlib"}, "drawing the letters"):
        import matplotlib
        from matplotlib.ft2font import FT2Font
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [FT2Font(str(folder / f"DejaVu{face}.ttf")) for face in FACES]
    for font in fonts:
        font.set_size(FILLED * size, 72)  # at 72 dots an inch a point is a pixel
    return fonts


def _drawn(fonts: list[Any], scripts: tuple[str, ...], size: int, seen: set[tuple[int, bytes]]) -> Tensor:
    common = set.intersection(*(set(font.get_charmap()) for font in fonts))
    found = []
    for code in sorted(common):
        letter = chr(code)
        if not unicodedata.category(letter).startswith("L") or unicodedata.name(letter, "").split()[0] not in scripts:
            continue
        pictures = [_picture(font, letter, size) for font in fonts]
        if any(picture is None for picture in pictures):
            continue
        keys = {(face, picture.tobytes()) for face, picture in enumerate(pictures) if picture is not None}
        if keys & seen:
            continue
        seen |= keys
        found.append(np.stack([picture for picture in pictures if picture is not None]))
    return torch.tensor(np.stack(found), dtype=torch.float32) / 255


def _picture(font: Any, letter: str, size: int) -> np.ndarray[Any, Any] | None:
    """Return a letter in the middle of a picture, None where it does not fit."""
    font.set_text(letter, 0.0)
    font.draw_glyphs_to_bitmap(antialiased=True)
    ink = np.asarray(font.get_image())
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if len(rows) == 0:
        return None
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink.shape
    if height > size or width > size:
        return None
    top, left = (size - height) // 2, (size - width) // 2
    return np.pad(ink, ((top, size - height - top), (left, size - width - left)))
