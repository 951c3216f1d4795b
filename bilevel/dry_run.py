"""The door: one dry run that answers, before the first step, most of what can be wrong with a problem.

It costs about eight gradients, changes nothing of the user's, and ends in `Oracles` that a solver can trust.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bilevel import second_order
from bilevel.layout import HALF, Layout, Variables, named_leaves
from bilevel.linearization import gradients, leaves_of
from bilevel.oracles import Counts, Level, Oracles, tensors_in
from bilevel.problem import Problem
from bilevel.status import (
    BilevelError,
    DataExhausted,
    IneffectiveHyperparameter,
    InvalidProblem,
    NonFinite,
    PrecisionWarning,
    UnusedHyperparameter,
)


def open_oracles(
    problem: Problem, x0: Variables, y0: Variables | None = None, *, seed: int = 0, needs_hvp: bool = True
) -> tuple[Oracles, Tensor, Tensor]:
    """Check a problem at a start and open its oracles.

    Args:
        problem: the statement.
        x0: upper start; projected on the upper set.
        y0: lower start; `problem.lower_init(x0)` if None.
        seed: of batches and of randomness inside the objectives.
        needs_hvp: whether the solver takes second derivatives; if not they are not tried.

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
        y0 = problem.lower_init(x0)
    x_layout, y_layout = Layout.of(x0, name="x"), Layout.of(y0, name="y", blocks=problem.blocks)
    _check_pair(x_layout, y_layout)
    oracles = Oracles(problem, x_layout, y_layout, seed=seed)
    x, y = x_layout.flatten(x0), y_layout.flatten(y0)
    _check_finite("x0", x, x_layout)
    _check_finite("y0", y, y_layout)
    x = oracles.project_x(x)
    if problem.regularizer is not None:
        problem.regularizer.check(x_layout.unflatten(x), y_layout)

    used: set[int] = set()
    flat_gradients = torch.zeros_like(x)
    for level in get_args(Level):
        in_x = _first_derivatives(oracles, level, x, y)
        used |= {index for index, gradient in enumerate(in_x) if gradient is not None}
        for view, gradient in zip(x_layout.views(flat_gradients), in_x, strict=True):
            if gradient is not None:
                view += gradient.detach().abs()
    used |= {i for i, g in enumerate(oracles.declared(x).cross(y, torch.ones_like(y))) if g is not None}
    _check_used(oracles, used)
    _check_effective(oracles, x, y, flat_gradients)
    if needs_hvp:
        with _untouched(problem.lower, "lower"):
            second_order.choose(oracles, x, y)
    oracles.counts = Counts()
    return oracles, x, y


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


def _first_derivatives(oracles: Oracles, level: Level, x: Tensor, y: Tensor) -> list[Tensor | None]:
    """Call one objective at the start, check what it returns, and return its gradient in x, leaf by leaf."""
    objective = oracles.problem.upper if level == "upper" else oracles.problem.lower
    batch = oracles.batch(level, 0)
    _check_batch(level, batch)
    kept_x, kept_y, versions = x.clone(), y.clone(), [tensor._version for tensor in tensors_in(batch)]
    xs, ys = leaves_of(oracles.x_layout, x), leaves_of(oracles.y_layout, y)
    with torch.enable_grad(), _untouched(objective, level):
        value = _call(oracles, level, xs, ys, batch)
        _check_value(oracles, level, value, x)
        found = gradients([value.sum()], [*xs, *ys])
    for name, layout, now, kept in (("x", oracles.x_layout, x, kept_x), ("y", oracles.y_layout, y, kept_y)):
        changed = (now != kept).reshape(-1, layout.size).any(0).nonzero()
        if len(changed):
            leaf = layout.name_of(int(changed[0]))
            raise InvalidProblem(
                f"the {level} objective changes {name}'s leaf '{leaf}' in place (through .data or no_grad), which makes "
                "gradients silently wrong; compute a new tensor instead."
            )
    if versions != [tensor._version for tensor in tensors_in(batch)]:
        raise InvalidProblem(f"the {level} objective changes its batch in place; compute a new tensor instead.")
    in_y = found[len(xs) :]
    if level == "lower" and all(g is None for g in in_y) and oracles.problem.regularizer is None:
        raise InvalidProblem("the lower objective does not depend on y: there is nothing to minimize below.")
    for layout, leaves in ((oracles.x_layout, found[: len(xs)]), (oracles.y_layout, in_y)):
        for leaf_name, gradient in zip(layout.names, leaves, strict=True):
            if gradient is not None and not bool(gradient.isfinite().all()):
                raise NonFinite(
                    f"the gradient of the {level} objective in leaf '{leaf_name}' is not finite at step 0; look for sqrt, "
                    "log, norm or a division at zero."
                )
    return found[: len(xs)]


def _call(oracles: Oracles, level: Level, xs: list[Tensor], ys: list[Tensor], batch: Any) -> Tensor:
    try:
        return oracles.call(level, 0, xs, ys)
    except BilevelError:
        raise
    except RuntimeError as error:
        text = str(error)
        if "in-place" in text or "inplace" in text or "in place" in text:
            names = ", ".join((*oracles.x_layout.names, *oracles.y_layout.names))
            raise InvalidProblem(
                f"the {level} objective changes one of its variables ({names}) in place: {text.splitlines()[0]} "
                "Write y = y + ... instead of y += ..."
            ) from error
        device = oracles.x_layout.device
        strays = [
            f"'{name or 'batch'}' {tuple(leaf.shape)} on {leaf.device}"
            for name, leaf in named_leaves(batch)
            if isinstance(leaf, Tensor) and leaf.device != device
        ]
        if "same device" in text or strays:
            listed = "; ".join(strays) or "a tensor captured by the function"
            raise InvalidProblem(
                f"the {level} objective mixes devices: x and y are on {device}, but {listed}."
            ) from error
        error.add_note(
            f"raised by the {level} objective in the dry run at step 0, called with {_shapes(xs, ys, batch)}"
        )
        raise


def _shapes(xs: list[Tensor], ys: list[Tensor], batch: Any) -> str:
    of = {"x": xs, "y": ys, "batch": tensors_in(batch)}
    return ", ".join(f"{name}: {[tuple(tensor.shape) for tensor in tensors]}" for name, tensors in of.items())


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
    if not bool(value.isfinite().all()):
        raise NonFinite(
            f"the {level} objective is {value.flatten()[0].item()} at step 0 (x between {float(x.min()):.3g} and "
            f"{float(x.max()):.3g}); look for an empty mean, a log of zero, or an overflow such as exp(x)."
        )
    if not value.requires_grad and not (level == "lower" and oracles.problem.regularizer is not None):
        raise InvalidProblem(
            f"the {level} objective is detached from x and y (.item(), .detach(), numpy, no_grad, or a constant?); "
            "compute it from them with torch operations."
        )
    if value.dtype.itemsize > oracles.x_layout.dtype.itemsize:
        warnings.warn(
            f"the {level} objective promotes {oracles.x_layout.dtype} variables to {value.dtype}; convert the data with "
            f".to({oracles.x_layout.dtype}), or pass x0 and y0 as {value.dtype}.",
            PrecisionWarning,
            stacklevel=4,
        )


def _check_used(oracles: Oracles, used: set[int]) -> None:
    unused = [name for index, name in enumerate(oracles.x_layout.names) if index not in used]
    if unused and oracles.problem.lower_init is not None:
        raise InvalidProblem(
            f"x's leaf '{unused[0]}' enters only through lower_init: the lower solution does not depend on its start, so "
            "the implicit gradient is zero by definition; differentiate through the training steps instead (unroll)."
        )
    if unused:
        raise UnusedHyperparameter(
            f"x's leaf '{unused[0]}' enters neither the upper nor the lower objective (was it detached, or replaced by "
            "a copy?); use it, or leave it out of x0."
        )


def _check_effective(oracles: Oracles, x: Tensor, y: Tensor, size: Tensor) -> None:
    """Warn of leaves that move an objective though its gradient in them is zero wherever we look (round, argmax)."""
    for name, view, gradient in zip(
        oracles.x_layout.names, oracles.x_layout.views(torch.arange(len(x))), oracles.x_layout.views(size), strict=True
    ):
        if bool((gradient != 0).any()):
            continue
        moved = x.clone()
        moved[view.flatten().to(x.device)] += 1.0 + x[view.flatten().to(x.device)].abs()
        moved = oracles.project_x(moved)
        for level in get_args(Level):
            with torch.enable_grad():
                here, there = (
                    oracles.call(level, 0, leaves_of(oracles.x_layout, point), leaves_of(oracles.y_layout, y)).sum()
                    for point in (x, moved)
                )
                xs = leaves_of(oracles.x_layout, moved)
                again = gradients([oracles.call(level, 0, xs, leaves_of(oracles.y_layout, y)).sum()], xs)
            flat = again[oracles.x_layout.names.index(name)]
            differs = bool((here != there) & there.isfinite())
            if differs and (flat is None or not bool((flat != 0).any())):
                warnings.warn(
                    f"x's leaf '{name}' changes the {level} objective but its gradient is zero (round, argmax, "
                    "comparison?); use a smooth relaxation, or search over it from outside.",
                    IneffectiveHyperparameter,
                    stacklevel=3,
                )


@contextmanager
def _untouched(objective: Callable[..., Any], level: Level) -> Iterator[None]:
    """Restore, and refuse, changes of modules that the objective captured (running statistics of batch norm)."""
    modules = _captured_modules(objective)
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    changes = []
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            for name, tensor in module.state_dict().items():
                if not torch.equal(tensor, kept[name]):
                    changes.append((module, name))
                    with torch.no_grad():
                        tensor.copy_(kept[name])
    if changes:
        module, name = changes[0]
        raise InvalidProblem(
            f"the {level} objective changes '{name}' of {type(module).__name__} at every call; wrap the module: "
            "net = bilevel.functional(module). (It has been restored.)"
        )


def _captured_modules(objective: Callable[..., Any]) -> list[nn.Module]:
    try:
        captured = inspect.getclosurevars(objective)
    except TypeError:  # not a plain function: nothing to look into
        return []
    values = [*captured.nonlocals.values(), *captured.globals.values()]
    return [value for value in values if isinstance(value, nn.Module)]
