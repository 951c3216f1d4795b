"""Optuna chooses the structure, hypergradients the numbers; several workers, one of which is killed on the way."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import torch
from sklearn.datasets import load_diabetes

import bilevel
from bilevel.integrations.optuna import BilevelObjective, run_trials, shared_storage
from bilevel.report import table

# Patients with diabetes: how much worse after a year? Structure: squares and products of measurements or not, how their
# weights share decays, and which function measures the misfit. Numbers: the logarithms of up to 65 decays. A grid over
# these is hopeless, and a trial for each vector of them too; so each trial tunes its decays by hypergradients on the
# validation patients. Many decays fit these well, and the test patients, who choose nothing, less well.
STUDY, JOURNAL = "diabetes", "mixed_search.log"
STRUCTURES = {
    "inputs": ["measured", "products"],
    "decays": ["shared", "group", "feature"],
    "misfit": ["squares", "huber"],
}
HEARTBEAT, GRACE = 0.4, 2.0  # seconds; minutes in real life


def features(kind: str) -> torch.Tensor:
    """Return standardized measurements, with squares and products if asked for."""
    inputs = torch.tensor(load_diabetes(scaled=False, return_X_y=True)[0])
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    if kind == "products":
        rows, columns = torch.triu_indices(10, 10)
        inputs = torch.cat([inputs, inputs[:, rows] * inputs[:, columns]], 1)
    return (inputs - inputs.mean(0)) / inputs.std(0)


def groups(kind: str, count: int) -> torch.Tensor:
    """Return which decay each weight has."""
    if kind == "shared":
        return torch.zeros(count, dtype=torch.long)
    return torch.arange(count) if kind == "feature" else (torch.arange(count) >= 10).long()


def stated(params: dict[str, str]) -> tuple[bilevel.Problem, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return the problem that one structure makes, its starts, and the test patients."""
    inputs = features(params["inputs"])
    targets = torch.tensor(load_diabetes(return_X_y=True)[1])
    targets = (targets - targets.mean()) / targets.std()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, valid, test = order[:220], order[220:330], order[330:]
    group = groups(params["decays"], inputs.shape[1])
    misfit = torch.nn.functional.mse_loss if params["misfit"] == "squares" else torch.nn.functional.huber_loss
    problem = bilevel.Problem(
        upper=lambda x, y, b: torch.nn.functional.mse_loss(b[0] @ y, b[1]),
        lower=lambda x, y, b: misfit(b[0] @ y, b[1]),
        regularizer=bilevel.L2(weight=lambda x: x.exp()[group]),
        upper_data=bilevel.Full((inputs[valid], targets[valid])),
        lower_data=bilevel.Full((inputs[train], targets[train])),
        upper_set=bilevel.Box(-8.0, 4.0),
    )
    x0 = torch.full((int(group.max()) + 1,), -2.0, dtype=torch.float64)
    return problem, x0, torch.zeros(inputs.shape[1], dtype=torch.float64), (inputs[test], targets[test])


def build(trial: optuna.Trial) -> tuple[bilevel.Problem, torch.Tensor, torch.Tensor]:
    """State the problem of a trial."""
    structure = {name: trial.suggest_categorical(name, choices) for name, choices in STRUCTURES.items()}
    if os.environ.get("SLOW") and trial.number == 0:
        time.sleep(60)  # so that the example can kill this worker in the middle of a trial
    return stated(structure)[:3]


def work(trials: int, steps: int) -> None:
    """Be a worker: `python optuna_mixed_search.py --worker`, as often as there are processors, on any machine."""
    study = optuna.load_study(
        study_name=STUDY,
        storage=shared_storage(JOURNAL),
        sampler=optuna.samplers.GridSampler(STRUCTURES, seed=0),  # few enough to try all; else TPE
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=steps // 3),
    )
    objective = BilevelObjective(build, bilevel.implicit(upper=bilevel.Adam(0.2)), steps=steps)
    run_trials(study, objective, trials, heartbeat=HEARTBEAT, grace=GRACE)


def main(trials: int, steps: int) -> None:
    """Run two workers, kill one, and show that nothing is missing."""
    Path(JOURNAL).unlink(missing_ok=True)
    study = optuna.create_study(study_name=STUDY, storage=shared_storage(JOURNAL))
    me = [sys.executable, __file__, "--worker", "--trials", str(trials), "--steps", str(steps)]
    victim = subprocess.Popen(me, env=os.environ | {"SLOW": "1"})
    while not any(trial.params for trial in study.trials):
        assert victim.poll() is None, "the first worker ended before it began a trial"
        time.sleep(0.1)
    survivor = subprocess.Popen(me)
    victim.send_signal(signal.SIGKILL)
    print(f"worker 1 killed ({victim.wait()}) in the middle of trial 0")
    assert survivor.wait() == 0

    states = [trial.state.name for trial in study.trials]
    lost = study.trials[0]
    copy = next(trial for trial in study.trials if trial.system_attrs.get("retry_history") == [0])
    print(f"trial 0: {lost.state.name}, {lost.user_attrs['reason']}")
    assert copy.params == lost.params
    print(f"its copy, trial {copy.number}: {copy.state.name}, value {copy.value:.4f}")
    print({name: states.count(name) for name in sorted(set(states))}, "\n")
    assert "RUNNING" not in states
    assert "WAITING" not in states
    assert states.count("COMPLETE") + states.count("PRUNED") >= trials

    rows = []
    finished = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    for trial in sorted(finished, key=lambda trial: trial.value)[:6]:
        problem, _, y0, (inputs, targets) = stated(trial.params)
        x = torch.tensor(trial.user_attrs["best_x"], dtype=torch.float64)
        # The study keeps the decays only: the weights once more, without moving x.
        stay = bilevel.implicit(upper=bilevel.SGD(0.0), lower_steps=500)
        y = bilevel.solve(problem, stay, x, y0, steps=1, progress=False).y
        test = float(torch.nn.functional.mse_loss(inputs @ y, targets))
        judged = {"numbers": len(x), "validation": trial.value, "test": test}
        rows.append({"trial": trial.number} | trial.params | judged)
    print(table(rows))
    print("\nto look at it: optuna-dashboard", JOURNAL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="fewer trials and steps")
    parser.add_argument("--worker", action="store_true", help="be one of the workers")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--steps", type=int)
    chosen = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    count, long = chosen.trials or (6 if chosen.small else 12), chosen.steps or (10 if chosen.small else 60)
    work(count, long) if chosen.worker else main(count, long)
