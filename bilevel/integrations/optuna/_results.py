"""Results on their way into the study: told, told late, or kept in a file until the storage answers."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import OperationalError

from bilevel.integrations.optuna._journal import lock_of
from bilevel.integrations.optuna._lost import HISTORY, LOST, REASON

logger = logging.getLogger(__name__)

UNREACHABLE = (StorageInternalError, OperationalError)
"""What a storage raises that cannot be reached."""


@dataclass(frozen=True)
class Result:
    """What came out of a trial.

    Args:
        study: name of the study.
        number: of the trial.
        state: COMPLETE, PRUNED or FAIL.
        values: one for each objective; None unless complete.
        reason: why it failed, "" otherwise.
    """

    study: str
    number: int
    state: str
    values: list[float] | None = None
    reason: str = ""


def tell(study: Study, result: Result) -> None:
    """Store a result; that of a trial which was marked failed meanwhile is kept elsewhere in the study.

    Raises:
        StorageInternalError: the storage cannot be reached, or OperationalError.
    """
    trial = study.get_trials(deepcopy=False)[result.number]
    if trial.state is TrialState.RUNNING:
        try:
            if result.reason and REASON not in trial.user_attrs:
                study._storage.set_trial_user_attr(trial._trial_id, REASON, result.reason)
            study.tell(result.number, result.values, state=TrialState[result.state])
            return
        except (ValueError, UpdateFinishedTrialError):
            trial = study.get_trials(deepcopy=False)[result.number]
            if not trial.state.is_finished():
                raise
    if trial.state is TrialState.FAIL and result.state == TrialState.COMPLETE.name:
        _tell_late(study, trial, result)
    else:
        logger.warning("trial %d had ended (%s) when told %s", trial.number, trial.state.name, result.state)


def _tell_late(study: Study, trial: FrozenTrial, result: Result) -> None:
    """Keep the result of a trial that was taken for lost: its waiting copy takes it, else a further trial."""
    for copy in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if trial.number in copy.system_attrs.get(HISTORY, []) and _claimed(study, copy):
            logger.warning("trial %d was taken for lost: its result goes to its copy %d", trial.number, copy.number)
            study.tell(copy.number, result.values)
            return
    logger.warning("trial %d was taken for lost, and its copy runs or ran: its result is kept as well", trial.number)
    study.add_trial(
        create_trial(
            values=result.values,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={k: v for k, v in trial.user_attrs.items() if k not in (LOST, REASON)}
            | {"late_result_of": trial.number},
            intermediate_values=trial.intermediate_values,
        )
    )


def _claimed(study: Study, copy: FrozenTrial) -> bool:
    try:
        return study._storage.set_trial_state_values(copy._trial_id, TrialState.RUNNING)
    except UpdateFinishedTrialError:
        return False


@dataclass(frozen=True)
class Spool:
    """A local file of results that could not be told, one line each; there only while it holds something."""

    path: Path

    def keep(self, result: Result) -> None:
        """Add a result."""
        lock = lock_of(str(self.path))
        lock.acquire()
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                os.fsync(file.fileno())
        finally:
            lock.release()
        logger.warning("the storage took no result of trial %d: kept in %s", result.number, self.path)

    def flush(self, study: Study) -> None:
        """Tell what is kept, if the storage answers; results of other studies stay."""
        if not self.path.exists():
            return
        lock = lock_of(str(self.path))
        lock.acquire()
        try:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            left = [line for line in lines if not _told(study, line)]
            if left:
                self.path.write_text("".join(line + "\n" for line in left))
            else:
                self.path.unlink(missing_ok=True)
        finally:
            lock.release()


def _told(study: Study, line: str) -> bool:
    """Return whether a line of a spool is done with."""
    try:
        result = Result(**json.loads(line))
    except (ValueError, TypeError):
        logger.warning("half a line in a spool, whose writer was killed: %r", line)
        return True
    if result.study != study.study_name:
        return False
    try:
        tell(study, result)
    except UNREACHABLE:
        return False
    logger.info("told the result of trial %d, which was kept", result.number)
    return True
