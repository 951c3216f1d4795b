"""A picture of distilled images, written as PNG without further packages."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.status import InvalidProblem

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def save_grid(
    path: str | Path, images: Tensor, *, columns: int = 10, zoom: int = 3, low: float | None = None,
    high: float | None = None,
) -> None:  # fmt: skip
    """Write gray images to a PNG file, side by side.

    Args:
        path: of the file.
        images: `[n, 1, h, w]`, or `[n, 3, h, w]` in color.
        columns: images a row, >= 1.
        zoom: pixels of the picture a pixel, >= 1.
        low: value that becomes black; the least of all images if None.
        high: value that becomes white; the greatest if None.

    Raises:
        InvalidProblem: these are no such images.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) == 0 or not bool(images.isfinite().all()):
        raise InvalidProblem(f"save_grid needs finite images [n, 1 or 3, h, w], got {list(images.shape)}.")
    if columns < 1 or zoom < 1:
        raise InvalidProblem(f"save_grid: columns and zoom must be >= 1, got {columns} and {zoom}.")
    Path(path).write_bytes(_png(_levels(grid(images, columns), low, high, zoom)))


def grid(images: Tensor, columns: int) -> Tensor:
    """Return images `[n, c, h, w]` as one `[c, H, W]`, row by row, a pixel apart, NaN where there is none."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = images.new_full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), float("nan"))
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def _levels(canvas: Tensor, low: float | None, high: float | None, zoom: int) -> Tensor:
    seen = canvas[canvas.isfinite()]
    black = float(seen.min()) if low is None else low
    white = float(seen.max()) if high is None else high
    scaled = ((canvas - black) / max(white - black, 1e-12)).clamp(0, 1).nan_to_num(0.5) * 255
    return F.interpolate(scaled[None].float(), scale_factor=zoom, mode="nearest")[0].round().to(torch.uint8)


def _png(levels: Tensor) -> bytes:
    """Return the bytes of a PNG of levels `[c, H, W]`, 0 to 255."""
    channels, height, width = levels.shape
    lines = levels.permute(1, 2, 0).reshape(height, width * channels).cpu().numpy()
    raw = b"".join(b"\0" + line.tobytes() for line in lines)
    kind = 0 if channels == 1 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw, 9)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
