"""A worker of a shared study: trials of workers that died are run again, and no result is lost."""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna import TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from bilevel.integrations.optuna._lost import BEAT, LOST, Watch
from bilevel.integrations.optuna._results import UNREACHABLE, Result, Spool, tell
from bilevel.status import InvalidProblem

logger = logging.getLogger(__name__)


def run_trials(
    study: Study,
    objective: Callable[[Trial], float | Sequence[float]],
    n_trials: int,
    *,
    heartbeat: float = 10.0,
    grace: float = 60.0,
    retries: int = 3,
    catch: tuple[type[Exception], ...] = (),
    spool: str | Path | None = None,
) -> None:
    """Run trials in this process until the study, over all its workers, has `n_trials`.

    What `study.optimize` does, for several processes on one storage, any of which may be killed at any time:

    - A worker shows that it lives by a heartbeat. A running trial whose heartbeat stands still for `grace` seconds, on
      the clock of who looks (clocks need not agree), is marked failed with the reason, and its parameters are queued
      again; user attributes come along, so that an objective can go on from a checkpoint of its own.
    - A worker returns when `n_trials` have ended and nothing is queued or running: while others run, it waits to see
      them end. So the last worker alive leaves no trial running.
    - The result of a trial that was marked failed meanwhile (a laptop slept, a network broke) is kept: as the result
      of its copy if that still waits, else as a further completed trial.
    - A result that the storage does not take is written to the `spool` and told when the storage answers again.

    `study.stop()` makes this worker begin no more trials but those that are queued. Failed trials count, those that
    were queued again do not. Several workers may start their last trials at once, so
    that up to one trial a worker too many is possible. All workers of a study must use this function: trials of plain
    `study.optimize` have no heartbeat, and would be taken for dead.

    Args:
        study: in a storage that all workers open (`shared_storage`).
        objective: as for `study.optimize`; one that returns NaN fails its trial.
        n_trials: of the whole study, > 0.
        heartbeat: seconds between signs of life, > 0. Each is a small write to the storage.
        grace: seconds without one until a trial counts as lost; at least twice `heartbeat`.
        retries: how often a trial may be lost; after that it stays failed.
        catch: exceptions of the objective that fail the trial only; others end this worker too.
        spool: file for results that could not be told; None: `optuna_results_<study name>.jsonl` in the working
            directory. It exists only while it holds something.

    Raises:
        InvalidProblem: an option is out of its range.
        Exception: of the objective, unless caught; the trial is then told as failed.
        StorageInternalError: the storage cannot be reached for a new trial, though it was tried patiently.
    """
    if n_trials < 1 or not heartbeat > 0 or not grace >= 2 * heartbeat or retries < 0:
        raise InvalidProblem(
            "run_trials needs n_trials >= 1, heartbeat > 0, grace >= 2 heartbeat and retries >= 0, got "
            f"{n_trials}, {heartbeat}, {grace}, {retries}."
        )
    held = Spool(Path(f"optuna_results_{study.study_name}.jsonl") if spool is None else Path(spool))
    watch = Watch(study, grace, retries)
    with _stoppable(study):
        while True:
            held.flush(study)
            unqueued = watch.recover()
            ended, running, waiting = _census(study)
            if waiting or (ended + running < n_trials and not study._stop_flag):
                _run_one(study, objective, heartbeat, catch, watch, held)
            elif running or unqueued:
                time.sleep(min(heartbeat, grace / 4))
            else:
                return


@contextmanager
def _stoppable(study: Study) -> Iterator[None]:
    """Let `study.stop()` end this worker: samplers call it when they have nothing left to propose."""
    # What `study.optimize` does; elsewhere the call raises.
    study._stop_flag, study._thread_local.in_optimize_loop = False, True
    try:
        yield
    finally:
        study._thread_local.in_optimize_loop = False


def _census(study: Study) -> tuple[int, int, int]:
    """Return how many trials ended for good, run, and wait."""
    trials = study.get_trials(deepcopy=False)
    ended = sum(trial.state.is_finished() and not _to_repeat(trial) for trial in trials)
    running = sum(trial.state is TrialState.RUNNING for trial in trials)
    return ended, running, sum(trial.state is TrialState.WAITING for trial in trials)


def _to_repeat(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.FAIL and LOST in trial.user_attrs


def _run_one(
    study: Study,
    objective: Callable[[Trial], float | Sequence[float]],
    heartbeat: float,
    catch: tuple[type[Exception], ...],
    watch: Watch,
    held: Spool,
) -> None:
    """Run one trial and tell what came out of it."""
    trial = study.ask()
    name, number, raised = study.study_name, trial.number, None
    try:
        with _beating(study, trial, heartbeat):
            result = _judged(name, number, objective(trial), len(study.directions))
    except TrialPruned:
        result = Result(name, number, TrialState.PRUNED.name)
    except UpdateFinishedTrialError:
        logger.warning("trial %d was taken for lost while it ran; it is given up here", number)
        return
    except Exception as error:
        raised = error
        result = Result(name, number, TrialState.FAIL.name, reason=repr(error))
    except BaseException:  # this worker is asked to end: the next one takes the trial over at once
        watch.lose(study.get_trials(deepcopy=False)[number], "its worker was interrupted")
        raise
    try:
        tell(study, result)
    except UNREACHABLE:
        held.keep(result)
    if raised is not None and not isinstance(raised, catch):
        raise raised


def _judged(name: str, number: int, found: Any, objectives: int) -> Result:
    """Return the result that an objective's answer makes."""
    try:
        values = [float(value) for value in (found if isinstance(found, Sequence) else [found])]
    except (TypeError, ValueError):
        return Result(name, number, TrialState.FAIL.name, reason=f"the objective returned {found!r}")
    if len(values) != objectives or any(math.isnan(value) for value in values):
        # An objective that said why (BilevelObjective) is not overruled.
        return Result(name, number, TrialState.FAIL.name, reason=f"the objective returned {found!r}")
    return Result(name, number, TrialState.COMPLETE.name, values)


@contextmanager
def _beating(study: Study, trial: Trial, heartbeat: float) -> Iterator[None]:
    """Show signs of life, from a thread of its own, until the context ends."""
    over, worker = threading.Event(), uuid.uuid4().hex[:8]

    def beat() -> None:
        count = 0
        while True:
            try:
                study._storage.set_trial_system_attr(trial._trial_id, BEAT, f"{worker} {count}")
            except UpdateFinishedTrialError:
                return
            except UNREACHABLE as error:
                logger.warning("no heartbeat of trial %d: %s", trial.number, error)
            count += 1
            if over.wait(heartbeat):
                return

    thread = threading.Thread(target=beat, name=f"heartbeat of trial {trial.number}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=1.0)  # one that waits for a database ends by itself
