"""What one implicit hypergradient costs, and how exact it is, beside the same written by hand in plain torch.

    python -m benchmarks.hypergradient --json FILE [--quick] [--device cpu|cuda]

Every method may use 20 products with the Hessian. The library spends one of them on the residual that it reports, so
its CG makes 19 steps where the hand-written one makes 20.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import throughput
from benchmarks.measure import added_mb, compare
from benchmarks.plain import Plain, exact, exact_softmax_regression
from benchmarks.tasks import Task, network, softmax_regression
from bilevel import CG, Implicit, Jacobi, NystromPreconditioner, Problem
from bilevel.dry_run import open_oracles
from bilevel.linear import LinearSolver
from bilevel.report import Row, table, write_json

HVPS = 20
SKETCH = 10
COLUMNS = ("task", "method", "ratio", "error", "added_mb", "seconds")

# One product is for the residual, with Jacobi one for the curvature of the loss, with Nyström ten for the sketch.
SOLVERS: dict[str, tuple[bool, LinearSolver]] = {
    "generic": (False, CG(tol=0.0, max_steps=HVPS - 1)),
    "declared": (True, CG(tol=0.0, max_steps=HVPS - 1)),
    "declared + Jacobi": (True, CG(tol=0.0, max_steps=HVPS - 2, preconditioner=Jacobi())),
    "nystrom-pcg": (
        True,
        CG(tol=0.0, max_steps=HVPS - 1 - SKETCH, preconditioner=NystromPreconditioner(rank=SKETCH)),
    ),
}


@dataclass(frozen=True)
class Method:
    """A way to the hypergradient: `run` returns it, `hvps` how many products the last run took."""

    name: str
    run: Callable[[], Tensor]
    hvps: Callable[[], int]


def methods(task: Task) -> list[Method]:
    """Return the library's ways on a task."""
    problems = {False: task.generic(), True: task.declared()}
    return [_library(name, problems[declared], task, linear) for name, (declared, linear) in SOLVERS.items()]


def _library(name: str, problem: Problem, task: Task, linear: LinearSolver) -> Method:
    oracles, x, y = open_oracles(problem, task.x, task.y)
    estimator = Implicit(linear=linear, truncate=True)
    spent = [0]

    def run() -> Tensor:
        before = oracles.counts
        estimate, _ = estimator.estimate(oracles, x, y, estimator.init(oracles, x, y))
        spent[0] = (oracles.counts - before).hvps
        return estimate.gradient

    return Method(name, run, lambda: spent[0])


def by_hand(task: Task) -> Method:
    """Return the hand-written way on a task."""
    plain = Plain(task)
    spent = [0]

    def run() -> Tensor:
        plain.hvps = 0
        found = plain.hypergradient(HVPS)
        plain.release()
        spent[0] = plain.hvps
        return found

    return Method("plain", run, lambda: spent[0])


def cost(task: Task, truth: Tensor, pairs: int) -> list[Row]:
    """Return the rows of one task: plain, the library's ways, and the floor, all at the same number of products."""
    device = next(iter(task.y.values())).device
    hand = by_hand(task)
    rows = []
    for method in [hand, *methods(task)]:
        found = method.run().double()
        # The comparison is only fair at equal products.
        assert method.hvps() == HVPS, f"{task.name}, {method.name}: {method.hvps()} HVPs instead of {HVPS}"
        timing = compare(method.run, hand.run, pairs, device)
        rows.append(
            {
                "task": task.name,
                "method": method.name,
                "ratio": timing.ratio,
                "error": float((found - truth).norm() / truth.norm()),
                "added_mb": added_mb(method.run, device),
                "seconds": timing.seconds,
                "hvps": HVPS,
            }
        )
    rows.append(_floor(task, hand, pairs, device))
    return rows


def _floor(task: Task, hand: Method, pairs: int, device: torch.device) -> Row:
    plain = Plain(task)

    def work() -> None:
        plain.floor(HVPS)
        plain.release()

    timing = compare(work, hand.run, pairs, device)
    row = {"task": task.name, "method": "floor", "ratio": timing.ratio, "error": None}
    return {**row, "added_mb": added_mb(work, device), "seconds": timing.seconds, "hvps": HVPS}


def batched(task: Task, pairs: int) -> list[Row]:
    """Return the rows of 20 products with the declared problem's Hessian, one by one and batched; ratio to the loop."""
    oracles, x, y = open_oracles(task.declared(), task.x, task.y)
    linearization = oracles.linearize_lower(x, y)
    vectors = torch.randn(HVPS, *y.shape, generator=torch.Generator().manual_seed(3)).to(y)

    def loop() -> Tensor:
        return torch.stack([linearization.hvp(v) for v in vectors])

    def together() -> Tensor:
        return linearization.hvps(vectors)

    rows = []
    for name, work in (("hvps loop", loop), ("hvps batched", together)):
        timing = compare(work, loop, pairs, y.device)
        rows.append(
            {
                "task": task.name,
                "method": name,
                "ratio": timing.ratio,
                "error": float((work() - loop()).norm() / loop().norm()),
                "added_mb": added_mb(work, y.device),
                "seconds": timing.seconds,
                "hvps": HVPS,
                "chunk": oracles.chunk if work is together else 1,
            }
        )
    return rows


def errors(task: Task) -> list[Row]:
    """Return rows with errors alone."""
    truth = exact(task)
    rows = []
    for method in [by_hand(task), *methods(task)]:
        found = method.run().double()
        assert method.hvps() == HVPS
        rows.append({"task": task.name, "method": method.name, "error": float((found - truth).norm() / truth.norm())})
    return rows


def measure(*, quick: bool = False) -> list[Row]:
    """Return all rows of the CPU."""
    pairs = 3 if quick else 15
    rows: list[Row] = []
    logistic = softmax_regression(quick=quick)
    rows += cost(logistic, exact_softmax_regression(logistic), pairs)
    rows += batched(logistic, pairs)
    for batch in (128,) if quick else (128, 16):
        task = network(batch, quick=quick)
        rows += cost(task, exact(task), pairs if quick else 2 * pairs)
        rows += batched(task, pairs)
    if not quick:
        # Decays that matter less beside the curvature of the loss: the declared diagonal helps less.
        weak = softmax_regression((1e-3, 1e-1))
        rows += errors(replace(weak, name="softmax regression, decays 0.001 to 0.1"))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="where to write the rows")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions: does it run?")
    parser.add_argument(
        "--device",
        help="`cuda`: products per second on that device instead, at sizes that fill it; `cpu`: the same at tiny sizes",
    )
    options = parser.parse_args(arguments)
    # One thread: the ratio of two programs must not depend on who else uses the other cores.
    torch.set_num_threads(1)
    if options.device is None:
        rows, columns = measure(quick=options.quick), COLUMNS
    else:
        rows, columns = throughput.measure(torch.device(options.device), quick=options.quick), throughput.COLUMNS
    write_json(options.json, rows)
    print(table(rows, columns))


if __name__ == "__main__":
    main()
