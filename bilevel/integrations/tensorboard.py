"""A solve, as TensorBoard shows it. Needs the extra `tensorboard`."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any

from bilevel.callbacks import Event
from bilevel.extras import extra
from bilevel.layout import named_leaves
from bilevel.status import InvalidProblem

with extra("tensorboard", {"tensorboard": "TensorBoard"}, "bilevel.integrations.tensorboard"):
    from torch.utils.tensorboard import SummaryWriter

SCALARS = 16
"""Largest leaf of x whose entries are drawn one by one; larger ones are drawn as histograms."""

GROUPS = {
    "upper_value": "objective", "lower_value": "objective", "stationarity": "convergence",
    "lower_gradient_norm": "convergence", "residual": "convergence", "error_estimate": "convergence",
    "gradients": "cost", "hvps": "cost", "crosses": "cost", "seconds": "cost",
}  # fmt: skip
"""Where each column of the history is drawn."""


class TensorBoard:
    """Write each step of a solve to a folder: `tensorboard --logdir FOLDER` shows it as it runs.

    Objectives, convergence and cost are curves (numbers that are not known, NaN, are left out), and x is drawn entry
    by entry, or as a histogram where it has many.

    Args:
        folder: one for each run; a folder of such folders is what TensorBoard compares.
        every: write every so many steps, >= 1.

    Raises:
        InvalidProblem: `every` < 1.

    Example:
        >>> import bilevel, tempfile
        >>> task = bilevel.problems.scalar()
        >>> with tempfile.TemporaryDirectory() as folder, TensorBoard(folder) as board:
        ...     solution = bilevel.solve(
        ...         task.problem, bilevel.implicit(), task.x0, task.y0, steps=5, callbacks=[board])
    """

    def __init__(self, folder: str | Path, *, every: int = 1) -> None:
        if every < 1:
            raise InvalidProblem(f"TensorBoard(every=...) must be >= 1, got {every}.")
        self.every = every
        self.writer: Any = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        """Write a step."""
        if event.step % self.every:
            return
        for name, group in GROUPS.items():
            value = float(event.row[name])
            if math.isfinite(value):
                self.writer.add_scalar(f"{group}/{name}", value, event.step)
        for name, leaf in named_leaves(event.x):
            tag = f"x/{name}".replace(".", "/").rstrip("/")
            if leaf.numel() > SCALARS:
                self.writer.add_histogram(tag, leaf.detach().cpu(), event.step)
                continue
            for k, value in enumerate(leaf.detach().flatten().tolist()):
                self.writer.add_scalar(f"{tag}/{k}" if leaf.dim() else tag, value, event.step)
        self.writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self.writer.close()

    def __enter__(self) -> TensorBoard:
        """Return the callback."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Finish the file."""
        self.close()
