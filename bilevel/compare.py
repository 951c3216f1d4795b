"""Many solvers on one problem, each from the same start, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bilevel.loop import solve
from bilevel.lower_level import solve_lower
from bilevel.problems import Task
from bilevel.report import Row
from bilevel.solution import Solution
from bilevel.solvers._base import Solver
from bilevel.status import BilevelError, Status

SOLVED_STEPS = 500
ENDED_WELL = {status.name.lower() for status in Status if status.ok}


def compare(
    make_task: Callable[[int], Task],
    solvers: Mapping[str, Solver[Any]],
    *,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    progress: bool | None = None,
) -> list[Row]:
    """Run each solver on the problem of each seed.

    A solver that refuses the problem, or fails on it, gets a row that says so; the others go on.

    Args:
        make_task: seed -> problem with its starts.
        solvers: name -> solver.
        seeds: also seed the batches.
        steps: upper steps of every run; if None the task's own number, times what the solver needs of them.
        progress: as for `solve`.

    Returns:
        Rows with `problem, solver, seed, upper_value, solved_value, x_error, seconds, seconds_to_first, gradients,
        hvps, crosses, status`, and what the task's `evaluate` says of the best x and y. `upper_value` is f at the
        solver's own y, which methods that relax the lower level may show too low; `solved_value` is f after the lower
        level was solved again at the best x: compare by that one (None where `solve_lower` does not apply).
        `seconds_to_first` is the time after which the upper value was first no more than the best that the first solver
        reached (None: it never was).
    """
    rows = []
    for seed in seeds:
        task = make_task(seed)
        target: float | None = None
        for name, solver in solvers.items():
            row: Row = {"problem": task.name, "solver": name, "seed": seed}
            try:
                solution = solve(
                    task.problem,
                    solver,
                    task.x0,
                    task.y0,
                    steps=steps_for(task, solver) if steps is None else steps,
                    seed=seed,
                    progress=progress,
                )
            except BilevelError as error:
                row |= {"status": type(error).__name__, "message": str(error)}
            else:
                target = solution.best_value if target is None else target
                row |= describe(task, solution) | {"seconds_to_first": seconds_to(target, solution)}
            rows.append(row)
    return rows


def steps_for(task: Task, solver: Solver[Any]) -> int:
    """Return how many steps a solver gets by default: a single-loop method takes many cheap ones."""
    return math.ceil(task.steps * solver.contract_steps / Solver.contract_steps)


def seconds_to(target: float, solution: Solution) -> float | None:
    """Return the time after which the upper value was first no more than the target, None if it never was."""
    reached = zip(solution.history["upper_value"], solution.history["seconds"], strict=True)
    # The last value is seen after the last step, where the answer is certified.
    last = solution.seconds if solution.best_value <= target else None
    return next((seconds for value, seconds in reached if value <= target), last)


def solved_value(task: Task, solution: Solution) -> float | None:
    """Return f(x, y) at the best x with the lower level solved again from the best y; None where that does not apply.

    Example:
        >>> from bilevel import problems, solve, solvers
        >>> task = problems.scalar()
        >>> solution = solve(task.problem, solvers.BOME(), task.x0, task.y0, steps=20)
        >>> solved_value(task, solution) > solution.best_value  # its y lags behind, on the better side
        True
    """
    try:
        found = solve_lower(task.problem, solution.best_x, solution.best_y, max_steps=SOLVED_STEPS)
    except BilevelError:
        return None
    return float(found.upper_value)


def describe(task: Task, solution: Solution) -> Row:
    """Return one solution as the cells of a row."""
    row: Row = {
        "upper_value": solution.best_value,
        "solved_value": solved_value(task, solution),
        "x_error": task.x_error(solution.x),
        "seconds": solution.seconds,
        "gradients": solution.counts.gradients,
        "hvps": solution.counts.hvps,
        "crosses": solution.counts.crosses,
        "status": solution.status.name.lower(),
    }
    if solution.certificate is not None and solution.certificate.error_estimate is not None:
        row["error_estimate"] = float(solution.certificate.error_estimate)
        row["residual"] = float(solution.certificate.residual)
    if task.evaluate is not None:
        row |= task.evaluate(solution.best_x, solution.best_y)
    return row


def spread(rows: Sequence[Row]) -> list[Row]:
    """Return one row a solver: `mean ± standard deviation` over seeds of every number, and how many runs ended well.

    Example:
        >>> runs = [("completed", 1.0), ("stalled", 3.0)]
        >>> spread([{"solver": "cg", "status": status, "error": error} for status, error in runs])
        [{'solver': 'cg', 'runs': 2, 'ok': 1, 'error': '2 ± 1.4'}]
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["solver"], []).append(row)
    summary = []
    for solver, group in groups.items():
        well = [row for row in group if row.get("status") in ENDED_WELL]
        line: Row = {"solver": solver, "runs": len(group), "ok": len(well)}
        for key in dict.fromkeys(key for row in group for key in row):
            values = [row[key] for row in group if isinstance(row.get(key), int | float)]
            if key != "seed" and values:
                # statistics.stdev fails on values that are not finite (an error that could not be estimated).
                finite = all(math.isfinite(value) for value in values)
                deviation = (statistics.stdev(values) if len(values) > 1 else 0.0) if finite else math.nan
                line[key] = f"{statistics.mean(values):.4g} ± {deviation:.2g}"
        summary.append(line)
    return summary
