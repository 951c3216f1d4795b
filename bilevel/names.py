"""Names of problems and solvers as the command line reads them; a wrong one gets the right ones that are near."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bilevel import hypergradients, linear, optimizers, problems, solvers
from bilevel.problem import Problem
from bilevel.problems import Task
from bilevel.solvers import published
from bilevel.solvers._base import Solver
from bilevel.status import InvalidProblem

DEFAULTS = ("implicit,neumann,amigo,nystrom", "SparseDescent,MEHA", "LVHBA,BLOCC")
"""Solvers of smooth lower levels, of those with kinks or bounds, and of those with constraints."""
PARTS = (optimizers, linear, hypergradients)
"""Modules whose names may stand in the options of a solver."""


def solver_makers() -> dict[str, Callable[..., Solver[Any]]]:
    """Return name -> what makes the solver: all of `bilevel.solvers`, and three that aim elsewhere."""
    made = {name: getattr(solvers, name) for name in solvers.__all__}
    return made | {"darts": published.darts, "maml": published.maml, "reptile": published.reptile}


def problem_makers() -> dict[str, Callable[..., Task]]:
    """Return name -> what makes the ready problem."""
    return {name.replace("_", "-"): getattr(problems, name) for name in problems.ready}


def parse_solvers(text: str) -> dict[str, Solver[Any]]:
    """Read solvers written as in Python: `implicit, neumann(terms=3), maml(upper=Adam(lr=0.01))`, or `all`.

    Options are literals, or optimizers, linear solvers and estimators with options of their own. Case and underscores
    of solvers' names do not matter. The text is parsed, never evaluated.

    Raises:
        InvalidProblem: a name or an option is not known, or the text cannot be read.

    Example:
        >>> list(parse_solvers("implicit,neumann(terms=3)"))
        ['implicit', 'neumann(terms=3)']
        >>> parse_solvers("implicit(upper=SGD(lr=0.5))").popitem()[1].upper.lr
        0.5
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


def chosen(text: str | None, task: Task) -> Mapping[str, Solver[Any]]:
    """Return the solvers asked for; else the task's own; else those that fit its problem."""
    if text is None and task.solvers:
        return task.solvers
    return parse_solvers(text or fitting(task.problem))


def make_task(name: str) -> Callable[[int], Task]:
    """Return seed -> task, for a ready problem's name or a `module:function` of the user's that returns a Task."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InvalidProblem(f"cannot import problem {name!r}: {error}.") from error
    else:
        known = {plain(each): made for each, made in problem_makers().items()}
        if plain(name) not in known:
            raise InvalidProblem(f"{wrong('problem', name, problem_makers())} Or give your own as 'module:function'.")
        factory = known[plain(name)]
    seeded = "seed" in inspect.signature(factory).parameters
    return (lambda seed: factory(seed=seed)) if seeded else (lambda seed: factory())


def wrong(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that a name is wrong, which ones are near, and which there are.

    Example:
        >>> wrong("solver", "implict", ["implicit", "amigo"])
        "no solver 'implict'; did you mean 'implicit'? There are: implicit, amigo."
    """
    spelled = {plain(each): each for each in known}
    near = [spelled[match] for match in difflib.get_close_matches(plain(name), spelled, n=3, cutoff=0.6)]
    hint = f"did you mean {' or '.join(map(repr, near))}? There are:" if near else "there are:"
    return f"no {kind} {name!r}; {hint} {', '.join(spelled.values())}."


def plain(name: str) -> str:
    """Return a name without what does not matter in it: case, underscores, hyphens."""
    return name.lower().replace("_", "").replace("-", "")


def first_line(thing: Any) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _solver(node: ast.expr) -> Solver[Any]:
    name = node.func if isinstance(node, ast.Call) else node
    makers = solver_makers()
    known = {plain(solver): make for solver, make in makers.items()}
    if not isinstance(name, ast.Name) or plain(name.id) not in known:
        raise InvalidProblem(wrong("solver", ast.unparse(name), makers))
    made: Solver[Any] = _called(known[plain(name.id)], node, "solver")
    return made


def _called(make: Callable[..., Any], node: ast.expr, kind: str) -> Any:
    keywords = node.keywords if isinstance(node, ast.Call) else []
    if (isinstance(node, ast.Call) and node.args) or any(keyword.arg is None for keyword in keywords):
        raise InvalidProblem(f"{kind} {ast.unparse(node)!r}: name each option, as in neumann(terms=3).")
    options = {str(keyword.arg): _value(keyword.value) for keyword in keywords}
    try:
        return make(**options)
    except TypeError as error:
        raise InvalidProblem(f"{kind} {ast.unparse(node)!r}: {error}.") from error


def _value(node: ast.expr) -> Any:
    """Read a literal, or one of the library's parts with its options: `Adam(lr=0.01)`.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    parts = {name: getattr(module, name) for module in PARTS for name in module.__all__}
    if not isinstance(node.func, ast.Name) or node.func.id not in parts:
        raise ValueError(wrong("part", ast.unparse(node.func), parts))
    return _called(parts[node.func.id], node, "part")
