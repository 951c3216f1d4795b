"""A progress bar on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from typing import Any


class Bar:
    """A tqdm bar on a terminal where tqdm is installed, nothing elsewhere."""

    def __init__(self, total: int, progress: bool | None) -> None:
        self._bar: Any = None
        if progress is None and not sys.stderr.isatty():
            return
        if progress is not False:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, leave=False)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, row: dict[str, Any]) -> None:
        """Advance by one step, showing the newest row of the history."""
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix(f=f"{row['upper_value']:.4g}", h=f"{row['stationarity']:.2g}")
