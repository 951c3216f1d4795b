"""What a solve returns: the answer, how it ended, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.extras import extra
from bilevel.hypergradients._base import Certificate
from bilevel.layout import Variables
from bilevel.oracles import Counts
from bilevel.status import Status

COLUMNS = (
    "step", "upper_value", "stationarity", "lower_value", "lower_gradient_norm", "residual", "error_estimate",
    "linear_status", "gradients", "hvps", "crosses", "seconds",
)  # fmt: skip


class History:
    """One row a step, kept by columns: `history["upper_value"]` is a list. Rows are only ever appended."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self.xs: list[torch.Tensor] = []

    def append(self, row: dict[str, Any], x: torch.Tensor | None = None) -> None:
        """Add a row; `x` (flat, detached) is kept for the plot of hyperparameters where it is given."""
        for name, values in self._columns.items():
            values.append(row[name])
        if x is not None:
            self.xs.append(x)

    def __getitem__(self, column: str) -> list[Any]:
        """Return a column."""
        return self._columns[column]

    def __len__(self) -> int:
        return len(self._columns["step"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over rows."""
        for values in zip(*self._columns.values(), strict=True):
            yield dict(zip(self._columns, values, strict=True))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._columns)


@dataclass(frozen=True)
class Solution:
    """The answer of `solve`.

    Args:
        x: last upper variables, structured like x0.
        y: last lower variables, structured like y0.
        best_x: the x with the least upper value seen, among the x that were evaluated.
        best_y: the y that went with it.
        best_value: that upper value.
        status: how it ended; `status.value` is advice.
        message: the advice, with the numbers of this run.
        history: one row a step.
        counts: calls of the oracles, those of the final certificate included.
        seconds: wall time.
        certificate: of the hypergradient at the last x; None where the solver forms none or it could not be formed.
        state: the solver's state, from which `solve(..., resume=solution)` goes on.
    """

    x: Variables
    y: Variables
    best_x: Variables
    best_y: Variables
    best_value: float
    status: Status
    message: str
    history: History
    counts: Counts
    seconds: float
    certificate: Certificate | None
    state: Any

    def to_dataframe(self) -> Any:
        """Return the history as a pandas DataFrame (needs pandas, extra `plot`)."""
        with extra("plot", {"pandas": "pandas"}, "to_dataframe"):
            import pandas

        return pandas.DataFrame({name: self.history[name] for name in self.history.columns})

    def __str__(self) -> str:
        lines = [
            f"{self.status.name.lower()} after {len(self.history)} steps: {self.message}",
            f"best upper value {self.best_value:.6g}; {self.counts.gradients} gradients, {self.counts.hvps} HVPs, "
            f"{self.counts.crosses} cross products in {self.seconds:.2f} s",
        ]
        if self.certificate is not None:
            lines.append(f"hypergradient: {self.certificate}")
        return "\n".join(lines)
