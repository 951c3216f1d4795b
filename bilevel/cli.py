"""The command line: `bilevel list | plan | run | compare`."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bilevel import problems, solvers
from bilevel.compare import compare, describe, spread, steps_for
from bilevel.loop import solve
from bilevel.plan import plan
from bilevel.problem import Problem
from bilevel.problems import Task
from bilevel.report import Row, table, write_json
from bilevel.solvers._base import Solver
from bilevel.status import BilevelError, InvalidProblem

DEFAULTS = ("implicit,neumann,amigo,nystrom", "SparseDescent,MEHA", "LVHBA,BLOCC")
"""Solvers of smooth lower levels, of those with kinks or bounds, and of those with constraints."""
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


def parse_solvers(text: str) -> dict[str, Solver[Any]]:
    """Read solvers written as in Python: `implicit, neumann(terms=3)`, or `all`.

    Options are literals. Case and underscores of names do not matter. The text is parsed, never evaluated.

    Example:
        >>> list(parse_solvers("implicit,neumann(terms=3)"))
        ['implicit', 'neumann(terms=3)']
    """
    if text == "all":
        return {name: getattr(solvers, name)() for name in solvers.__all__}
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
        assert isinstance(tree, ast.List)
        return {ast.unparse(node).replace(" ", ""): _solver(node) for node in tree.elts}
    except (SyntaxError, ValueError) as error:
        raise InvalidProblem(
            f"cannot read solvers {text!r}: {error}. Write e.g. 'implicit,neumann(terms=3)'."
        ) from error


def _solver(node: ast.expr) -> Solver[Any]:
    name = node.func if isinstance(node, ast.Call) else node
    known = {_plain(solver): solver for solver in solvers.__all__}
    if not isinstance(name, ast.Name) or _plain(name.id) not in known:
        raise InvalidProblem(f"no solver {ast.unparse(name)!r}; there are {', '.join(solvers.__all__)}.")
    keywords = node.keywords if isinstance(node, ast.Call) else []
    if (isinstance(node, ast.Call) and node.args) or any(keyword.arg is None for keyword in keywords):
        raise InvalidProblem(f"solver {ast.unparse(node)!r}: name each option, as in neumann(terms=3).")
    options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
    try:
        made: Solver[Any] = getattr(solvers, known[_plain(name.id)])(**options)
    except TypeError as error:
        raise InvalidProblem(f"solver {ast.unparse(node)!r}: {error}.") from error
    return made


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def fitting(problem: Problem) -> str:
    """Return the first line of DEFAULTS whose solvers treat every part of a problem, the first of all if none does.

    Example:
        >>> fitting(problems.lasso1().problem)
        'SparseDescent,MEHA'
    """
    for line in DEFAULTS:
        first = next(iter(parse_solvers(line).values()))
        try:
            first.refuse(problem)
        except InvalidProblem:
            continue
        return line
    return DEFAULTS[0]


def make_task(name: str) -> Callable[[int], Task]:
    """Return seed -> task, for a ready problem's name or a `module:function` of the user's that returns a Task."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InvalidProblem(f"cannot import problem {name!r}: {error}.") from error
    else:
        known = _problems()
        if name not in known:
            raise InvalidProblem(f"no problem {name!r}; there are {', '.join(known)}, or give 'module:function'.")
        factory = known[name]
    seeded = "seed" in inspect.signature(factory).parameters
    return (lambda seed: factory(seed=seed)) if seeded else (lambda seed: factory())


def _problems() -> dict[str, Callable[..., Task]]:
    return {name.replace("_", "-"): getattr(problems, name) for name in problems.ready}


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _list(options: argparse.Namespace) -> int:
    print("Problems")
    print(table([{"name": name, "what": _first_line(made)} for name, made in _problems().items()]))
    print("\nSolvers")
    print(table([{"name": name, "what": _first_line(getattr(solvers, name))} for name in solvers.__all__]))
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
        chosen = {str(found.recommended): found.solver()}
    else:
        chosen = parse_solvers(options.solver or fitting(task.problem))
    (name, solver), *more = chosen.items()
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
        parse_solvers(options.solvers or fitting(task(0).problem)),
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
