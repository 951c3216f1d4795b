"""Learn the learning-rate schedule of a short training by gradients through it, beside a grid of 100 schedules."""

import argparse
import math

import torch

import bilevel
from bilevel.report import table

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--small", action="store_true", help="a few short trainings, to see that it runs")
small = options.parse_args().small
TRAIN_STEPS, UPPER_STEPS, PEAKS, STARTS = (20, 4, 2, 2) if small else (100, 50, 10, 5)

# 3,000 digits train a network for 100 steps, 1,000 validate it; 1,000 more are looked at once, at the end. x are the
# logarithms of ten rates, between which the schedule is interpolated; it is no part of the objectives, but of SGD:
task = bilevel.problems.learning_rates(train_steps=TRAIN_STEPS)
print(task.solver)
settings = {"lower": task.solver.lower, "steps": TRAIN_STEPS}
print(bilevel.metasmoothness(task.problem, task.x0, task.y0, h=0.2, **settings))


def trained(x: torch.Tensor, start: int | None = None) -> tuple[float, dict]:
    """Return the validation loss after a training at x, and what the test digits say."""
    y = bilevel.problems.retrained(task, x, start)
    return float(task.problem.upper(x, y, task.problem.upper_data.batch(0, 0))), task.evaluate(x, y)


def grid() -> dict[str, torch.Tensor]:
    """Return schedules that people try: a peak, a warm-up or none, and a decay."""
    t = torch.linspace(0, 1, len(task.x0))
    decays = {
        "constant": torch.ones_like(t), "linear": 1 - t, "cosine": 0.5 + 0.5 * torch.cos(math.pi * t),
        "exponential": torch.exp(-4.6 * t), "root": (1 + 20 * t).rsqrt(),
    }  # fmt: skip
    warm = {"": torch.ones_like(t), ", warm-up": (t / 0.2).clamp(0.1, 1)}
    return {
        f"{decay} from {peak:.2g}{up}": (peak * decays[decay] * warm[up]).clamp_min(1e-3).log()
        for peak in torch.logspace(-1.3, 0.3, PEAKS).tolist()
        for decay in decays
        for up in warm
    }


tried = {name: trained(x)[0] for name, x in grid().items()}
best = min(tried, key=tried.get)

# Each training sees new batches, so the schedule cannot fit their order. The step length falls, the last x is taken.
solution = bilevel.solve(task.problem, task.solver, task.x0, task.y0, steps=UPPER_STEPS)
print(solution)
cost = (solution.counts.gradients + 2 * solution.counts.hvps) / TRAIN_STEPS  # an HVP costs about two gradients

schedules = {"constant 0.05": (task.x0, 0), f"grid: {best}": (grid()[best], len(tried)), "learned": (solution.x, cost)}
rows = []
for name, (x, trainings) in schedules.items():
    # From other starts, with other batches: what was chosen by one training has to serve for all.
    again = [trained(x, start) for start in range(100, 100 + STARTS)]
    rows.append(
        {
            "schedule": name,
            "trainings spent": trainings,
            "validation_loss": sum(loss for loss, _ in again) / STARTS,
            **{key: sum(said[key] for _, said in again) / STARTS for key in again[0][1]},
        }
    )
print(table(rows))
assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]

try:
    from matplotlib import pyplot
except ImportError:
    print("no picture: matplotlib is not installed")
else:
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    curve = task.solver.lower.lr
    for name, (x, _) in schedules.items():
        axes.semilogy([float(curve(x, step)) for step in range(TRAIN_STEPS)], label=name)
    axes.set(xlabel="training step", ylabel="learning rate", title="A schedule learned through training")
    axes.legend()
    figure.savefig("schedule.png", dpi=150)
    print("schedule.png")
