"""Solutions as Optuna studies, for its plots and for optuna-dashboard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, create_trial

from bilevel.integrations.optuna.storage import shared_storage
from bilevel.layout import Layout
from bilevel.solution import Solution
from bilevel.status import InvalidProblem


def to_study(
    solution: Solution | Mapping[str, Solution], *, name: str | None = None, storage: str | BaseStorage | None = None
) -> Study:
    """Write histories into a study, which optuna-dashboard and `optuna.visualization` open.

    One solution: each step is a trial, whose value is the upper value, whose parameters are the entries of x (where the
    history holds them, up to 256), and whose user attributes are the rest of the row. Several: each solution is a
    trial, whose parameter `solver` is its name and whose intermediate values are its upper values.

    Args:
        solution: one, or name -> solution.
        name: of the study; an existing study of that name is refused by Optuna.
        storage: a path or URL as for `shared_storage`, or a storage; None: memory, which no dashboard can open.

    Raises:
        InvalidProblem: there is nothing to write.

    Example:
        >>> import bilevel
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> task = bilevel.problems.scalar()
        >>> solution = bilevel.solve(task.problem, bilevel.implicit(), task.x0, task.y0, steps=5)
        >>> study = to_study(solution)
        >>> len(study.trials), study.best_value == min(solution.history["upper_value"])
        (5, True)
    """
    trials = _steps(solution) if isinstance(solution, Solution) else _compared(solution)
    if not trials:
        raise InvalidProblem("nothing to write: no solution was given, or its history is empty.")
    opened = shared_storage(storage) if isinstance(storage, str) else storage
    study = optuna.create_study(study_name=name, storage=opened, direction="minimize")
    if isinstance(solution, Solution):
        for key, fact in facts(solution).items():
            study.set_user_attr(key, fact)
    study.add_trials(trials)
    return study


def facts(solution: Solution) -> dict[str, Any]:
    """Return how a solution ended and what it cost, as attributes."""
    certificate, counts = solution.certificate, solution.counts
    error = None if certificate is None else certificate.error_estimate
    return {
        "status": solution.status.name,
        "message": solution.message,
        "hypergradient_error": None if error is None else finite(float(error)),
        "gradients": counts.gradients,
        "hvps": counts.hvps,
        "crosses": counts.crosses,
    }


def finite(value: Any) -> Any:
    """Return the value, None where it is a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _steps(solution: Solution) -> list[FrozenTrial]:
    """Return a trial for each step."""
    space, xs = _space(solution), [x.tolist() for x in solution.history.xs]
    return [
        create_trial(
            value=row["upper_value"],
            params=dict(zip(space, xs[k], strict=True)) if xs else {},
            distributions=space if xs else {},
            user_attrs={key: finite(value) for key, value in row.items() if key != "upper_value"},
        )
        for k, row in enumerate(solution.history)
    ]


def _space(solution: Solution) -> dict[str, BaseDistribution]:
    """Return the range that each entry of x covered."""
    if not solution.history.xs:
        return {}
    layout, xs = Layout.of(solution.x), torch.stack(solution.history.xs)
    entries = zip(layout.names, layout.sizes, strict=True)
    names = [name if size == 1 else f"{name}[{k}]" for name, size in entries for k in range(size)]
    ranges = zip(xs.amin(0).tolist(), xs.amax(0).tolist(), strict=True)
    return {name: FloatDistribution(low, high) for name, (low, high) in zip(names, ranges, strict=True)}


def _compared(solutions: Mapping[str, Solution]) -> list[FrozenTrial]:
    """Return a trial for each solution."""
    if not solutions:
        return []
    names = CategoricalDistribution(list(solutions))
    return [
        create_trial(
            value=solution.best_value,
            params={"solver": name},
            distributions={"solver": names},
            user_attrs=facts(solution),
            intermediate_values=dict(zip(solution.history["step"], solution.history["upper_value"], strict=True)),
        )
        for name, solution in solutions.items()
        if len(solution.history)
    ]
