"""Trials whose worker died: found by a heartbeat that stands still, failed, and queued again."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

logger = logging.getLogger(__name__)

BEAT = "bilevel:beat"
"""The system attribute that a running trial's worker changes at every heartbeat."""

LOST = "lost"
"""The user attribute of a failed trial that was, or is to be, queued again."""

REASON = "reason"
"""The user attribute of a failed trial that says why it failed."""

HISTORY = "retry_history"
"""The system attribute of a copy: the numbers of the lost trials before it, as Optuna's own retries name them."""


class Watch:
    """One worker's view of the others.

    Args:
        study: what they work on.
        grace: seconds for which a heartbeat may stand still, on this worker's clock.
        retries: how often a trial may be lost and queued again.
    """

    def __init__(self, study: Study, grace: float, retries: int) -> None:
        self.study, self.grace, self.retries = study, grace, retries
        self._seen: dict[Hashable, tuple[Any, float]] = {}

    def recover(self) -> int:
        """Fail trials of dead workers and queue them again; return how many failed ones have no copy yet."""
        trials = self.study.get_trials(deepcopy=False)
        copied = {number for trial in trials for number in trial.system_attrs.get(HISTORY, [])}
        waiting = 0
        for trial in trials:
            if trial.state is TrialState.RUNNING:
                if self._stands_still(trial.number, trial.system_attrs.get(BEAT)):
                    self.lose(trial, f"its worker gave no sign of life for {self.grace:g} s")
            elif trial.state is TrialState.FAIL and LOST in trial.user_attrs and trial.number not in copied:
                # Who failed it queues it at once, unless it died in between.
                if self._stands_still(("copy", trial.number), None):
                    self._queue(trial)
                else:
                    waiting += 1
        return waiting

    def lose(self, trial: FrozenTrial, why: str) -> None:
        """Fail a running trial and queue its copy; nothing happens where somebody else ended it."""
        times = len(trial.system_attrs.get(HISTORY, [])) + 1
        again = times <= self.retries
        reason = why if again else f"{why}; lost {times} times, which is more than the {self.retries} retries allowed"
        storage = self.study._storage
        try:
            storage.set_trial_user_attr(trial._trial_id, REASON, reason)
            if again:
                storage.set_trial_user_attr(trial._trial_id, LOST, True)
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return
        logger.warning("trial %d failed: %s%s", trial.number, reason, "; queued again" if again else "")
        if again:
            self._queue(trial)

    def _queue(self, trial: FrozenTrial) -> None:
        attributes = {key: value for key, value in trial.system_attrs.items() if key != BEAT}
        history = [*attributes.get(HISTORY, []), trial.number]
        copy = create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={key: value for key, value in trial.user_attrs.items() if key not in (LOST, REASON)},
            system_attrs=attributes | {"failed_trial": history[0], HISTORY: history},
        )
        self.study.add_trial(copy)

    def _stands_still(self, key: Hashable, sign: Any) -> bool:
        now = time.monotonic()
        known = self._seen.get(key)
        if known is None or known[0] != sign:
            self._seen[key] = (sign, now)
            return False
        return now - known[1] >= self.grace
