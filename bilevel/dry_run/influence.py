"""Whether each leaf of x has any influence on the objectives, and a gradient to show for it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from bilevel.linearization import gradients, leaves_of
from bilevel.oracles import Constraint, Function, Level, Oracles
from bilevel.status import IneffectiveHyperparameter, UnusedHyperparameter

FURTHER_BATCHES = 4
"""Batches looked at before a leaf of x counts as unused."""
SUSPECTS = 8
"""Leaves of x examined one by one for steps (round, argmax)."""


def check_used(oracles: Oracles, x: Tensor, y: Tensor, used: dict[Level, set[int]]) -> None:
    """Refuse leaves of x that enter nowhere, at the first batches."""
    names, problem = oracles.x_layout.names, oracles.problem
    constraints: set[int] = set()
    for name in get_args(Constraint):
        if getattr(problem, name) is not None:
            constraints |= _used_at(oracles, name, 0, x, y)
    for step in range(1, 1 + FURTHER_BATCHES):
        if len(used["upper"] | used["lower"] | constraints) == len(names):
            return
        for level in get_args(Level):
            data = problem.upper_data if level == "upper" else problem.lower_data
            if data is not None and not data.deterministic:
                used[level] |= _used_at(oracles, level, step, x, y)
    unused = [name for index, name in enumerate(names) if index not in used["upper"] | used["lower"] | constraints]
    if unused and problem.lower_init is not None:
        raise UnusedHyperparameter(
            f"x's leaf '{unused[0]}' enters only through lower_init: the lower solution does not depend on its start, "
            "so the implicit gradient is zero by definition; differentiate through the training steps instead "
            "(unrolled(), Metagradient())."
        )
    if unused:
        raise UnusedHyperparameter(
            f"x's leaf '{unused[0]}' enters neither the upper nor the lower objective (was it detached, or replaced by "
            "a copy?); use it, or leave it out of x0."
        )


def _used_at(oracles: Oracles, name: Function, step: int, x: Tensor, y: Tensor) -> set[int]:
    xs = leaves_of(oracles.x_layout, x)
    with torch.enable_grad():
        value = oracles.call(name, step, xs, leaves_of(oracles.y_layout, y))
        return {i for i, gradient in enumerate(gradients([value.sum()], xs)) if gradient is not None}


def check_effective(oracles: Oracles, x: Tensor, y: Tensor, values: dict[Level, Tensor], suspects: list[int]) -> None:
    """Warn of leaves that move an objective though its gradient in them is zero wherever we look (round, argmax)."""
    if not suspects or not _stepped(oracles, x, y, values, suspects, (1.0,)):
        return
    for leaf in suspects[:SUSPECTS]:
        for level in _stepped(oracles, x, y, values, [leaf], (1.0, 0.75, 0.5, 0.25)):
            warnings.warn(
                f"x's leaf '{oracles.x_layout.names[leaf]}' changes the {level} objective but its gradient is zero "
                "(round, argmax, comparison?); use a smooth relaxation, or search over it from outside.",
                IneffectiveHyperparameter,
                stacklevel=5,
            )


def _stepped(
    oracles: Oracles, x: Tensor, y: Tensor, values: dict[Level, Tensor], leaves: list[int], fractions: Sequence[float]
) -> list[Level]:
    """Return the levels whose value changes where leaves of x move, if one of them has a zero gradient all along."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    moved = torch.zeros_like(x)
    for index, (view, length) in enumerate(
        zip(oracles.x_layout.views(moved), oracles.x_layout.views((0.5 + spread) * (1 + x.abs())), strict=True)
    ):
        if index in leaves:
            view.copy_(length)
    # Neighbors move apart, for argmax and sorting, and each entry once up and once down, for thresholds.
    turned = torch.where(torch.arange(len(x), device=x.device) % 2 == 0, moved, -moved)
    found: list[Level] = []
    for level in get_args(Level):
        for direction in (turned, -turned):
            points = [oracles.project_x(x + fraction * direction) for fraction in fractions]
            seen = [_look(oracles, level, point, y, leaves) for point in points]
            known = [pair for pair in seen if pair is not None]
            if not all(zero for _, zero in known):
                return []  # they have a slope after all
            changed = any(
                bool(abs(value - values[level]).max() > 1e-5 * abs(values[level]).max()) for value, _ in known
            )
            if changed and len(known) == len(seen):
                found.append(level)
                break
    return found


def _look(oracles: Oracles, level: Level, x: Tensor, y: Tensor, leaves: list[int]) -> tuple[Tensor, bool] | None:
    """Return an objective's value at x and whether its gradient in one of the leaves is zero; None if not finite."""
    xs = leaves_of(oracles.x_layout, x)
    try:
        with torch.enable_grad():
            value = oracles.call(level, 0, xs, leaves_of(oracles.y_layout, y))
            found = gradients([value.sum()], xs)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError):
        return None  # the user's function need not be defined here
    zero = any(gradient is None or not bool((gradient != 0).any()) for gradient in (found[i] for i in leaves))
    return (value.detach(), zero) if bool(value.isfinite().all()) else None
