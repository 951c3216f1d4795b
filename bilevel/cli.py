"""The command line: `bilevel list | plan | run | compare | check`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from bilevel.check import check
from bilevel.compare import compare, describe, spread, steps_for
from bilevel.hypergradients import Estimator
from bilevel.loop import solve
from bilevel.names import DEFAULTS, chosen, first_line, make_task, problem_makers, solver_makers
from bilevel.plan import plan
from bilevel.report import Row, table, write_json
from bilevel.solvers import HypergradientDescent, Metagradient
from bilevel.solvers._base import Solver
from bilevel.status import BilevelError, InvalidProblem

SHOWN = ("message", "problem")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 a solve failed, 2 the call is wrong)."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except BilevelError as error:
        print(f"bilevel: {type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidProblem) else 1
    return code


def _list(options: argparse.Namespace) -> int:
    print("Problems")
    print(table([{"name": name, "what": first_line(made)} for name, made in problem_makers().items()]))
    print("\nSolvers")
    print(table([{"name": name, "what": first_line(made)} for name, made in solver_makers().items()]))
    return 0


def _plan(options: argparse.Namespace) -> int:
    task = make_task(options.problem)(options.seed)
    print(plan(task.problem, task.x0, task.y0, seed=options.seed))
    return 0


def _run(options: argparse.Namespace) -> int:
    task = make_task(options.problem)(options.seed)
    if options.solver == "auto":
        found = plan(task.problem, task.x0, task.y0, seed=options.seed)
        print(f"auto: {found.recommended}, because {found.reason}")
        asked: Mapping[str, Solver[Any]] = {str(found.recommended): found.solver()}
    else:
        asked = chosen(options.solver, task)
    (name, solver), *more = asked.items()
    if more and options.solver:
        raise InvalidProblem("run takes one solver; compare takes several.")
    steps = steps_for(task, solver) if options.steps is None else options.steps
    solution = solve(task.problem, solver, task.x0, task.y0, steps=steps, seed=options.seed)
    rows: list[Row] = [{"problem": task.name, "solver": name, "seed": options.seed} | describe(task, solution)]
    print(solution)
    print(table(rows))
    if options.json:
        write_json(options.json, rows)
    return 0 if solution.status.ok else 1


def _compare(options: argparse.Namespace) -> int:
    task = make_task(options.problem)
    rows = compare(
        task,
        chosen(options.solvers, task(0)),
        seeds=range(options.seeds),
        steps=options.steps,
    )
    shown = [{key: value for key, value in row.items() if key not in SHOWN} for row in rows]
    print(table(spread(rows) if options.seeds > 1 else shown))
    for row in rows:
        if "message" in row:
            print(f"{row['solver']}: {row['message']}", file=sys.stderr)
    if options.json:
        write_json(options.json, rows)
    return 0


def _check(options: argparse.Namespace) -> int:
    task = make_task(options.problem)(options.seed)
    solver = task.solver
    # Where x acts through training, there is no other hypergradient than that of its solver.
    estimator: Estimator | None = None
    if isinstance(solver, HypergradientDescent | Metagradient) and solver.replays:
        estimator = solver.estimator
    report = check(task.problem, task.x0, task.y0, estimator=estimator, seed=options.seed)
    print(report)
    return 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bilevel", description="Bilevel and hyperparameter optimization for PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = partial(_command, commands)
    add("list", _list, "show ready problems and solvers")
    planned = add("plan", _plan, "say which solvers fit a problem, what a step of each costs, and which to take")
    planned.add_argument("problem", help="a name from `bilevel list`, or module:function")
    planned.add_argument("--seed", type=int, default=0)
    run = add("run", _run, "solve one problem with one solver")
    run.add_argument("problem", help="a name from `bilevel list`, or module:function")
    run.add_argument(
        "--solver",
        help="such as neumann(terms=3), or auto: what `bilevel plan` recommends; by default one that fits the problem",
    )
    run.add_argument("--seed", type=int, default=0)
    many = add("compare", _compare, "run several solvers on one problem")
    many.add_argument("problem", help="a name from `bilevel list`, or module:function")
    many.add_argument(
        "--solvers", help=f"such as implicit,f2sa(lower_steps=5), or all; by default {' or '.join(DEFAULTS)}"
    )
    many.add_argument("--seeds", type=int, default=1, help="run seeds 0 to N - 1 and show mean and spread")
    one = add("check", _check, "compare a problem's hypergradient at its start with differences of F")
    one.add_argument("problem", help="a name from `bilevel list`, or module:function")
    one.add_argument("--seed", type=int, default=0)
    for command in (run, many):
        command.add_argument("--steps", type=int, help="upper steps; the problem's own number by default")
        command.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], description: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run=function)
    return parser
