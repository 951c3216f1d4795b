"""Pictures of solutions: each function draws on one matplotlib Axes and returns it. Needs the extra `plot`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from bilevel.extras import extra
from bilevel.solution import Solution
from bilevel.status import InvalidProblem

Axes: TypeAlias = Any
"""A matplotlib Axes; the type is not imported, since matplotlib is optional."""


def plot_history(solution: Solution, ax: Axes = None, *, column: str = "upper_value", label: str | None = None) -> Axes:
    """Draw one column of the history against the steps, and the best upper value so far.

    Args:
        solution: what to draw.
        ax: where; a new figure if None.
        column: one of `solution.history.columns` that holds numbers.
        label: of the line.

    Returns:
        The Axes.
    """
    ax = _axes(ax)
    values = _numbers(solution, column)
    (line,) = ax.plot(solution.history["step"], values, label=label or column.replace("_", " "), linewidth=1.2)
    if column == "upper_value":
        best, lowest = [], math.inf
        for value in values:
            lowest = min(lowest, value)
            best.append(lowest)
        ax.plot(solution.history["step"], best, linestyle=":", color=line.get_color(), label="best so far")
    ax.set(xlabel="upper step", ylabel=column.replace("_", " "))
    ax.legend(frameon=False)
    return ax


def plot_cost(
    solutions: Solution | Mapping[str, Solution],
    ax: Axes = None,
    *,
    column: str = "upper_value",
    against: str = "calls",
) -> Axes:
    """Draw a column of several histories against what they cost: the fair way to compare solvers.

    Args:
        solutions: one solution, or name -> solution.
        ax: where; a new figure if None.
        column: one of the history's columns that holds numbers.
        against: "calls" (gradients + HVPs + cross products) or "seconds".

    Returns:
        The Axes.

    Raises:
        InvalidProblem: `against` is neither.
    """
    if against not in ("calls", "seconds"):
        raise InvalidProblem(f"against must be 'calls' or 'seconds', got {against!r}.")
    ax = _axes(ax)
    named = {"": solutions} if isinstance(solutions, Solution) else solutions
    for name, solution in named.items():
        history = solution.history
        calls = [sum(row[key] for key in ("gradients", "hvps", "crosses")) for row in history]
        ax.plot(
            calls if against == "calls" else history["seconds"], _numbers(solution, column), label=name, linewidth=1.4
        )
    ax.set(
        xlabel="gradients + HVPs + cross products" if against == "calls" else "seconds", ylabel=column.replace("_", " ")
    )
    if len(named) > 1:
        ax.legend(frameon=False)
    return ax


def plot_hypergradient_error(solution: Solution, ax: Axes = None) -> Axes:
    """Draw the estimated error of the hypergradient where it was certified, beside its own length.

    Where the error passes the stationarity, further steps are noise: solve both lower problems more accurately there.

    Args:
        solution: of a solver with `certify_every > 0`; the final certificate is always drawn.
        ax: where; a new figure if None.

    Returns:
        The Axes, with a logarithmic ordinate.
    """
    ax = _axes(ax)
    steps = list(solution.history["step"])
    errors = list(_numbers(solution, "error_estimate"))
    if solution.certificate is not None and solution.certificate.error_estimate is not None and steps:
        steps, errors = [*steps, steps[-1] + 1], [*errors, float(solution.certificate.error_estimate)]
    known = [(step, error) for step, error in zip(steps, errors, strict=True) if math.isfinite(error)]
    ax.plot(solution.history["step"], _numbers(solution, "stationarity"), label="stationarity", linewidth=1.2)
    ax.plot(*zip(*known, strict=True) if known else ([], []), "o--", markersize=4, label="estimated error")
    ax.set(xlabel="upper step", ylabel="norm", yscale="log")
    ax.legend(frameon=False)
    return ax


def plot_hyperparameters(solution: Solution, ax: Axes = None) -> Axes:
    """Draw the entries of x against the steps.

    Args:
        solution: its history must hold x, which it does up to 256 entries.
        ax: where; a new figure if None.

    Returns:
        The Axes.

    Raises:
        InvalidProblem: the history holds no x.
    """
    if not solution.history.xs:
        raise InvalidProblem("the history holds no x: it keeps x of at most 256 entries, and needs at least one step.")
    ax = _axes(ax)
    ax.plot(solution.history["step"], torch.stack(solution.history.xs).cpu().double().numpy(), linewidth=1.0)
    ax.set(xlabel="upper step", ylabel="x")
    return ax


def _numbers(solution: Solution, column: str) -> list[float]:
    if column not in solution.history.columns:
        raise InvalidProblem(f"no column {column!r}; there are {', '.join(solution.history.columns)}.")
    return [float(value) for value in solution.history[column]]


def _axes(ax: Axes) -> Axes:
    if ax is not None:
        return ax
    with extra("plot", {"matplotlib": "matplotlib"}, "a plot"):
        from matplotlib.figure import Figure
    # A Figure of its own, not pyplot's: nothing global is touched, and no window opens.
    axes = Figure(figsize=(6, 4), layout="constrained").add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes
