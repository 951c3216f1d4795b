"""Storage that several processes share: a journal file, SQLite, or a database server."""

from __future__ import annotations

from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage

from bilevel.integrations.optuna._database import Database
from bilevel.integrations.optuna._journal import FileLock, Journal
from bilevel.status import InvalidProblem


def shared_storage(where: str | Path, *, patience: float = 60.0, lock: FileLock | None = None) -> BaseStorage:
    """Open a storage that worker processes share.

    A path is a journal: one file that is only ever appended to, the simplest choice on one machine (or on a network
    file system, with `lock`). A URL is a database: `sqlite:///study.db` needs nothing but a file, and
    `postgresql://user:password@host/name` or `mysql+pymysql://...` a server and its driver.

    - A journal that ends in half a line, because its writer was killed, loses that line only: the next writer removes
      it. Optuna's own writer would go on in the middle of the line, and no process could read the file again.
    - A locked database is asked again, with random pauses, for `patience` seconds.

    Args:
        where: a path, or a URL with `://`.
        patience: seconds to go on trying a locked or unreachable database, >= 0.
        lock: who may write to the journal. None: a lock of the operating system, which frees it when its holder is
            killed; it holds between processes of one machine. Give Optuna's `JournalFileSymlinkLock` for processes of
            several machines on one network file system.

    Raises:
        InvalidProblem: patience < 0, a lock beside a URL, or a URL of no database.
        MissingPackage: the driver that the URL needs is not installed; the message has the line that installs it.

    Example:
        >>> import optuna, tempfile
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     study = optuna.create_study(storage=shared_storage(f"{folder}/journal.log"), study_name="rates")
        ...     study.optimize(lambda trial: trial.suggest_float("rate", 0, 1), n_trials=2)
        ...     len(optuna.load_study(study_name="rates", storage=shared_storage(f"{folder}/journal.log")).trials)
        2
    """
    if not patience >= 0:
        raise InvalidProblem(f"shared_storage(patience=...) must be >= 0 seconds, got {patience}.")
    if "://" not in str(where):
        return JournalStorage(Journal(str(where), lock))
    if lock is not None:
        raise InvalidProblem("shared_storage(lock=...) is for journal files; a database locks by itself.")
    return Database(str(where), patience)
