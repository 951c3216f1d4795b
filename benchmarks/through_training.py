"""Selecting data, auditing a training, and a decay for every weight, beside what one would do without gradients.

Run `python -m benchmarks.through_training --json FILE`. Rows: problem, seed, method and the problem's own numbers.
`--problems selection audit decays` names some of them.

**selection**: a pool of 3,000 images, a fifth of them no digits, half of the other labels replaced at random (in
"systematic" by the next digit). 200 clean digits are the target, 800 pick (the iterate of a solver; the share that
"small loss" keeps), 1,000 judge. Every selection is trained on again, from three new starts with new batches: means of
those.
"small loss" keeps the examples on which a training on the whole pool has the smallest losses; "random" takes as many
examples at random as "weights" weighs at half of the mean or more.

**audit**: 3 % of 3,000 training images, every pixel changed by at most 0.3; the loss on 1,000 validation digits is
pushed up, and test digits judge. Means over three new starts with new batches.

**decays**: one decay for each of 1,210 weights of a network on digits of 8 x 8 pixels: 600 to train on, 300 to validate
on, 300 that pick the iterate, 500 that judge. "train + validation" trains on both with the decays
found; its validation loss is then a training loss.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import bilevel
from bilevel import CountSteps, KeepBest, L1Normalized, Sign
from bilevel.dry_run import open_oracles
from bilevel.optimizers import Cosine
from bilevel.problems import (
    Pool,
    Task,
    data_selection,
    noisy_pool,
    random_change,
    retrained,
    robustness_audit,
    small_parts,
    weight_decays,
)
from bilevel.report import Row, table, write_json

NEW = (500, 501, 502)
"""Seeds of the trainings that judge."""
STEPS = 30
KEPT = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Shares that "small loss" tries."""


def spread_of(start: float) -> Cosine:
    """Return a step length that falls to a tenth."""
    return Cosine(start, end=start / 10, steps=STEPS)


SELECTIONS: dict[str, dict[str, Any]] = {
    "weights": {"upper": L1Normalized(spread_of(0.1))},
    "weights, sign": {"upper": Sign(spread_of(0.1))},
    "counts": {"upper": CountSteps(spread_of(0.3), largest=3.0)},
    "counts, greedy": {"upper": CountSteps(spread_of(0.2), greedy=True, largest=3.0)},
    "counts, pool": {"upper": CountSteps(spread_of(0.2), largest=3.0), "truncate": 20, "pool": True},
}
"""Name -> what replaces options of the task's solver; `pool` stands for the pool itself."""


def judged(task: Task, x: Tensor) -> Row:
    """Return means over trainings that nothing was chosen by."""
    assert task.evaluate is not None
    found = [task.evaluate(x, retrained(task, x, seed)) for seed in NEW]
    return {key: mean(each[key] for each in found) for key in found[0]}


def selection(seed: int, *, systematic: bool = False, train_steps: int = 120) -> list[Row]:
    """Return the rows of every way to select from one pool."""
    pool = noisy_pool(seed, systematic=systematic)
    task = data_selection(seed, pool=pool, train_steps=train_steps)

    def check(x: Any, y: Any) -> float:
        with torch.no_grad():
            return float(task.problem.upper(x, y, tuple(pool.check)))

    chosen: dict[str, tuple[Tensor, float]] = {}
    for name, options in SELECTIONS.items():
        keep, begin = KeepBest(task.x0, check), time.process_time()
        changed = options | ({"pool": pool.everything} if "pool" in options else {})
        assert isinstance(task.solver, bilevel.Metagradient)
        solver = replace(task.solver, **changed)
        bilevel.solve(task.problem, solver, task.x0, task.y0, steps=STEPS, callbacks=[keep], progress=False)
        chosen[name] = keep.x, time.process_time() - begin
    weights = chosen["weights"][0]
    size = int((weights >= weights.mean() / 2).sum())
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))
    plain = {
        "whole pool": task.x0,
        "random": torch.zeros_like(task.x0).index_fill(0, order[:size], 1.0),
        "small loss": small_loss(task, pool, check),
        "oracle": pool.good.to(task.x0),
    }
    name = "selection, systematic" if systematic else "selection"
    rows = [{"problem": name, "seed": seed, "method": m, **judged(task, x)} for m, x in plain.items()]
    rows += [
        {"problem": name, "seed": seed, "method": m, **judged(task, x), "cpu_seconds": seconds}
        for m, (x, seconds) in chosen.items()
    ]
    return [*rows, target_alone(seed, task, pool, name)]


def small_loss(task: Task, pool: Pool, check: Callable[[Any, Any], float]) -> Tensor:
    """Return the examples on which a training on the whole pool has small losses; `check` picks how many."""
    y = retrained(task, task.x0)
    losses = torch.stack([one_loss(task, y, pool, i) for i in range(len(pool.labels))])
    tried = [(losses <= losses.quantile(share)).to(task.x0) for share in KEPT]
    return min(tried, key=lambda x: check(x, retrained(task, x)))


def one_loss(task: Task, y: Any, pool: Pool, i: int) -> Tensor:
    """Return the cross-entropy of one example: the lower objective of a batch of it at weights 1."""
    with torch.no_grad():
        rows = slice(i, i + 1)
        return task.problem.lower(task.x0, y, (pool.images[rows], pool.labels[rows], torch.tensor([i])))


def target_alone(seed: int, task: Task, pool: Pool, name: str) -> Row:
    """Return the row of a training on the target examples only."""
    alone = Pool(*pool.target, torch.ones(len(pool.target.targets), dtype=torch.bool), *pool[3:])
    assert isinstance(task.solver, bilevel.Metagradient)
    made = data_selection(seed, pool=alone, train_steps=task.solver.lower_steps, batch_size=100)
    return {"problem": name, "seed": seed, "method": "target alone", **judged(made, made.x0)}


def audit(seed: int, *, train_steps: int = 150) -> list[Row]:
    """Return the rows of images as they are, changed at random, and changed for the worse."""
    task = robustness_audit(seed, train_steps=train_steps)
    assert task.solver is not None
    begin = time.process_time()
    solution = bilevel.solve(task.problem, task.solver, task.x0, task.y0, steps=STEPS, progress=False)
    seconds = time.process_time() - begin
    assert task.problem.upper_data is not None
    held = task.problem.upper_data.batch(0, 0)
    rows = []
    for method, x in (("unchanged", task.x0), ("random", random_change(task, seed)), ("worst found", solution.x)):
        loss = mean(-float(task.problem.upper(x, retrained(task, x, new), held)) for new in NEW)
        rows.append({"problem": "audit", "seed": seed, "method": method, "validation_loss": loss, **judged(task, x)})
    rows[-1]["cpu_seconds"] = seconds
    return rows


def decays(seed: int, *, steps: int = STEPS, hidden: int = 16) -> list[Row]:
    """Return the rows of one decay, of one for every weight, and of training on all data instead."""
    parts = small_parts(seed)
    task = weight_decays(seed, parts=parts, hidden=hidden)
    assert task.evaluate is not None

    def check(x: Any, y: Any) -> float:
        with torch.no_grad():
            return float(task.problem.upper(x, y, tuple(parts.check)))

    keep, begin = KeepBest(task.x0, check), time.process_time()
    solver = bilevel.implicit(linear=bilevel.CG(damping=1e-3, max_steps=50), upper=bilevel.Adam(lr=0.1), lower_steps=50)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps, callbacks=[keep], progress=False)
    seconds = time.process_time() - begin
    both = type(parts.train)(*(torch.cat(pair) for pair in zip(parts.train, parts.validation, strict=True)))
    more = replace(task.problem, lower_data=bilevel.Full(tuple(both)))
    points = {
        "one decay": (task.x0, task.y0),
        "every weight, picked": (keep.x, keep.y),
        "every weight, last": (solution.x, solution.y),
        "one, train + validation": (task.x0, refitted(more, task.x0, task.y0)),
        "picked, train + validation": (keep.x, refitted(more, keep.x, keep.y)),
    }
    rows: list[Row] = [
        {"problem": "decays", "seed": seed, "method": method, **task.evaluate(*point)}
        for method, point in points.items()
    ]
    rows[1] |= {"picked_step": keep.step, "cpu_seconds": seconds}
    return rows


def refitted(problem: bilevel.Problem, x: Any, y: Any) -> Any:
    """Return the lower solution at x."""
    oracles, at, start = open_oracles(problem, x, y, needs_hvp=False)
    found = bilevel.LBFGS(tol=1e-6, max_steps=300).minimize(lambda point: oracles.lower_gradient(at, point), start)
    return oracles.y_layout.unflatten(found.y)


PROBLEMS: dict[str, Callable[[int], list[Row]]] = {
    "selection": selection,
    "systematic": lambda seed: selection(seed, systematic=True),
    "audit": audit,
    "decays": decays,
}


def means(rows: Sequence[Row]) -> list[Row]:
    """Return one row a method: means over seeds, with the standard deviation of the test accuracy."""
    found = []
    for problem, method in dict.fromkeys((row["problem"], row["method"]) for row in rows):
        group = [row for row in rows if (row["problem"], row["method"]) == (problem, method)]
        keys = [key for key in group[0] if key not in ("problem", "seed", "method")]
        line: Row = {"problem": problem, "method": method, "runs": len(group)}
        line |= {key: mean(row[key] for row in group) for key in keys}
        line["spread"] = float(torch.tensor([row["test_accuracy"] for row in group]).std()) if len(group) > 1 else None
        found.append(line)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write meta and rows here")
    parser.add_argument("--seeds", type=int, default=5, help="splits 0 to N - 1")
    parser.add_argument("--seed", type=int, help="this split only")
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=list(PROBLEMS), help="only these")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in options.problems:
        found: list[Row] = []
        for seed in range(options.seeds) if options.seed is None else [options.seed]:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", bilevel.Chaotic)
                found += PROBLEMS[name](seed)
            print(f"{name}, seed {seed}: {len(told)} warnings", flush=True)
        print(table(means(found)), flush=True)
        rows += found
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
