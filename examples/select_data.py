"""Choose what to train on: a pool of 3,000 images with wrong labels and rubbish, and 200 digits that you trust."""

import argparse
from dataclasses import replace

import torch

import bilevel
from bilevel.report import table

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--small", action="store_true", help="a small pool and a few short trainings")
small = options.parse_args().small
SIZE, TRAIN_STEPS, STEPS, STARTS = (600, 30, 5, 1) if small else (3000, 120, 30, 3)

# A fifth of the images are no digits, half of the other labels are random. The 200 digits of the target say what the
# network is wanted for; 800 more pick among the selections on the way, and 1,000 judge at the end.
pool = bilevel.problems.noisy_pool(seed=0, size=SIZE)
task = bilevel.problems.data_selection(seed=0, pool=pool, train_steps=TRAIN_STEPS)


def held_back(x: torch.Tensor, y: dict) -> float:
    """Return the loss on digits that pick among selections."""
    with torch.no_grad():
        return float(task.problem.upper(x, y, tuple(pool.check)))


def selected(**changes: object) -> torch.Tensor:
    """Return the weights of the examples that did best on the digits held back."""
    keep = bilevel.KeepBest(task.x0, held_back)
    solver = replace(task.solver, **changes)
    bilevel.solve(task.problem, solver, task.x0, task.y0, steps=STEPS, callbacks=[keep])
    return keep.x


# Real weights by normalized gradients; and counts, which change by one for a random part of the examples at each step.
falling = bilevel.Cosine(0.3, end=0.03, steps=STEPS)
weights, counts = selected(), selected(upper=bilevel.CountSteps(falling, largest=3.0))
random = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))[: int((weights >= weights.mean() / 2).sum())]
choices = {
    "the whole pool": task.x0,
    "as many at random": torch.zeros(SIZE).index_fill(0, random, 1.0),
    "weights": weights,
    "counts": counts,
    "all good ones (unknown)": pool.good.float(),
}
rows = []
for name, x in choices.items():  # train on each from new starts, with new batches
    found = [task.evaluate(x, bilevel.problems.retrained(task, x, start)) for start in range(100, 100 + STARTS)]
    rows.append({"trained on": name} | {key: sum(each[key] for each in found) / STARTS for key in found[0]})
print(table(rows))
assert rows[2]["good"] > rows[0]["good"]
