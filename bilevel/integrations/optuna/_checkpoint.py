"""The state of a trial's solve in a file, so that the copy of a lost trial goes on where its worker died."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optuna.trial import Trial

from bilevel.callbacks import Event
from bilevel.integrations.optuna._lost import HISTORY
from bilevel.oracles import Counts
from bilevel.packing import pack, unpack
from bilevel.solution import History, Solution
from bilevel.status import Status

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A file for one trial and its copies, replaced as a whole each time: a killed writer leaves the one before.

    Args:
        path: of the file.
        every: write every so many steps.
    """

    path: Path
    every: int

    @classmethod
    def of(cls, trial: Trial, folder: Path, every: int) -> Checkpoint:
        """Return the file of a trial; copies share that of the trial that was lost first."""
        attributes = trial.study._storage.get_trial_system_attrs(trial._trial_id)
        first = attributes.get(HISTORY, [trial.number])[0]
        name = trial.study.study_name.replace(os.sep, "_")
        return cls(folder / f"{name}_{first}.pt", every)

    def __call__(self, event: Event) -> None:
        """Write the solver's state: a callback."""
        if event.step % self.every:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}")
        counts = {name: int(event.row[name]) for name in ("gradients", "hvps", "crosses")}
        with partial.open("wb") as file:
            torch.save({"state": pack(event.state), "counts": counts}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def load(self, trial: Trial) -> Solution | None:
        """Return what a solve goes on from; None where there is nothing, or nothing that can be read."""
        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, weights_only=True)
            state, counts = unpack(saved["state"]), Counts(**saved["counts"])
        except Exception as error:  # whatever is wrong with a file, starting over is right
            logger.warning("trial %d starts over: %s cannot be read (%s)", trial.number, self.path, error)
            return None
        logger.info("trial %d goes on from step %d", trial.number, state.step)
        return _standing(state, counts)

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _standing(state: Any, counts: Counts) -> Solution:
    """Return a solution that says no more than where a solver stands."""
    return Solution(
        x=None, y=None, best_x=None, best_y=None, best_value=math.nan, status=Status.STOPPED, message="",
        history=History(), counts=counts, seconds=0.0, certificate=None, state=state,
    )  # fmt: skip
