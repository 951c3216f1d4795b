"""A journal file that survives the death of its writers."""

from __future__ import annotations

import logging
import os
from typing import Any, Protocol

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

try:
    import fcntl
except ImportError:  # not on this system: Optuna's lock, which has to time out when its holder dies
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class FileLock(Protocol):
    """What a lock of a file does, as Optuna's locks do."""

    def acquire(self) -> bool:
        """Wait for the lock."""

    def release(self) -> None:
        """Free the lock."""


class Flock:
    """A lock of the operating system on a file beside the journal: it goes with the process that holds it."""

    def __init__(self, path: str) -> None:
        self.path = path + ".flock"
        self._held: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException:
            os.close(descriptor)
            raise
        self._held = descriptor
        return True

    def release(self) -> None:
        """Free the lock."""
        held, self._held = self._held, None
        if held is not None:
            os.close(held)


def lock_of(path: str) -> FileLock:
    """Return a lock for the writers of a file."""
    return JournalFileOpenLock(path) if fcntl is None else Flock(path)


class Journal(JournalFileBackend):
    """Optuna's journal file, without the half line that a killed writer leaves.

    A writer was killed inside an append; what it began was acknowledged to nobody. The next writer holds the lock, so
    that no append is under way, and cuts the file at its last full line before it adds its own.
    """

    def __init__(self, path: str, lock: FileLock | None = None) -> None:
        super().__init__(path, Mending(path, lock or lock_of(path)))  # type: ignore[arg-type]


class Mending:
    """A lock that mends the file's end each time it is taken."""

    def __init__(self, path: str, lock: FileLock) -> None:
        self.path, self.lock = path, lock

    def acquire(self) -> bool:
        """Take the lock, and leave the file ending in a full line."""
        taken = self.lock.acquire()
        try:
            mend(self.path)
        except BaseException:
            self.lock.release()
            raise
        return taken

    def release(self) -> None:
        """Free the lock."""
        self.lock.release()


def mend(path: str) -> None:
    """Cut a file after its last full line; the caller holds the lock of its writers."""
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end == 0 or _ends_a_line(file, end):
            return
        file.seek(0)
        kept = file.read().rfind(b"\n") + 1
        logger.warning("%s ended in half a line of %d bytes, whose writer was killed: removed", path, end - kept)
        file.truncate(kept)
        file.flush()
        os.fsync(file.fileno())


def _ends_a_line(file: Any, end: int) -> bool:
    file.seek(end - 1)
    return bool(file.read(1) == b"\n")
