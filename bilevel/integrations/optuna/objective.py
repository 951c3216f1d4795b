"""Mixed search: Optuna suggests the structure, hypergradients tune the numbers inside each trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, final

from optuna import TrialPruned
from optuna.study import StudyDirection
from optuna.trial import Trial

from bilevel.callbacks import Callback, Event
from bilevel.integrations.optuna._checkpoint import Checkpoint
from bilevel.integrations.optuna.export import facts
from bilevel.layout import Variables, named_leaves, rebuild
from bilevel.loop import solve
from bilevel.plan import Auto
from bilevel.problem import Problem
from bilevel.problems import Task
from bilevel.solution import Solution
from bilevel.solvers import HypergradientDescent
from bilevel.solvers._base import Solver
from bilevel.status import BilevelError, InvalidProblem, Status

Stated: TypeAlias = Task | tuple[Problem, Variables, Variables | None]

USELESS = frozenset({
    Status.DIVERGED, Status.NON_FINITE, Status.INFEASIBLE, Status.CQ_FAILURE,
    Status.NEGATIVE_CURVATURE, Status.SINGULAR, Status.BREAKDOWN,
})  # fmt: skip
"""Statuses whose best value is no answer; limits (steps, time, calls) and stalls leave a usable one."""

KEPT = 256
"""Largest x that is stored with a trial."""


@final
@dataclass(frozen=True)
class BilevelObjective:
    """An objective for `study.optimize` in which each trial is a whole solve.

        F(s) = min over x of f_s(x, y*(x))          s: what the trial suggests (kinds, widths, on or off)

    A trial stores `status`, `message`, `best_x` (up to 256 numbers), `hypergradient_error` and its counts in its
    `user_attrs`. A solve that ends without a usable answer makes a failed trial whose `user_attrs["reason"]` says why;
    the study goes on.

    Args:
        build: trial -> a `Task`, or `(problem, x0, y0)`. Suggestions are made here.
        solver: how, or trial -> how; "auto" plans for each trial's problem. None: `HypergradientDescent()`.
        steps: upper steps; None takes those of the task (100 where there is none).
        value: solution -> what the study optimizes, a number or a sequence of them: a loss on a split of its own, say.
            None: the best upper value.
        monitor: event -> the intermediate value that pruners compare; None: the upper value.
        report: report intermediate values, and prune where the study's pruner says so (studies of one objective).
        callbacks: further ones, as for `bilevel.solve`.
        checkpoint: folder for the solver's state, so that the copy of a trial whose worker died goes on where that one
            stood (what it had seen as best is not kept). A folder that all workers see. None: copies start over.
        checkpoint_every: steps between two writes, >= 1.
        options: further arguments of `bilevel.solve`, such as `tol`, `max_seconds`, `seed`.

    Raises:
        InvalidProblem: the problem is misstated, or the study maximizes and `value` or `monitor` is missing, since
            upper values are minimized.

    Example:
        >>> import optuna, torch
        >>> def build(trial):
        ...     power = trial.suggest_categorical("power", [2, 4])
        ...     problem = Problem(
        ...         upper=lambda x, y, batch: (y - 1.0) ** power + 0.1 * power,
        ...         lower=lambda x, y, batch: (y - x).square())
        ...     return problem, torch.zeros(()), torch.zeros(())
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> study = optuna.create_study(sampler=optuna.samplers.GridSampler({"power": [2, 4]}))
        >>> study.optimize(BilevelObjective(build, steps=60), n_trials=2)
        >>> study.best_params
        {'power': 2}
    """

    build: Callable[[Trial], Stated]
    solver: Solver[Any] | Auto | Callable[[Trial], Solver[Any] | Auto] | None = None
    steps: int | None = None
    value: Callable[[Solution], Any] | None = None
    monitor: Callable[[Event], float] | None = None
    report: bool = True
    callbacks: Sequence[Callback] = ()
    checkpoint: str | Path | None = None
    checkpoint_every: int = 10
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise InvalidProblem(f"BilevelObjective(checkpoint_every=...) must be >= 1, got {self.checkpoint_every}.")

    def __call__(self, trial: Trial) -> Any:
        """Return the trial's value, NaN where the solve has no answer: Optuna then counts the trial as failed.

        Raises:
            optuna.TrialPruned: the pruner says so.
        """
        directions = trial.study.directions
        if self.value is None and directions != [StudyDirection.MINIMIZE]:
            raise InvalidProblem(
                "the study does not minimize one number, as upper objectives are: give BilevelObjective(value=...), a "
                "function of the solution."
            )
        callbacks: list[Callback] = [*self.callbacks]
        if self.report and len(directions) == 1:
            callbacks.append(report_callback(trial, self.monitor))
        problem, x0, y0, steps = self._stated(trial)
        options = {"progress": False} | dict(self.options)
        saved = None
        if self.checkpoint is not None:
            saved = Checkpoint.of(trial, Path(self.checkpoint), self.checkpoint_every)
            callbacks.insert(0, saved)
            resume = saved.load(trial)
            if resume is not None:
                options["resume"], steps = resume, max(1, steps - resume.state.step)
        try:
            solution = solve(problem, self._solver(trial), x0, y0, steps=steps, callbacks=callbacks, **options)
        except InvalidProblem:
            raise
        except (BilevelError, TrialPruned) as error:
            _forget(saved)
            if isinstance(error, TrialPruned):
                raise
            return _failed(trial, f"{type(error).__name__}: {error}", len(directions))
        _forget(saved)
        _store(trial, solution)
        if solution.status in USELESS:
            return _failed(trial, f"{solution.status.name.lower()}: {solution.message}", len(directions))
        found = solution.best_value if self.value is None else self.value(solution)
        numbers = [float(number) for number in (found if isinstance(found, list | tuple) else [found])]
        if any(math.isnan(number) for number in numbers):
            return _failed(trial, f"the value is {found}", len(directions))
        return numbers if len(numbers) > 1 else numbers[0]

    def _stated(self, trial: Trial) -> tuple[Problem, Variables, Variables | None, int]:
        stated = self.build(trial)
        if isinstance(stated, Task):
            return stated.problem, stated.x0, stated.y0, stated.steps if self.steps is None else self.steps
        if not isinstance(stated, tuple) or len(stated) != 3:
            raise InvalidProblem(f"build must return a Task or (problem, x0, y0), got {type(stated).__name__}.")
        return *stated, 100 if self.steps is None else self.steps

    def _solver(self, trial: Trial) -> Solver[Any] | Auto:
        if self.solver is None:
            return HypergradientDescent()
        return self.solver if isinstance(self.solver, Solver | str) else self.solver(trial)


def report_callback(trial: Trial, monitor: Callable[[Event], float] | None = None, *, every: int = 1) -> Callback:
    """Return a callback for `bilevel.solve` that reports to a trial, and ends it where the pruner says so.

    Args:
        trial: of a study of one objective.
        monitor: event -> the intermediate value, in the direction of the study; None: the upper value.
        every: report every so many steps, >= 1: each report is a write to the study's storage.

    Raises:
        InvalidProblem: `every` < 1, or the study maximizes and there is no monitor. The callback itself raises
            `optuna.TrialPruned`, which passes through `solve`.
    """
    if every < 1:
        raise InvalidProblem(f"report_callback(every=...) must be >= 1, got {every}.")
    if monitor is None and trial.study.direction is not StudyDirection.MINIMIZE:
        raise InvalidProblem(
            "the study maximizes, but upper values are minimized: give monitor=..., a function of the event, or "
            "BilevelObjective(report=False)."
        )

    def callback(event: Event) -> None:
        if event.step % every == 0:
            trial.report(float(event.row["upper_value"]) if monitor is None else float(monitor(event)), event.step)
            if trial.should_prune():
                raise TrialPruned(f"pruned at upper step {event.step}")

    return callback


def _forget(saved: Checkpoint | None) -> None:
    if saved is not None:
        saved.remove()


def _failed(trial: Trial, reason: str, objectives: int) -> Any:
    trial.set_user_attr("reason", reason)
    return math.nan if objectives == 1 else [math.nan] * objectives


def _store(trial: Trial, solution: Solution) -> None:
    known = facts(solution)
    leaves = [leaf for _, leaf in named_leaves(solution.best_x)]
    if sum(leaf.numel() for leaf in leaves) <= KEPT:
        known["best_x"] = rebuild(solution.best_x, iter([leaf.tolist() for leaf in leaves]))
    for name, fact in known.items():
        trial.set_user_attr(name, fact)
