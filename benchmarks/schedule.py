"""A learning-rate schedule for a short training: by metagradients, by a grid, and by Optuna's TPE, at one cost.

Run `python -m benchmarks.schedule --json FILE`. Rows: seed, method, trainings, validation_loss, and the means over five
trainings with other starts and other batches: new_validation_loss, test_loss, test_accuracy; cpu_seconds.

The training is that of `bilevel.problems.learning_rates`: 100 steps of SGD with momentum 0.9 on 3,000 MNIST digits, a
network of 64 tanh units. Every method chooses by the loss on 1,000 validation digits alone, after trainings from one
start; test digits are looked at once, at the end.

`trainings` is the cost: gradients of the lower objective plus twice its HVPs, over the steps of one training. A step of
metagradient descent comes to 3 by this count. The grid has 10 peaks x 3 warm-ups x 5 shapes of decay; TPE gets as many
trainings as metagradient descent, once in the grid's family with free numbers, once in the very knots that
metagradients move. Grid, TPE and "metagradients" see one order of batches. "fresh" sees new batches in every training,
and takes the last schedule, as values of different trainings do not compare.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import bilevel
from bilevel.dry_run import open_oracles
from bilevel.problems import Task, learning_rates
from bilevel.problems._networks import redrawn
from bilevel.problems.schedule import HIGHEST, LOWEST, START
from bilevel.report import Row, table, write_json
from bilevel.training import Training

COLUMNS = (
    "seed", "method", "trainings", "validation_loss", "new_validation_loss", "test_loss", "test_accuracy",
    "cpu_seconds",
)  # fmt: skip
PEAKS = torch.logspace(math.log10(0.05), math.log10(HIGHEST), 10).tolist()
WARM_UPS = (0.0, 0.1, 0.3)
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "linear": lambda u: 1 - u,
    "cosine": lambda u: 0.5 + 0.5 * torch.cos(math.pi * u),
    "exponential": lambda u: torch.exp(-4.6 * u),
    "inverse root": lambda u: (1 + 20 * u).rsqrt(),
}
NEW = range(500, 505)
"""Seeds of the trainings that nothing was chosen by."""


@dataclass(frozen=True)
class Setting:
    """The size of a comparison."""

    train_steps: int = 100
    upper_steps: int = 50
    knots: int = 10
    peaks: Sequence[float] = tuple(PEAKS)


class Trainings:
    """Trainings of one task with a rate a step, from one start and with one order of batches."""

    def __init__(self, task: Task, seed: int | None = None) -> None:
        assert isinstance(task.solver, bilevel.Metagradient)
        y0 = task.y0 if seed is None else redrawn(task.y0, seed)
        self.task, self.solver = task, task.solver
        self.oracles, _, self.start = open_oracles(
            task.problem, task.x0, y0, seed=seed or 0, needs_hvp=False, trains=True
        )

    def __call__(self, log_rates: Tensor) -> tuple[float, Any]:
        """Return the validation loss, and the weights."""
        x = self.oracles.project_x(log_rates)
        training = Training(self.oracles, self.solver.lower, x)
        state = training.start(self.start)
        for step in range(self.solver.lower_steps):
            state = training.advance(step, state)
        loss = float(self.oracles.upper_value(x, state.y))
        return loss if math.isfinite(loss) else 1e3, self.oracles.y_layout.unflatten(state.y)


def family(steps: int, peak: float, warm_up: float, decay: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the logarithms of the rates: linear warm-up for a share of the steps, then a decay."""
    t = torch.arange(steps) / steps
    climb = (t + 1 / steps) / max(warm_up, 1 / steps)
    after = decay(((t - warm_up) / (1 - warm_up)).clamp(0, 1))
    return (peak * torch.where(t < warm_up, climb, after)).clamp_min(LOWEST).log()


def interpolated(knots: Tensor, steps: int) -> Tensor:
    """Return the logarithm of the rate of every step."""
    schedule = bilevel.Knots(steps=steps, log=False)
    return torch.stack([schedule(knots, step) for step in range(steps)])


def by_grid(trainings: Trainings, setting: Setting) -> tuple[Tensor, float]:
    """Return the best of the grid, and how many trainings that took."""
    grid = [
        family(setting.train_steps, peak, warm_up, shape)
        for peak in setting.peaks
        for warm_up in WARM_UPS
        for shape in SHAPES.values()
    ]
    return min(grid, key=lambda rates: trainings(rates)[0]), len(grid)


def by_tpe(trainings: Trainings, setting: Setting, trials: int, seed: int, *, knots: bool) -> tuple[Tensor, float]:
    """Return the best of Optuna's TPE, in the grid's family or in the knots."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def curve(trial: Any) -> Tensor:
        if knots:
            values = [
                trial.suggest_float(f"knot{i}", math.log(LOWEST), math.log(HIGHEST)) for i in range(setting.knots)
            ]
            return interpolated(torch.tensor(values), setting.train_steps)
        peak = trial.suggest_float("peak", min(setting.peaks), max(setting.peaks), log=True)
        warm_up = trial.suggest_float("warm_up", 0.0, 0.4)
        shape = SHAPES[trial.suggest_categorical("shape", list(SHAPES))]
        return family(setting.train_steps, peak, warm_up, shape)

    found: dict[int, Tensor] = {}

    def objective(trial: Any) -> float:
        found[trial.number] = curve(trial)
        return trainings(found[trial.number])[0]

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    return found[study.best_trial.number], trials


def by_metagradients(seed: int, setting: Setting, *, fresh: bool) -> tuple[Tensor, float]:
    """Return the schedule that metagradient descent learns, and its cost in trainings."""
    task = learning_rates(seed, train_steps=setting.train_steps, knots=setting.knots, fresh=fresh)
    assert task.solver is not None
    found = bilevel.solve(task.problem, task.solver, task.x0, task.y0, steps=setting.upper_steps, progress=False)
    cost = (found.counts.gradients + 2 * found.counts.hvps) / setting.train_steps
    return interpolated(found.x if fresh else found.best_x, setting.train_steps), cost


def rows_of(seed: int, setting: Setting, *, tpe: bool = True) -> list[Row]:
    """Return the rows of every method on one split."""
    task = learning_rates(seed, train_steps=setting.train_steps, knots=setting.train_steps)
    trainings = Trainings(task)
    others = [Trainings(task, new) for new in NEW]
    budget = round(3 * (setting.upper_steps + 1))
    methods: dict[str, Callable[[], tuple[Tensor, float]]] = {
        "constant 0.05": lambda: (torch.full((setting.train_steps,), math.log(START)), 0),
        "grid": lambda: by_grid(trainings, setting),
        "metagradients": lambda: by_metagradients(seed, setting, fresh=False),
        "metagradients, fresh": lambda: by_metagradients(seed, setting, fresh=True),
    }
    if tpe:
        methods["TPE, family"] = lambda: by_tpe(trainings, setting, budget, seed, knots=False)
        methods["TPE, knots"] = lambda: by_tpe(trainings, setting, budget, seed, knots=True)
    found = []
    for name, search in methods.items():
        begin = time.process_time()
        rates, cost = search()
        row: Row = {"seed": seed, "method": name, "trainings": cost, "cpu_seconds": time.process_time() - begin}
        again = [other(rates) for other in others]
        assert task.evaluate is not None
        judged = [task.evaluate(rates, y) for _, y in again]
        row |= {
            "validation_loss": trainings(rates)[0],
            "new_validation_loss": mean(loss for loss, _ in again),
            "test_loss": mean(each["test_loss"] for each in judged),
            "test_accuracy": mean(each["test_accuracy"] for each in judged),
            "rates": rates.exp().tolist(),
        }
        found.append(row)
    return found


def means(rows: Sequence[Row]) -> list[Row]:
    """Return one row a method: means over seeds."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return [
        {"method": method} | {key: mean(r[key] for r in rows if r["method"] == method) for key in COLUMNS[2:]}
        for method in methods
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write meta and rows here")
    parser.add_argument("--seeds", type=int, default=5, help="splits 0 to N - 1")
    parser.add_argument("--seed", type=int, help="this split only")
    parser.add_argument("--no-tpe", action="store_true", help="leave out Optuna")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for seed in range(options.seeds) if options.seed is None else [options.seed]:
        rows += rows_of(seed, Setting(), tpe=not options.no_tpe)
        print(table([row for row in rows if row["seed"] == seed], COLUMNS), flush=True)
    print(table(means(rows)))
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
