"""Mixed search: what a trial is told, what it keeps, and how failures are told."""

import math
import re

import optuna
import pytest
import torch

import bilevel
from bilevel.integrations.optuna import BilevelObjective, report_callback, run_trials
from bilevel.problems import Task

optuna.logging.set_verbosity(optuna.logging.ERROR)
ZERO = torch.zeros((), dtype=torch.float64)


def stated(shift, slope=1.0):
    """Return min_x 0.5 (slope x - 3)^2 + shift: its value is `shift`, at x = 3 / slope."""
    problem = bilevel.Problem(
        upper=lambda x, y, batch: 0.5 * (y - 3.0).square() + shift,
        lower=lambda x, y, batch: 0.5 * (y - slope * x).square(),
    )
    return problem, ZERO, ZERO


def build(trial):
    return stated(shift={"a": 1.0, "b": 0.25}[trial.suggest_categorical("kind", ["a", "b"])])


def study(**settings):
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), **settings)


def optimized(objective, trials=6, **settings):
    found = study(**settings)
    found.optimize(objective, n_trials=trials)
    return found


def test_the_discrete_part_is_searched_and_the_continuous_part_tuned():
    found = optimized(BilevelObjective(build, bilevel.implicit(upper=bilevel.SGD(0.5)), steps=60))
    assert found.best_params == {"kind": "b"}
    assert found.best_value == pytest.approx(0.25, abs=1e-10)
    attributes = found.best_trial.user_attrs
    assert attributes["best_x"] == pytest.approx(3.0, abs=1e-6)
    assert attributes["status"] == "COMPLETED"
    assert attributes["gradients"] > 0
    assert 0 <= attributes["hypergradient_error"] < 1e-6


def test_intermediate_values_are_the_history():
    found = optimized(BilevelObjective(build, steps=5), trials=1)
    values = found.trials[0].intermediate_values
    assert list(values) == [1, 2, 3, 4, 5]
    assert values[1] == pytest.approx(4.5 + {"a": 1.0, "b": 0.25}[found.best_params["kind"]])


def test_a_task_brings_its_steps():
    def task(trial):
        return Task("mine", *stated(trial.suggest_float("shift", 0.0, 1.0)), steps=7)

    assert len(optimized(BilevelObjective(task), trials=1).trials[0].intermediate_values) == 7
    assert len(optimized(BilevelObjective(task, steps=3), trials=1).trials[0].intermediate_values) == 3


def test_hopeless_trials_are_pruned_from_inside():
    shifts = iter([0.0, 10.0, 10.0, -1.0])

    def objective(trial):
        problem, x0, y0 = stated(next(shifts))
        callbacks = [report_callback(trial)]
        return bilevel.solve(problem, bilevel.implicit(), x0, y0, steps=10, callbacks=callbacks).best_value

    found = study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=2))
    found.optimize(objective, n_trials=4)
    states = [trial.state.name for trial in found.trials]
    assert states == ["COMPLETE", "PRUNED", "PRUNED", "COMPLETE"]
    assert [trial.last_step for trial in found.trials] == [10, 2, 2, 10]


def test_reports_come_every_so_often():
    def objective(trial):
        problem, x0, y0 = stated(0.0)
        callbacks = [report_callback(trial, lambda event: event.row["lower_value"] + 7.0, every=4)]
        return bilevel.solve(problem, bilevel.implicit(), x0, y0, steps=10, callbacks=callbacks).best_value

    values = optimized(objective, trials=1).trials[0].intermediate_values
    assert list(values) == [4, 8]
    assert all(value >= 7.0 for value in values.values())


@pytest.mark.parametrize(
    ("lower", "reason"),
    [
        (lambda x, y, batch: -(y - x).square(), "negative|Diverged|diverged|unbounded"),
        (lambda x, y, batch: (y - x).square() / (x - x.detach() + (x < 0.3)), "NonFinite"),
    ],
)
def test_a_failed_solve_fails_the_trial_and_says_why(lower, reason):
    def broken(trial):
        if trial.suggest_categorical("kind", ["good", "bad"]) == "good":
            return stated(0.0)
        return bilevel.Problem(upper=lambda x, y, batch: 0.5 * (y - 3.0).square() + 0 * x, lower=lower), ZERO, ZERO

    found = optuna.create_study(sampler=optuna.samplers.GridSampler({"kind": ["good", "bad"]}, seed=0))
    found.optimize(BilevelObjective(broken, bilevel.implicit(upper=bilevel.SGD(0.5)), steps=5), n_trials=2)
    states = {trial.params["kind"]: trial for trial in found.trials}
    assert states["good"].state.name == "COMPLETE"
    assert states["bad"].state.name == "FAIL"
    assert re.search(reason, states["bad"].user_attrs["reason"])


def test_a_value_that_is_nan_fails_the_trial():
    found = optimized(BilevelObjective(build, steps=2, value=lambda solution: math.nan), trials=1)
    assert found.trials[0].state.name == "FAIL"
    assert found.trials[0].user_attrs["reason"] == "the value is nan"


def test_a_misstated_problem_stops_the_study():
    with pytest.raises(bilevel.InvalidProblem, match="must return a Task or"):
        optimized(BilevelObjective(lambda trial: 3), trials=1)


def test_maximizing_needs_a_value_and_a_monitor():
    with pytest.raises(bilevel.InvalidProblem, match=r"value=\.\.\."):
        optimized(BilevelObjective(build, steps=2), trials=1, direction="maximize")
    with pytest.raises(bilevel.InvalidProblem, match=r"monitor=\.\.\."):
        optimized(BilevelObjective(build, steps=2, value=lambda s: -s.best_value), trials=1, direction="maximize")
    objective = BilevelObjective(
        build, steps=40, value=lambda s: -s.best_value, monitor=lambda event: -event.row["upper_value"]
    )
    assert optimized(objective, direction="maximize").best_params == {"kind": "b"}


def test_several_objectives_are_not_pruned():
    def both(solution):
        return [solution.best_value, float(solution.counts.gradients)]

    found = study(directions=["minimize", "minimize"])
    found.optimize(BilevelObjective(build, steps=2, value=both), n_trials=2)
    assert all(len(trial.values) == 2 and not trial.intermediate_values for trial in found.trials)


def test_the_solver_may_be_planned():
    assert optimized(BilevelObjective(build, "auto", steps=20), trials=2).best_trial.user_attrs["status"] == "COMPLETED"


def test_options_and_solvers_of_a_trial_reach_the_solve():
    def solver(trial):
        return bilevel.implicit(upper=bilevel.SGD(trial.suggest_categorical("lr", [0.5])))

    seen = []
    objective = BilevelObjective(
        build, solver, steps=50, report=False, callbacks=[lambda event: seen.append(event)], options={"tol": 1e-4}
    )
    trial = optimized(objective, trials=1).trials[0]
    assert trial.user_attrs["status"] == "CONVERGED"
    assert 0 < len(seen) < 50
    assert not trial.intermediate_values


@pytest.mark.parametrize("damage", [False, True])
def test_the_copy_of_a_lost_trial_goes_on_from_its_checkpoint(damage, tmp_path):
    seen, values = [], []

    def dies(event):
        seen.append(event.step)
        values.append(event.row["upper_value"])
        if event.step == 17 and len(seen) == 17:
            raise KeyboardInterrupt

    def objective(**options):
        return BilevelObjective(build, bilevel.implicit(upper=bilevel.Adam(0.1)), steps=30, **options)

    found = study()
    dying = objective(callbacks=[dies], checkpoint=tmp_path / "states", checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt):
        run_trials(found, dying, 1, spool=tmp_path / "spool")
    (file,) = (tmp_path / "states").iterdir()
    if damage:
        file.write_bytes(file.read_bytes()[:100])
    run_trials(found, dying, 1, spool=tmp_path / "spool")
    again = 0 if damage else 15
    assert seen == [*range(1, 18), *range(again + 1, 31)]
    assert values[again:17] == values[17 : 34 - again]  # bit for bit
    whole = study()
    whole.enqueue_trial(found.trials[1].params)
    whole.optimize(objective(), n_trials=1)
    assert found.trials[1].value == whole.best_value
    assert not list((tmp_path / "states").iterdir())


def test_checkpoints_of_pruned_and_failed_trials_are_removed(tmp_path):
    class Always(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.last_step == 4

    objective = BilevelObjective(build, steps=9, checkpoint=tmp_path, checkpoint_every=1)
    found = study(pruner=Always())
    found.optimize(objective, n_trials=1)
    assert found.trials[0].state.name == "PRUNED"
    assert not list(tmp_path.iterdir())


def test_bad_options_are_refused():
    with pytest.raises(bilevel.InvalidProblem, match="checkpoint_every"):
        BilevelObjective(build, checkpoint_every=0)
    with pytest.raises(bilevel.InvalidProblem, match="every"):
        report_callback(study().ask(), every=0)
