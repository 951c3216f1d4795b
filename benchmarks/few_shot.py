"""Few-shot learning: MAML against first-order MAML, Reptile, implicit MAML and no learned start.

    python -m benchmarks.few_shot --json FILE [--seeds 3] [--quick]

Tasks of five letters, one picture of each (`bilevel.problems.glyphs`): starts are learned on Latin, Greek and Cyrillic
letters and judged on 1,000 tasks of Armenian and Georgian ones. Everything is chosen on validation tasks (held-out
letters of the training scripts): each method's settings with seed 0, the number of upper steps with every seed, and the
steps and their length of the fresh start's adaptation. Rows: method, seed, settings, upper_steps, validation, test,
interval (half the width of the 95 % interval over tasks), lower_steps, gradients, seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import bilevel
from bilevel import Adam, BilevelError, Session, Solver
from bilevel.problems import Task, glyphs
from bilevel.problems.few_shot import interval
from bilevel.problems.glyphs import judged_tasks, nearest
from bilevel.report import Row, table, write_json

COLUMNS = (
    "method", "seed", "settings", "upper_steps", "validation", "test", "interval", "lower_steps", "gradients",
    "seconds",
)  # fmt: skip
LOOKS = 4
"""How often a run is judged on the validation tasks; the best start of these is kept."""


class Setting(NamedTuple):
    """One way to learn a start.

    Args:
        text: what differs from method to method, for the table.
        options: of `glyphs`: lower_steps, lr, strength.
        solver: what learns.
    """

    text: str
    options: dict[str, Any]
    solver: Solver[Any]


def plain(make: Callable[[float, float], Solver[Any]], lengths: Sequence[float], steps: int = 3) -> list[Setting]:
    """Return settings for both lengths of the adaptation's steps and some lengths of upper steps."""
    return [
        Setting(f"lr {lr}, upper {upper}", {"lower_steps": steps, "lr": lr}, make(lr, upper))
        for lr, upper in product((0.1, 0.4), lengths)
    ]


def settings() -> dict[str, list[Setting]]:
    """Return what is tried for each method."""
    return {
        "MAML": plain(lambda lr, upper: bilevel.maml(lr, 3, upper=Adam(upper)), (0.001, 0.003)),
        "first-order MAML": plain(
            lambda lr, upper: bilevel.maml(lr, 3, first_order=True, upper=Adam(upper)), (0.001, 0.003)
        ),
        "Reptile": plain(lambda lr, upper: bilevel.reptile(lr, 5, upper=bilevel.SGD(upper)), (0.3, 1.0), 5),
        "implicit MAML": [
            Setting(
                f"lr 0.1, strength {strength}, upper {upper}",
                {"lower_steps": 16, "lr": 0.1, "strength": strength},
                bilevel.imaml(16, 5, lower=bilevel.SGD(0.1), upper=Adam(upper)),
            )
            for strength, upper in ((0.5, 0.001), (0.5, 0.003), (2.0, 0.003))
        ],
    }


def learn(method: str, setting: Setting, seed: int, steps: int) -> tuple[Row, Any]:
    """Learn a start; return its row without the test, and the start that did best on the validation tasks."""
    task = glyphs(seed, **setting.options)
    row: Row = {
        "method": method, "seed": seed, "settings": setting.text, "validation": 0.0,
        "lower_steps": setting.options["lower_steps"],
    }  # fmt: skip
    best, seconds = task.x0, 0.0
    session = Session(task.problem, setting.solver, task.x0, seed=seed)
    judge = _judge(glyphs(seed, split="validation", **setting.options), "validation")
    try:
        for look in range(1, LOOKS + 1):
            begin = time.process_time()
            for _ in range(steps // LOOKS):
                session.step()
            seconds += time.process_time() - begin
            found = judge(session.x)
            if found > row["validation"]:
                row["validation"], row["upper_steps"], best = found, look * (steps // LOOKS), session.x
    except BilevelError as error:
        row["message"] = str(error)
    return row | {"seconds": seconds, "gradients": sum(session.counts[1:])}, best


def tested(row: Row, x: Any, **options: Any) -> Row:
    """Return the row with what the test tasks say of a start."""
    evaluate = glyphs(row["seed"], **options).evaluate
    assert evaluate is not None
    said = evaluate(x, None)
    return row | {"test": said["test_accuracy"], "interval": said["interval"]}


def rows(seeds: int, steps: int, *, quick: bool = False) -> list[Row]:
    """Choose each method's settings with seed 0, and run all seeds; if quick, try one setting of each."""
    found: list[Row] = []
    for method, tried in settings().items():
        tried = tried[:1] if quick else tried
        runs = [learn(method, setting, 0, steps) for setting in tried]
        chosen = max(range(len(runs)), key=lambda i: runs[i][0]["validation"])
        for seed in range(seeds):
            row, x = runs[chosen] if seed == 0 else learn(method, tried[chosen], seed, steps)
            found.append(tested(row, x, **tried[chosen].options))
            if method == "MAML":
                unadapted = {"method": "MAML's start, not adapted", "seed": seed, "lower_steps": 0}
                found.append(tested(unadapted, x, eval_steps=0))
            print(table(found[-1:], COLUMNS), flush=True)
    return found + [fresh(seed, (10,) if quick else (10, 30, 100)) for seed in range(seeds)] + [neighbor()]


def fresh(seed: int, counts: Sequence[int]) -> Row:
    """Adapt the network's random start, with the steps and their length that validate best."""
    best: tuple[float, dict[str, Any]] = (0.0, {})
    for lr, steps in product((0.1, 0.4), counts):
        options = {"lr": lr, "eval_steps": steps}
        task = glyphs(seed, split="validation", **options)
        best = max(best, (_judge(task, "validation")(task.x0), options), key=lambda pair: pair[0])
    validation, options = best
    row: Row = {"method": "fresh start, adapted", "seed": seed, "settings": f"lr {options['lr']}"}
    row |= {"validation": validation, "lower_steps": options["eval_steps"]}
    return tested(row, glyphs(seed).x0, **options)


def neighbor() -> Row:
    """Give every picture the label of the nearest one of the support examples."""
    (validation, _), (test, half) = (interval(nearest(judged_tasks(split))) for split in ("validation", "test"))
    return {"method": "nearest picture", "seed": 0, "validation": validation, "test": test, "interval": half}


def _judge(task: Task, split: str) -> Callable[[Any], float]:
    evaluate = task.evaluate
    assert evaluate is not None
    return lambda x: float(evaluate(x, None)[f"{split}_accuracy"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--seeds", type=int, default=3, help="starts and tasks of training")
    parser.add_argument("--quick", action="store_true", help="few upper steps, one seed: shows that it runs")
    options = parser.parse_args(arguments)
    found = rows(1, LOOKS, quick=True) if options.quick else rows(options.seeds, 600)
    print(table(found, COLUMNS))
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
