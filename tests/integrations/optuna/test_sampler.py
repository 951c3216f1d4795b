"""The sampler against closed forms, against TPE, and where it must stand back."""

import math

import numpy as np
import optuna
import pytest
import torch

import bilevel
from bilevel.integrations.optuna import HypergradientSampler, report_hypergradient

optuna.logging.set_verbosity(optuna.logging.ERROR)
CENTER, CURVATURE = np.array([0.3, -0.4, 0.1]), np.array([1.0, 5.0, 30.0])


def bowl(trial, *, log=False, sign=1.0, report=True):
    """sum k (z - c)^2 / 2 + sum (z - c)^4 / 4 with z the parameter or its logarithm; least 0 at z = c."""
    low, high = (math.exp(-2), math.exp(2)) if log else (-2.0, 2.0)
    values = np.array([trial.suggest_float(f"p{i}", low, high, log=log) for i in range(3)])
    apart = (np.log(values) if log else values) - CENTER
    slope = CURVATURE * apart + apart**3
    if report:
        slope = sign * slope / (values if log else 1.0)
        report_hypergradient(trial, dict(zip(["p0", "p1", "p2"], slope, strict=True)))
    return sign * float((CURVATURE * apart**2 / 2 + apart**4 / 4).sum())


def run(objective, trials, sampler, **settings):
    study = optuna.create_study(sampler=sampler, **settings)
    study.optimize(objective, n_trials=trials)
    return study


def needed(study, value):
    """Return how many trials it took to come below a value, infinity if it did not."""
    return next((trial.number + 1 for trial in study.trials if trial.value < value), math.inf)


@pytest.mark.parametrize(("log", "seed"), [(False, 0), (True, 1)])
def test_it_needs_far_fewer_trials_than_tpe(log, seed):
    ours = run(lambda trial: bowl(trial, log=log), 25, HypergradientSampler(seed=seed))
    theirs = run(lambda trial: bowl(trial, log=log), 100, optuna.samplers.TPESampler(seed=seed))
    assert needed(ours, 1e-8) <= 25
    assert needed(ours, 1e-2) * 5 <= needed(theirs, 1e-2)
    found = np.array([ours.best_params[f"p{i}"] for i in range(3)])
    np.testing.assert_allclose(np.log(found) if log else found, CENTER, atol=1e-4)


def test_it_maximizes():
    study = run(lambda trial: bowl(trial, sign=-1.0), 25, HypergradientSampler(seed=0), direction="maximize")
    assert study.best_value > -1e-8


@pytest.mark.parametrize("target", [0.2, 3.0])
def test_it_tunes_a_bilevel_problem(target):
    # min over r in [1e-3, 1] of (1 / (1 + r) - t)^2 / 2: y* = 1 / (1 + r), so r* = 1/t - 1, cut to the range.
    problem = bilevel.Problem(
        upper=lambda x, y, batch: 0.5 * (y - 1 / (1 + target)).square(),
        lower=lambda x, y, batch: 0.5 * (y - 1).square() + 0.5 * x * y.square(),
    )

    def objective(trial):
        rate = torch.tensor(trial.suggest_float("rate", 1e-3, 1.0, log=True), dtype=torch.float64)
        y = 1 / (1 + rate)
        report_hypergradient(trial, {"rate": bilevel.hypergradient(problem, rate, y).gradient})
        return float(problem.upper(rate, y, None))

    study = run(objective, 12, HypergradientSampler(seed=0))
    assert study.best_params["rate"] == pytest.approx(min(target, 1.0), rel=1e-4)


def test_it_goes_on_after_a_restart_and_with_several_workers():
    storage = optuna.storages.InMemoryStorage()
    for seed in range(3):
        study = optuna.create_study(
            storage=storage, study_name="s", load_if_exists=True, sampler=HypergradientSampler(seed=seed)
        )
        study.optimize(bowl, n_trials=8)
    assert study.best_value < 1e-8
    # Trials that still run count as tried: no two workers get the same proposal.
    study = optuna.create_study(sampler=HypergradientSampler(seed=0))
    study.optimize(bowl, n_trials=3)
    proposals = [study.ask().suggest_float("p0", -2.0, 2.0) for _ in range(3)]
    assert len(set(proposals)) == 3


def test_without_hypergradients_it_is_the_independent_sampler():
    study = run(
        lambda trial: bowl(trial, report=False), 12, HypergradientSampler(optuna.samplers.RandomSampler(seed=3))
    )
    same = run(lambda trial: bowl(trial, report=False), 12, optuna.samplers.RandomSampler(seed=3))
    assert [trial.params for trial in study.trials] == [trial.params for trial in same.trials]


def test_categories_integers_and_steps_are_left_to_the_independent_sampler():
    def objective(trial):
        kind = trial.suggest_categorical("kind", ["a", "b"])
        width, stepped = trial.suggest_int("width", 1, 8), trial.suggest_float("stepped", 0.0, 1.0, step=0.5)
        rate = trial.suggest_float("rate", 0.0, 1.0)
        report_hypergradient(trial, {"rate": 2 * (rate - 0.25), "stepped": 1.0, "width": 1.0})
        return (rate - 0.25) ** 2 + 0.0 * (width + stepped + len(kind))

    study = run(objective, 10, HypergradientSampler(seed=1))
    assert study.best_params["rate"] == pytest.approx(0.25, abs=1e-6)
    assert {trial.params["stepped"] for trial in study.trials} <= {0.0, 0.5, 1.0}


def test_after_convergence_it_explores():
    study = run(bowl, 40, HypergradientSampler(seed=0, tol=1e-4))
    first = needed(study, 1e-7)
    later = [trial.value for trial in study.trials[first + 5 :]]
    assert max(later) > 1.0


def test_options():
    narrow = run(bowl, 6, HypergradientSampler(optuna.samplers.RandomSampler(seed=0), radius=0.01, memory=1))
    points = np.array([list(trial.params.values()) for trial in narrow.trials])
    moved = np.linalg.norm(np.diff(points, axis=0), axis=1)
    assert moved.max() <= 0.01 * 4 * math.sqrt(3) * (1 + 1e-9)
    for bad in ({"radius": 0.0}, {"tol": 0.0}, {"memory": 0}):
        with pytest.raises(bilevel.InvalidProblem, match="radius > 0"):
            HypergradientSampler(**bad)


def test_what_cannot_be_used_is_refused():
    study = optuna.create_study(sampler=HypergradientSampler())
    trial = study.ask()
    trial.suggest_float("p", 0.0, 1.0)
    with pytest.raises(bilevel.InvalidProblem, match="'q' is no parameter"):
        report_hypergradient(trial, {"q": 1.0})
    with pytest.raises(bilevel.InvalidProblem, match="is nan"):
        report_hypergradient(trial, {"p": math.nan})
    several = optuna.create_study(directions=["minimize"] * 2, sampler=HypergradientSampler())
    with pytest.raises(bilevel.InvalidProblem, match="one objective"):
        several.ask().suggest_float("p", 0.0, 1.0)
