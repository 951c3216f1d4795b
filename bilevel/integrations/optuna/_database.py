"""A database storage that waits while others hold the database."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from bilevel.status import InvalidProblem, MissingPackage

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
"""Seconds between attempts; each is twice the last, times a random factor, so that workers do not return together."""

DRIVERS = {"psycopg2": "psycopg2-binary", "psycopg": "'psycopg[binary]'", "MySQLdb": "mysqlclient"}
"""What `pip install` calls the drivers that are imported under another name."""

Kept = TypeVar("Kept")


def patient(call: Callable[[], Kept], patience: float) -> Kept:
    """Call until it is no longer refused by a locked or unreachable database, for up to `patience` seconds.

    Raises:
        OperationalError: the last refusal, or Optuna's StorageInternalError around it.
    """
    until, pause = time.monotonic() + patience, FIRST_PAUSE
    while True:
        try:
            return call()
        except (OperationalError, StorageInternalError) as error:
            if not _refused(error) or time.monotonic() + pause > until:
                raise
            logger.info("the database refused (%s); again in about %.2g s", error, pause)
            time.sleep(pause * random.uniform(0.5, 1.0))  # jitter, on purpose no part of any seed
            pause = min(2 * pause, LONGEST_PAUSE)


def _refused(error: BaseException) -> bool:
    return isinstance(error, OperationalError) or isinstance(error.__cause__, OperationalError)


def _unusable(url: str, error: Exception) -> Exception:
    """Return what to tell of a URL for which there is no driver; never its password."""
    cause = error.__cause__
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        shown = make_url(url).render_as_string(hide_password=True)
        return MissingPackage(
            f"{shown} needs the database driver {cause.name}: pip install {DRIVERS.get(cause.name, cause.name)}"
        )
    if isinstance(error, ArgumentError):
        return InvalidProblem(
            f"shared_storage: there is no database behind '{url.partition('://')[0]}://'. Take a path (a journal "
            "file), sqlite:///study.db, postgresql://user:password@host/name, or mysql+pymysql://user:password@host/name."
        )
    return error


class Database(BaseStorage):
    """A database storage whose calls are patient.

    Args:
        url: of the database.
        patience: seconds.

    Raises:
        MissingPackage: the driver that the URL needs is not installed.
        InvalidProblem: it is no URL of a database.
    """

    def __init__(self, url: str, patience: float) -> None:
        # SQLite would wait by itself, but in step with everybody else: its share is kept short.
        options = {"connect_args": {"timeout": min(1.0, patience)}} if url.startswith("sqlite") else {}
        self.patience = patience
        try:
            # Opening needs patience too: processes that create the same tables refuse one another.
            self.inner = patient(lambda: get_storage(RDBStorage(url, engine_kwargs=options)), patience)
        except (ArgumentError, ImportError) as error:
            raise _unusable(url, error) from error

    def _ask(self, method: Callable[..., Kept], *arguments: Any) -> Kept:
        return patient(lambda: method(*arguments), self.patience)

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        return self._ask(self.inner.create_new_study, directions, study_name)

    def delete_study(self, study_id: int) -> None:
        self._ask(self.inner.delete_study, study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._ask(self.inner.set_study_user_attr, study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._ask(self.inner.set_study_system_attr, study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._ask(self.inner.get_study_id_from_name, study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._ask(self.inner.get_study_name_from_id, study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._ask(self.inner.get_study_directions, study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._ask(self.inner.get_study_user_attrs, study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._ask(self.inner.get_study_system_attrs, study_id)

    def get_all_studies(self) -> list[Any]:
        return self._ask(self.inner.get_all_studies)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        return self._ask(self.inner.create_new_trial, study_id, template_trial)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        self._ask(self.inner.set_trial_param, trial_id, param_name, param_value_internal, distribution)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        return self._ask(self.inner.set_trial_state_values, trial_id, state, values)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._ask(self.inner.set_trial_intermediate_value, trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._ask(self.inner.set_trial_user_attr, trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._ask(self.inner.set_trial_system_attr, trial_id, key, value)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._ask(self.inner.get_trial, trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self._ask(self.inner.get_all_trials, study_id, deepcopy, states)

    def remove_session(self) -> None:
        self.inner.remove_session()
