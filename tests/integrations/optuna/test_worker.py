"""Workers that die, sleep, lose the storage or raise: no trial is lost, and none is left running."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from sqlalchemy.exc import OperationalError

import bilevel
from bilevel.integrations.optuna import run_trials, shared_storage
from bilevel.integrations.optuna._lost import BEAT, Watch

optuna.logging.set_verbosity(optuna.logging.ERROR)
FAST = {"heartbeat": 0.02, "grace": 0.1}


def square(trial):
    return trial.suggest_float("p", -1.0, 1.0) ** 2


def opened(where):
    return optuna.create_study(
        study_name="s", storage=shared_storage(where), sampler=optuna.samplers.RandomSampler(seed=0)
    )


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return opened("journal.log")


def states(study):
    return [trial.state.name for trial in study.trials]


def begun(study):
    """Begin a trial as a worker does, and leave it."""
    trial = study.ask()
    trial.suggest_float("p", -1.0, 1.0)
    study._storage.set_trial_system_attr(trial._trial_id, BEAT, "another 7")
    return trial


def test_it_runs_as_many_trials_as_the_study_lacks(study):
    run_trials(study, square, 3, **FAST)
    run_trials(study, square, 5, **FAST)
    run_trials(study, square, 5, **FAST)
    assert states(study) == ["COMPLETE"] * 5
    assert study.best_value == min(trial.params["p"] ** 2 for trial in study.trials)


@pytest.mark.parametrize("where", ["journal.log", pytest.param("sqlite:///study.db", marks=pytest.mark.slow)])
def test_a_trial_without_a_sign_of_life_fails_and_runs_again(where, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    study = opened(where)
    lost = begun(study)
    lost.set_user_attr("checkpoint", "there.pt")
    run_trials(study, square, 2, **FAST)
    assert sorted(states(study)) == ["COMPLETE", "COMPLETE", "FAIL"]
    failed, copy = study.trials[0], next(t for t in study.trials if t.system_attrs.get("retry_history"))
    assert failed.user_attrs["reason"] == "its worker gave no sign of life for 0.1 s"
    assert copy.state.name == "COMPLETE"
    assert copy.params == failed.params
    assert copy.user_attrs["checkpoint"] == "there.pt"
    assert "reason" not in copy.user_attrs
    assert copy.system_attrs["retry_history"] == [0]
    assert "trial 0 failed: its worker gave no sign of life for 0.1 s; queued again" in caplog.text


def test_a_trial_that_is_lost_too_often_stays_failed(study):
    begun(study)
    run_trials(study, square, 1, retries=0, **FAST)
    assert states(study) == ["FAIL"]
    assert "more than the 0 retries allowed" in study.trials[0].user_attrs["reason"]


def test_a_worker_that_died_between_failing_and_queueing_is_repaired(study):
    trial = begun(study)
    trial.set_user_attr("lost", True)
    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    run_trials(study, square, 1, **FAST)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[2].params == study.trials[0].params


def test_a_living_worker_is_left_alone(study):
    alive = begun(study)
    signs = iter(range(10**6))

    def busy(trial):
        # The other worker's heart beats while this one's trial runs.
        for _ in range(6):
            study._storage.set_trial_system_attr(alive._trial_id, BEAT, f"another {next(signs)}")
            time.sleep(0.02)
        if trial.number == 2:
            study.tell(alive.number, 1.0)
        return square(trial)

    run_trials(study, busy, 3, heartbeat=0.05, grace=0.2)
    assert states(study) == ["COMPLETE"] * 3
    assert study.trials[0].value == 1.0


def test_the_result_of_a_trial_taken_for_lost_goes_to_its_copy(study, caplog):
    def slept(trial):
        p = trial.suggest_float("p", -1.0, 1.0)
        if trial.number == 0:  # meanwhile somebody else takes it for dead
            other = optuna.load_study(study_name="s", storage=study._storage)
            Watch(other, 0.0, 3).lose(other.trials[0], "asleep")
        return p**2

    run_trials(study, slept, 1, **FAST)
    assert states(study) == ["FAIL", "COMPLETE"]
    assert study.trials[1].params == study.trials[0].params
    assert study.trials[1].value == study.trials[0].params["p"] ** 2
    assert "its result goes to its copy 1" in caplog.text


def test_the_result_is_kept_where_the_copy_ran_already(study, caplog):
    def slept(trial):
        p = trial.suggest_float("p", -1.0, 1.0)
        if trial.number == 0:
            Watch(study, 0.0, 3).lose(study.trials[0], "asleep")
            study.tell(study.ask(), 0.75)
        return p**2

    run_trials(study, slept, 1, **FAST)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[2].user_attrs["late_result_of"] == 0
    assert study.trials[2].value == study.trials[0].params["p"] ** 2
    assert "its result is kept as well" in caplog.text


def test_a_report_of_a_trial_taken_for_lost_gives_it_up(study, caplog):
    def reporting(trial):
        p = trial.suggest_float("p", -1.0, 1.0)
        if trial.number == 0:
            Watch(study, 0.0, 3).lose(study.trials[0], "asleep")
        trial.report(p, 1)
        return p**2

    run_trials(study, reporting, 1, **FAST)
    assert states(study) == ["FAIL", "COMPLETE"]
    assert "given up here" in caplog.text


def test_failures_are_told_with_their_reason(study):
    def objective(trial):
        p = square(trial)
        if trial.number == 0:
            return math.nan
        if trial.number == 1:
            raise ZeroDivisionError("of p")
        if trial.number == 2:
            raise optuna.TrialPruned
        if trial.number == 3:
            return "text"
        return [p] if trial.number == 4 else p

    run_trials(study, objective, 5, catch=(ZeroDivisionError,), **FAST)
    assert states(study) == ["FAIL", "FAIL", "PRUNED", "FAIL", "COMPLETE"]
    reasons = [trial.user_attrs.get("reason") for trial in study.trials]
    assert reasons == [
        "the objective returned nan", "ZeroDivisionError('of p')", None, "the objective returned 'text'", None
    ]  # fmt: skip


def test_an_error_of_the_objective_ends_the_worker_and_is_told(study):
    def objective(trial):
        raise ZeroDivisionError("of p")

    with pytest.raises(ZeroDivisionError, match="of p"):
        run_trials(study, objective, 5, **FAST)
    assert states(study) == ["FAIL"]
    assert study.trials[0].user_attrs["reason"] == "ZeroDivisionError('of p')"


def test_an_interrupted_worker_queues_its_trial(study):
    def objective(trial):
        square(trial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trials(study, objective, 1, **FAST)
    assert states(study) == ["FAIL", "WAITING"]
    run_trials(study, square, 1, **FAST)
    assert states(study) == ["FAIL", "COMPLETE"]


def test_a_reason_given_by_the_objective_stays(study):
    def objective(trial):
        trial.set_user_attr("reason", "diverged: lower the rate")
        return math.nan

    run_trials(study, objective, 1, **FAST)
    assert study.trials[0].user_attrs["reason"] == "diverged: lower the rate"


def test_a_result_that_cannot_be_told_is_kept_and_told_again(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    study = optuna.create_study(study_name="s", storage=shared_storage("sqlite:///study.db", patience=0.1))
    holder = sqlite3.connect("study.db", check_same_thread=False)

    def objective(trial):
        value = square(trial)
        time.sleep(0.05)  # the first heartbeat gets through
        holder.execute("BEGIN EXCLUSIVE")
        return value

    with pytest.raises((optuna.exceptions.StorageInternalError, OperationalError)):
        run_trials(study, objective, 1, heartbeat=5.0, grace=10.0, spool=tmp_path / "kept.jsonl")
    assert "the storage took no result of trial 0: kept in" in caplog.text
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 1
    holder.rollback()
    holder.close()
    assert states(study) == ["RUNNING"]
    with (tmp_path / "kept.jsonl").open("a") as file:
        file.write('{"study": "s", "num')  # another writer was killed
    run_trials(study, square, 1, heartbeat=5.0, grace=10.0, spool=tmp_path / "kept.jsonl")
    assert states(study) == ["COMPLETE"]
    assert study.trials[0].value == study.trials[0].params["p"] ** 2
    assert not (tmp_path / "kept.jsonl").exists()


def test_results_of_other_studies_stay_in_the_spool(study, tmp_path):
    line = '{"study": "another", "number": 0, "state": "COMPLETE", "values": [1.0], "reason": ""}\n'
    (tmp_path / "kept.jsonl").write_text(line)
    run_trials(study, square, 1, spool=tmp_path / "kept.jsonl", **FAST)
    assert (tmp_path / "kept.jsonl").read_text() == line


def test_a_worker_can_be_stopped(study):
    def objective(trial):
        if trial.number == 1:
            study.stop()
        return square(trial)

    study.enqueue_trial({"p": 0.5})
    run_trials(study, objective, 9, **FAST)
    assert states(study) == ["COMPLETE"] * 2


def test_a_grid_ends_by_itself(study):
    grid = optuna.load_study(
        study_name="s", storage=study._storage, sampler=optuna.samplers.GridSampler({"p": [0.1, 0.2, 0.3]}, seed=0)
    )
    run_trials(grid, square, 9, **FAST)
    assert sorted(trial.params["p"] for trial in grid.trials) == [0.1, 0.2, 0.3]


def test_several_objectives(tmp_path):
    study = optuna.create_study(directions=["minimize", "maximize"])
    run_trials(study, lambda trial: (square(trial), 1.0), 2, spool=tmp_path / "kept", **FAST)
    assert all(len(trial.values) == 2 for trial in study.trials)


@pytest.mark.parametrize("bad", [{"n_trials": 0}, {"heartbeat": 0.0}, {"grace": 0.03}, {"retries": -1}])
def test_bad_options_are_refused(bad):
    with pytest.raises(bilevel.InvalidProblem, match="n_trials >= 1"):
        run_trials(optuna.create_study(), square, **({"n_trials": 1} | FAST | bad))


WORKER = """
import sys, time, optuna
from bilevel.integrations.optuna import run_trials, shared_storage
optuna.logging.set_verbosity(optuna.logging.ERROR)
def objective(trial):
    p = trial.suggest_float("p", -1.0, 1.0)
    time.sleep(float(sys.argv[2]))
    return p * p
study = optuna.load_study(study_name="s", storage=shared_storage(sys.argv[1]))
run_trials(study, objective, 6, heartbeat=0.2, grace=1.0, spool=sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["journal.log", "sqlite:///study.db"])
def test_two_processes_of_which_one_is_killed(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = optuna.create_study(study_name="s", storage=shared_storage(where))

    def start(seconds, name):
        return subprocess.Popen([sys.executable, "-c", WORKER, where, str(seconds), name])

    victim = start(60.0, "a")
    until = time.monotonic() + 60
    while "RUNNING" not in states(study) and time.monotonic() < until:
        time.sleep(0.05)
    survivor = start(0.05, "b")
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert survivor.wait(timeout=60) == 0
    assert states(study).count("COMPLETE") == 6
    assert states(study).count("FAIL") == 1
    assert len(study.trials) == 7
    lost, copy = study.trials[0], next(t for t in study.trials if t.system_attrs.get("retry_history"))
    assert copy.system_attrs["retry_history"] == [lost.number]
    assert lost.params.items() <= copy.params.items()
    assert copy.value == copy.params["p"] ** 2
    assert not Path("b").exists()


CHAOS = """
import os, random, signal, sys, time, optuna
from bilevel.integrations.optuna import run_trials, shared_storage

optuna.logging.set_verbosity(optuna.logging.ERROR)
where, chance = sys.argv[1], random.Random(0)
optuna.create_study(study_name="s", storage=shared_storage(where))


def objective(trial):
    p = trial.suggest_float("p", -1.0, 1.0)
    for step in range(4):
        trial.report(p, step)
        time.sleep(0.02)
    return p * p


def start():
    child = os.fork()
    if child:
        return child
    study = optuna.load_study(study_name="s", storage=shared_storage(where))
    run_trials(study, objective, 20, heartbeat=0.2, grace=1.5, retries=20, spool=f"spool.{os.getpid()}")
    os._exit(0)


alive, kills = {start() for _ in range(3)}, 12
while alive:
    time.sleep(chance.uniform(0.05, 0.3))
    while alive and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        alive.discard(ended[0])
        assert ended[1] in (0, signal.SIGKILL), "a worker failed"
        if ended[1]:
            alive.add(start())
    if kills and alive:
        kills -= 1
        os.kill(chance.choice(sorted(alive)), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_that_are_killed_again_and_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", CHAOS, "journal.log"], check=True, timeout=120)
    trials = optuna.load_study(study_name="s", storage=shared_storage("journal.log")).trials
    lost = {trial.number for trial in trials if "lost" in trial.user_attrs}
    copied = [trial.system_attrs["retry_history"][-1] for trial in trials if "retry_history" in trial.system_attrs]
    assert sorted(copied) == sorted(lost)  # each once
    finished = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert len(finished) + len(lost) == len(trials)
    assert 20 <= len(finished) <= 22  # three workers may begin their last trials at once
