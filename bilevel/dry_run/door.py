"""The door: one dry run that answers, before the first step, most of what can be wrong with a problem.

It costs about twelve gradients, changes nothing of the user's, and ends in `Oracles` that a solver can trust.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor

from bilevel import second_order
from bilevel.dry_run.captured import Kept, modules_held
from bilevel.dry_run.errors import detached, explained
from bilevel.dry_run.influence import check_effective, check_used
from bilevel.feasibility import feasible_start
from bilevel.layout import HALF, Layout, Variables, named_leaves, rebuild
from bilevel.linearization import gradients, leaves_of
from bilevel.oracles import Counts, Level, Oracles, tensors_in
from bilevel.problem import Problem
from bilevel.status import (
    DataExhausted,
    InvalidProblem,
    NonDeterministic,
    NonFinite,
    PrecisionWarning,
)

WATCHED = 2**28
"""Bytes of a batch beyond which its values are not compared."""


def open_oracles(
    problem: Problem,
    x0: Variables,
    y0: Variables | None = None,
    *,
    seed: int = 0,
    needs_hvp: bool = True,
    trains: bool = False,
) -> tuple[Oracles, Tensor, Tensor]:  # fmt: skip
    """Check a problem at a start and open its oracles.

    Args:
        problem: the statement.
        x0: upper start; projected on the upper set.
        y0: lower start; `problem.lower_init(x0)` if None.
        seed: of batches and of randomness inside the objectives.
        needs_hvp: whether the solver takes second derivatives; if not they are not tried.
        trains: whether the solver differentiates through training steps, where x may act through the start or the
            optimizer alone; it checks that itself.

    Returns:
        `(oracles, x, y)` with x `[p]` and y `[d]` or `[m, d]`, copies of the starts. Counts start at zero: what the
        door spends is not the solver's.

    Raises:
        InvalidProblem: and its relatives, for everything that the dry run finds; see `bilevel.status`.
    """
    if not isinstance(problem, Problem):
        raise InvalidProblem(f"expected a bilevel.Problem, got {type(problem).__name__}.")
    if y0 is None:
        if problem.lower_init is None:
            raise InvalidProblem("no start for the lower level: pass y0, or state Problem(lower_init=...).")
        started = problem.lower_init(x0)  # perhaps x itself, expanded to all blocks
        leaves = [leaf for _, leaf in named_leaves(started)]
        y0 = rebuild(started, iter([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]))
    x_layout, y_layout = Layout.of(x0, name="x"), Layout.of(y0, name="y", blocks=problem.blocks)
    _check_pair(x_layout, y_layout)
    oracles = Oracles(problem, x_layout, y_layout, seed=seed)
    x, y = x_layout.flatten(x0), y_layout.flatten(y0)
    _check_finite("x0", x, x_layout)
    _check_finite("y0", y, y_layout)
    x = oracles.project_x(x)
    if problem.regularizer is not None:
        problem.regularizer.check(x_layout.unflatten(x), y_layout)
    with _modules_kept(problem) as modules:
        x, y = feasible_start(oracles, x, y)
        _try_out(oracles, x, y, modules, needs_hvp, trains)
    oracles.counts = Counts()
    return oracles, x, y


def _try_out(oracles: Oracles, x: Tensor, y: Tensor, modules: dict[str, Kept], needs_hvp: bool, trains: bool) -> None:
    values: dict[Level, Tensor] = {}
    in_x: dict[Level, list[Tensor | None]] = {}
    for level in get_args(Level):
        values[level], in_x[level] = _first_derivatives(oracles, level, x, y, modules)
    for level in get_args(Level):
        _check_repeats(oracles, level, x, y, values[level])
    used = {level: {i for i, gradient in enumerate(in_x[level]) if gradient is not None} for level in in_x}
    used["lower"] |= {i for i, g in enumerate(oracles.declared(x).cross(y, torch.ones_like(y))) if g is not None}
    if not trains:
        check_used(oracles, x, y, used)
    oracles.lower_leaves = frozenset(used["lower"])
    suspects = []
    for i, pair in enumerate(zip(*in_x.values(), strict=True)):
        traced = [gradient for gradient in pair if gradient is not None]
        if traced and not any(bool((gradient != 0).any()) for gradient in traced):
            suspects.append(i)
    check_effective(oracles, x, y, values, suspects)
    if needs_hvp:
        second_order.choose(oracles, x, y)


# -- before the first call ---------------------------------------------------------------------------------------------


def _check_pair(x: Layout, y: Layout) -> None:
    if x.device != y.device:
        raise InvalidProblem(f"x is on {x.device} and y on {y.device}; put both on one device.")
    if x.dtype != y.dtype:
        raise InvalidProblem(f"x is {x.dtype} and y is {y.dtype}; use one dtype for both levels.")
    if x.leaf_dtype in HALF or y.leaf_dtype in HALF:
        warnings.warn(
            f"x and y are {x.leaf_dtype or y.leaf_dtype}: steps are computed and stored in float32, and only the "
            "objectives see half precision. Pass float32 variables and use autocast inside the objectives instead.",
            PrecisionWarning,
            stacklevel=3,
        )


def _check_finite(name: str, flat: Tensor, layout: Layout) -> None:
    bad = (~flat.isfinite()).reshape(-1, layout.size).any(0).nonzero()
    if len(bad):
        leaf = layout.name_of(int(bad[0]))
        raise NonFinite(f"{name}: leaf '{leaf}' is not finite in {len(bad)} entries; start from finite numbers.")


@contextmanager
def _modules_kept(problem: Problem) -> Iterator[dict[str, Kept]]:
    """Put back, at the end, what the dry run changes in modules; yield those that no objective may change."""
    held, committed = modules_held(problem.upper, problem.lower, problem.constraint, problem.equality)
    watched = {f"{type(module).__name__}#{i}": Kept.of_module(module) for i, module in enumerate(held)}
    kept = [*watched.values(), *(Kept.of_module(module) for module in committed)]
    try:
        yield watched
    finally:
        for each in kept:
            each.restore()


# -- one call of each objective ----------------------------------------------------------------------------------------


def _first_derivatives(
    oracles: Oracles, level: Level, x: Tensor, y: Tensor, modules: dict[str, Kept]
) -> tuple[Tensor, list[Tensor | None]]:
    """Call one objective at the start, check what it does, and return its value and its gradient in x, leaf by leaf."""
    batch = oracles.batch(level, 0)
    _check_batch(level, batch)
    kept = {
        "x": Kept([("x", x)]),
        "y": Kept([("y", y)]),
        "batch": Kept([("batch", tensor) for tensor in tensors_in(batch)], WATCHED),
    }
    xs, ys = leaves_of(oracles.x_layout, x), leaves_of(oracles.y_layout, y)
    try:
        with torch.enable_grad(), explained(oracles, level, xs, ys, batch):
            value = oracles.call(level, 0, xs, ys)
            _check_value(oracles, level, value, x)
            found = gradients([value.sum()], [*xs, *ys])
        _check_untouched(oracles, level, x, y, kept, modules)
    finally:
        for each in kept.values():
            each.restore()
    in_x, in_y = found[: len(xs)], found[len(xs) :]
    if level == "lower" and all(g is None for g in in_y) and oracles.problem.regularizer is None:
        raise InvalidProblem("the lower objective does not depend on y: there is nothing to minimize below.")
    for layout, leaves in ((oracles.x_layout, in_x), (oracles.y_layout, in_y)):
        for leaf_name, gradient in zip(layout.names, leaves, strict=True):
            if gradient is not None and not bool(gradient.isfinite().all()):
                raise NonFinite(
                    f"the gradient of the {level} objective in leaf '{leaf_name}' is not finite at step 0; look for "
                    "sqrt, log, norm or a division at zero."
                )
    return value.detach(), in_x


def _check_batch(level: Level, batch: Any) -> None:
    for name, leaf in named_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            raise DataExhausted(f"empty batch: the {level} batch at step 0 has '{name}' of shape {tuple(leaf.shape)}.")


def _check_value(oracles: Oracles, level: Level, value: Any, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise InvalidProblem(
            f"the {level} objective returned a {type(value).__name__}, not a Tensor; return the loss itself, without "
            "float() or .item()."
        )
    expected = 0 if oracles.problem.blocks is None else 1
    if value.dim() != expected:
        raise InvalidProblem(
            f"the {level} objective returned shape {tuple(value.shape[expected:])}, not one number; reduce it, "
            "for example with .mean()."
        )
    if value.device != x.device:
        raise InvalidProblem(
            f"the {level} objective mixes devices: x and y are on {x.device}, its value on {value.device}."
        )
    if not bool(value.isfinite().all()):
        raise NonFinite(
            f"the {level} objective is {value[~value.isfinite()].flatten()[0].item()} at step 0 (x between "
            f"{float(x.min()):.3g} and {float(x.max()):.3g}); look for an empty mean, a log of zero, or an overflow "
            "such as exp(x)."
        )
    if not value.requires_grad and not (level == "lower" and oracles.problem.regularizer is not None):
        raise detached(level)
    if value.dtype.itemsize > oracles.x_layout.dtype.itemsize:
        warnings.warn(
            f"the {level} objective promotes {oracles.x_layout.dtype} variables to {value.dtype}; convert the data "
            f"with .to({oracles.x_layout.dtype}), or pass x0 and y0 as {value.dtype}.",
            PrecisionWarning,
            stacklevel=4,
        )


def _check_untouched(
    oracles: Oracles, level: Level, x: Tensor, y: Tensor, kept: dict[str, Kept], modules: dict[str, Kept]
) -> None:
    for name, layout, flat in (("x", oracles.x_layout, x), ("y", oracles.y_layout, y)):
        if kept[name].changed():
            edited = flat.clone()
            kept[name].restore()
            leaf = layout.name_of(int((edited != flat).reshape(-1, layout.size).any(0).nonzero()[0]))
            raise InvalidProblem(
                f"the {level} objective changes {name}'s leaf '{leaf}' in place (through .data or no_grad), which "
                "makes gradients silently wrong; compute a new tensor instead."
            )
    if kept["batch"].changed():
        raise InvalidProblem(f"the {level} objective changes its batch in place; compute a new tensor instead.")
    for label, module in modules.items():
        if (tensor := module.changed()) is not None:
            raise InvalidProblem(
                f"the {level} objective changes '{tensor}' of {label.partition('#')[0]} at every call; wrap the "
                "module: net = bilevel.functional(module). (It has been restored.)"
            )


def _check_repeats(oracles: Oracles, level: Level, x: Tensor, y: Tensor, value: Tensor) -> None:
    with torch.enable_grad():  # attention picks other kernels without
        again = oracles.call(level, 0, leaves_of(oracles.x_layout, x), leaves_of(oracles.y_layout, y)).detach()
    gap = float((again - value).norm() / (again.norm() + value.norm()).clamp_min(torch.finfo(value.dtype).tiny))
    if not gap <= math.sqrt(torch.finfo(oracles.x_layout.leaf_dtype or value.dtype).eps):
        raise NonDeterministic(
            f"two identical calls of the {level} objective differ by {2 * gap:.2g} of its value at step 0: its "
            "randomness does not come from torch's global generator, or it depends on state of its own. Draw from "
            "torch's global generator (it is seeded for each step), or from the batch."
        )
