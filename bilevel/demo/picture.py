"""The demo's picture: what a falling validation loss costs each solver, and which digits are judged wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.demo.methods import best_row, surest
from bilevel.extras import extra
from bilevel.problems.hyper_cleaning import Digits
from bilevel.report import Row
from bilevel.solution import Solution

# Okabe and Ito's colors, which color-blind readers tell apart.
COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#000000")
RIGHT, WRONG, INK, FAINT = "#00735C", "#C44E00", "#222222", "#8A8A8A"
ACROSS, DOWN = 8, 5


def draw(path: str | Path, digits: Digits, rows: list[Row], solutions: Mapping[str, Solution]) -> None:
    """Write the picture.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    with extra("plot", {"matplotlib": "matplotlib"}, "the picture"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(14, 7), facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        1, 2, width_ratios=(1.0, 1.12), left=0.055, right=0.985, top=0.8, bottom=0.105, wspace=0.09
    )
    _losses(figure.add_subplot(grid[0]), rows, solutions)
    _digits(figure, grid[1], digits, solutions[best_row(rows)["method"]])
    wrong = float(digits.wrong.double().mean())
    figure.text(
        0.055, 0.935, f"{wrong:.0%} of {len(digits.given):,} labels are wrong. Which ones?", fontsize=19,
        fontweight="bold", color=INK,
    )  # fmt: skip
    figure.text(
        0.055, 0.895,
        f"One weight per training digit, learned so that the weighted model does well on "
        f"{len(digits.validation.targets):,} clean digits.",
        fontsize=12.5, color=FAINT,
    )  # fmt: skip
    figure.text(0.055, 0.835, "Validation loss", fontsize=12.5, color=INK)
    figure.savefig(path, dpi=130)


def _losses(axes: Any, rows: list[Row], solutions: Mapping[str, Solution]) -> None:
    by_name = {row["method"]: row for row in rows}
    for color, (name, solution) in zip(COLORS, solutions.items(), strict=False):
        history = solution.history
        cost = [sum(calls) for calls in zip(history["gradients"], history["hvps"], history["crosses"], strict=True)]
        error = by_name[name].get("relative_error")
        note = "" if error is None else f"  ({error:.1%})" if error < 0.01 else f"  ({error:.0%})"
        axes.plot(cost, history["upper_value"], color=color, linewidth=2, label=name + note, solid_capstyle="round")
        axes.plot(cost[-1], history["upper_value"][-1], "o", color=color, markersize=6)
    axes.set_xlabel("gradients + Hessian-vector products + cross products", color=INK)
    axes.set_yscale("log")
    axes.set_yticks([0.4, 0.5, 0.6, 0.8, 1.0], [f"{v:g}" for v in (0.4, 0.5, 0.6, 0.8, 1.0)])
    axes.minorticks_off()
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False, colors=INK)
    axes.legend(frameon=False, title="solver (estimated error of its hypergradient)", alignment="left", fontsize=10.5)


def _digits(figure: Any, cell: Any, digits: Digits, solution: Solution) -> None:
    wrong = digits.wrong
    order = surest(digits, solution)
    sure = order[: ACROSS * (DOWN - 1)].tolist()
    mistakes = order[~wrong[order]][:ACROSS].tolist()
    inner = cell.subgridspec(DOWN, ACROSS, wspace=0.12, hspace=0.42)
    for place, index in enumerate(sure + mistakes):
        axes = figure.add_subplot(inner[place // ACROSS, place % ACROSS])
        axes.imshow(digits.images[index].view(28, 28).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        right = bool(wrong[index])
        for spine in axes.spines.values():
            spine.set_color(RIGHT if right else WRONG)
            spine.set_linewidth(1.4)
        given, true = int(digits.given[index]), int(digits.true[index])
        text = f"“{given}”, is {true}" if right else f"“{given}”, it is"
        axes.set_title(text, fontsize=10, color=RIGHT if right else WRONG, pad=3)
    hits = sum(bool(wrong[index]) for index in sure)
    precision = float(wrong[order].double().mean()) if len(order) else 0.0
    left = cell.get_position(figure).x0
    text = f"{len(order):,} labels judged wrong, {precision:.0%} rightly. The surest: {hits} of {len(sure)} rightly."
    figure.text(left, 0.835, text, fontsize=12.5, color=RIGHT)
    text = "Last row: its surest mistakes, right labels judged wrong."
    figure.text(left, 0.045, text, fontsize=12.5, color=WRONG)
