"""Shared storage: a journal whose writer was killed, a database that is locked, or whose driver is missing."""

import re
import sqlite3
import sys
import threading

import optuna
import pytest
from optuna.storages import JournalStorage
from sqlalchemy.exc import OperationalError

import bilevel
from bilevel.integrations.optuna import run_trials, shared_storage
from bilevel.integrations.optuna._database import Database, patient
from bilevel.integrations.optuna._journal import Flock

optuna.logging.set_verbosity(optuna.logging.ERROR)


def square(trial):
    return trial.suggest_float("p", -1.0, 1.0) ** 2


def opened(where, **options):
    storage = shared_storage(where, **options)
    return optuna.create_study(study_name="s", storage=storage, load_if_exists=True)


def half_a_line(path):
    """Cut the last record of a journal in the middle, as a writer does that is killed."""
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[: (last + len(whole)) // 2])


def test_optuna_alone_cannot_read_on_after_half_a_line(tmp_path):
    # The fault that the next test is about: when Optuna mends it, `Journal` can go.
    path = tmp_path / "journal.log"
    backend = optuna.storages.journal.JournalFileBackend
    study = optuna.create_study(storage=optuna.storages.JournalStorage(backend(str(path))))
    study.optimize(square, n_trials=2)
    half_a_line(path)
    with pytest.raises((ValueError, AssertionError)):
        optuna.create_study(storage=optuna.storages.JournalStorage(backend(str(path)))).optimize(square, n_trials=1)


def test_half_a_line_is_dropped_and_the_journal_goes_on(tmp_path):
    path = tmp_path / "journal.log"
    opened(path).optimize(square, n_trials=2)
    half_a_line(path)
    assert [trial.state.name for trial in opened(path).trials] == ["COMPLETE", "RUNNING"]  # reading needs no mending
    other = opened(path)  # opened before the mending, and goes on after it
    study = opened(path)
    study.optimize(square, n_trials=1)
    other.optimize(square, n_trials=1)
    states = [trial.state.name for trial in opened(path).trials]
    assert states == ["COMPLETE", "RUNNING", "COMPLETE", "COMPLETE"]
    # Optuna reads it too: the dashboard opens it.
    plain = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    assert [trial.state.name for trial in optuna.load_study(study_name="s", storage=plain).trials] == states


def test_a_journal_of_half_a_line_only(tmp_path):
    path = tmp_path / "journal.log"
    path.write_bytes(b'{"op_code":0,"wor')
    opened(path).optimize(square, n_trials=1)
    assert len(opened(path).trials) == 1


def test_another_lock_may_be_given(tmp_path):
    path = tmp_path / "journal.log"
    lock = optuna.storages.journal.JournalFileSymlinkLock(str(path))
    opened(path, lock=lock).optimize(square, n_trials=1)
    half_a_line(path)
    opened(path, lock=lock).optimize(square, n_trials=1)
    assert len(opened(path, lock=lock).trials) == 2
    assert not path.with_name("journal.log.flock").exists()


def test_the_lock_excludes_and_is_freed(tmp_path):
    one, other, order = Flock(str(tmp_path / "f")), Flock(str(tmp_path / "f")), []
    one.acquire()
    thread = threading.Thread(target=lambda: (other.acquire(), order.append("other"), other.release()))
    thread.start()
    thread.join(timeout=0.05)
    assert thread.is_alive()
    order.append("one")
    one.release()
    thread.join()
    assert order == ["one", "other"]


@pytest.mark.slow
def test_a_locked_database_is_asked_again(tmp_path):
    study = opened(f"sqlite:///{tmp_path}/study.db", patience=30.0)
    holder = sqlite3.connect(tmp_path / "study.db", check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(1.5, holder.rollback)  # longer than SQLite itself waits
    timer.start()
    study.optimize(square, n_trials=1)
    timer.join()
    holder.close()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"]


def test_patience_ends():
    calls = []

    def refused():
        calls.append(1)
        raise optuna.exceptions.StorageInternalError from sqlalchemy_error

    sqlalchemy_error = OperationalError("BEGIN", None, Exception("locked"))
    with pytest.raises(optuna.exceptions.StorageInternalError):
        patient(refused, 0.3)
    assert 2 <= len(calls) <= 5


def test_only_refusals_are_tried_again():
    calls = []

    def broken():
        calls.append(1)
        raise optuna.exceptions.StorageInternalError("bad data")

    with pytest.raises(optuna.exceptions.StorageInternalError):
        patient(broken, 10.0)
    assert len(calls) == 1


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(bilevel.InvalidProblem, match="patience"):
        shared_storage(tmp_path / "journal.log", patience=-1.0)
    with pytest.raises(bilevel.InvalidProblem, match="journal files"):
        shared_storage("sqlite://", lock=Flock(str(tmp_path / "f")))


@pytest.mark.parametrize(
    ("url", "driver", "line"),
    [
        ("postgresql+psycopg2://me:secret@host/name", "psycopg2", "pip install psycopg2-binary"),
        ("postgresql+psycopg://me:secret@host/name", "psycopg", "pip install 'psycopg[binary]'"),
        ("mysql+pymysql://me:secret@host/name", "pymysql", "pip install pymysql"),
        ("mysql://me:secret@host/name", "MySQLdb", "pip install mysqlclient"),
    ],
)
def test_the_driver_of_a_server_that_is_missing_is_named(url, driver, line, monkeypatch):
    monkeypatch.setitem(sys.modules, driver, None)  # also where it is installed
    with pytest.raises(
        bilevel.MissingPackage, match=f"needs the database driver {driver}: {re.escape(line)}"
    ) as caught:
        shared_storage(url)
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("url", ["redis://host", "sqlite+nosuch:///study.db", "://study"])
def test_what_is_no_database_is_refused(url):
    with pytest.raises(bilevel.InvalidProblem, match=r"no database behind .* Take a path"):
        shared_storage(url)


def test_a_url_is_a_database_and_a_path_a_journal(tmp_path):
    for where, kind in ((f"sqlite:///{tmp_path}/study.db", Database), (str(tmp_path / "journal.log"), JournalStorage)):
        storage = shared_storage(where)
        assert type(storage) is kind
        study = optuna.create_study(study_name="s", storage=storage)
        run_trials(study, square, 3)
        again = optuna.load_study(study_name="s", storage=shared_storage(where))
        assert [trial.state.name for trial in again.trials] == ["COMPLETE"] * 3
        assert again.best_value == study.best_value
    assert (tmp_path / "study.db").stat().st_size > 0
    assert (tmp_path / "journal.log").stat().st_size > 0
