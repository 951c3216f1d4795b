"""Every method on every problem with a known answer: what it solves, what it refuses, and what it answers wrongly.

Run `python -m benchmarks.toys --json FILE`. Rows: problem, method, error, iterations, gradients, hvps, seconds, status.

The error is that of x, relative (to the nearest minimizer where there are several). The status is "solved" where it is
within the problem's tolerance and "missed" where it is not; "refused" where the solver declines, with its message that
names those which can; otherwise how the solve ended.

What is missed is missed for a reason. Implicit hypergradients, gradients through training, and BAMM and BDA with mu = 0
have no business with `mc`, whose lower Hessian is singular; gradient penalties, and trainings that start anew at each
step (Metagradient), stop at another stationary point of `sin`; BLOCC
wants a strongly convex g, which that of `mci` is not; and the start of `wl` has no support along which a sparse
hypergradient could move.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

import bilevel
from bilevel import InvalidProblem, NonFinite, Solver, solvers
from bilevel.optimizers.schedules import Power
from bilevel.problems import Task, quadratic, toys
from bilevel.report import Row, table, write_json

COLUMNS = ("problem", "method", "error", "iterations", "gradients", "hvps", "seconds", "status")
ELSE = "*"
"""Stands for every problem that a method names no settings for."""


class Toy(NamedTuple):
    """A problem and the error within which it counts as solved."""

    make: Callable[[], Task]
    tolerance: float


class Run(NamedTuple):
    """A solver with its settings, and its steps."""

    solver: Solver[Any]
    steps: int


PROBLEMS: dict[str, Toy] = {
    "quadratic": Toy(quadratic, 1e-2),
    "sc": Toy(toys.sc, 1e-2),
    "mc": Toy(toys.mc, 1e-3),
    "sin": Toy(lambda: toys.sin(start=3.0), 1e-2),
    "shen": Toy(toys.shen, 1e-2),
    "wl": Toy(toys.wl, 1e-2),
    "lasso1": Toy(toys.lasso1, 1e-3),
    "box": Toy(toys.box, 1e-3),
    "ineq": Toy(toys.ineq, 1e-3),
    "mci": Toy(toys.mci, 1e-2),
    "llc": Toy(toys.llc, 1e-2),
}

METHODS: dict[str, dict[str, Run]] = {
    "HypergradientDescent": {ELSE: Run(solvers.HypergradientDescent(), 300)},
    "BAMM": {ELSE: Run(solvers.BAMM(), 3000)},
    "BAMM, mu = 0": {ELSE: Run(solvers.BAMM(mu=0.0), 1000)},
    "BDA": {ELSE: Run(solvers.BDA(mu=0.1), 300), "mc": Run(solvers.BDA(), 300)},
    "BDA, mu = 0": {ELSE: Run(solvers.BDA(mu=0.0), 300)},
    "F2SA": {ELSE: Run(solvers.F2SA(), 500)},
    "F3SA": {ELSE: Run(solvers.F3SA(), 2000)},
    "ProxF2SA": {ELSE: Run(solvers.ProxF2SA(), 1000)},
    "F2BA": {ELSE: Run(solvers.F2BA(), 300)},
    "VPBGD": {
        ELSE: Run(solvers.VPBGD(), 3000),
        "sc": Run(solvers.VPBGD(penalty=60.0), 4000),
        "shen": Run(solvers.VPBGD(penalty=40.0), 5000),
        "box": Run(solvers.VPBGD(penalty=150.0), 5000),
    },
    "GPBGD": {ELSE: Run(solvers.GPBGD(), 4000), "sc": Run(solvers.GPBGD(penalty=60.0), 4000)},
    "BOME": {ELSE: Run(solvers.BOME(), 1000)},
    "MEHA": {
        ELSE: Run(solvers.MEHA(), 2000),
        "sc": Run(solvers.MEHA(), 5000),
        "box": Run(solvers.MEHA(penalty=Power(5.0, 0.49)), 4000),
    },
    "LVHBA": {
        ELSE: Run(solvers.LVHBA(), 2000),
        "sc": Run(solvers.LVHBA(), 5000),
        "box": Run(solvers.LVHBA(penalty=Power(5.0, 0.49)), 4000),
    },
    "BLOCC": {ELSE: Run(solvers.BLOCC(), 1000)},
    "SparseDescent": {ELSE: Run(solvers.SparseDescent(), 300)},
    "KKT": {ELSE: Run(solvers.KKT(), 6)},
    "unrolled": {ELSE: Run(solvers.unrolled(), 300)},
    "Metagradient": {ELSE: Run(solvers.Metagradient(), 300)},
}
"""Name -> settings by problem. Add a method by adding a line; `ELSE` serves every problem that is not named."""


def run(problem: str, method: str, settings: Mapping[str, Run]) -> Row:
    """Return the row of one method on one problem."""
    toy, chosen = PROBLEMS[problem], settings.get(problem, settings[ELSE])
    task = toy.make()
    row: Row = {"problem": problem, "method": method, "solver": repr(chosen.solver)}
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bilevel.BilevelWarning)
            solution = bilevel.solve(task.problem, chosen.solver, task.x0, task.y0, steps=chosen.steps, progress=False)
    except InvalidProblem as refusal:
        return row | {"status": "refused", "message": str(refusal)}
    except NonFinite as failure:
        return row | {"status": "not finite", "message": str(failure), "seconds": time.perf_counter() - begin}
    error = task.x_error(solution.x)
    if error is None:
        assert task.evaluate is not None
        error = task.evaluate(solution.x, solution.y)["x_error"]
    ended = "solved" if error <= toy.tolerance else "missed"
    return row | {
        "error": error,
        "iterations": len(solution.history),
        "gradients": solution.counts.gradients,
        "hvps": solution.counts.hvps + solution.counts.crosses,
        "seconds": time.perf_counter() - begin,
        "status": ended if solution.status.ok else solution.status.name.lower(),
        "message": solution.message,
    }


def rows(problems: Sequence[str], methods: Mapping[str, Mapping[str, Run]]) -> list[Row]:
    """Return the rows of every method on every problem."""
    return [run(problem, method, settings) for problem in problems for method, settings in methods.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write meta and rows here")
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=list(PROBLEMS), help="only these")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="only these")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = rows(options.problems, {name: METHODS[name] for name in options.methods})
    print(table(found, COLUMNS))
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
