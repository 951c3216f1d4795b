"""Checks of hyperparameters at construction, and their values at a step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bilevel.optimizers._base import Hyperparameter, at
from bilevel.status import InvalidProblem


def is_number(value: Any) -> bool:
    """Whether value is a real number; booleans are not."""
    # Asking about Real is slow, and this is asked several times a step.
    return isinstance(value, float | int | Real) and not isinstance(value, bool)


def is_zero(value: Any) -> bool:
    """Whether value is the number 0, so that its term can be left out; a tensor or a function never is."""
    return is_number(value) and value == 0


def check(name: str, value: Any, low: float, high: float, *, open_high: bool = False) -> None:
    """Refuse what is no hyperparameter; a number must lie in [low, high], or [low, high) if `open_high`.

    Raises:
        InvalidProblem: wrong type, not finite, out of range, or a function of something else than `(x, step)`. Tensors
            and functions are not evaluated here.
    """
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise InvalidProblem(f"{name} is a tensor of {value.dtype}; give a floating-point tensor")
        return
    if callable(value) and not isinstance(value, type):
        check_function(name, value)
        return
    if not is_number(value):
        raise InvalidProblem(f"{name}={value!r} is neither a number, a tensor nor a function of (x, step)")
    if not math.isfinite(value) or value < low or value > high or (open_high and value == high):
        raise InvalidProblem(f"{name}={value!r} is outside [{low}, {high}{')' if open_high else ']'}")


def check_function(name: str, function: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with `(x, step)`; one that does not tell its signature passes.

    Raises:
        InvalidProblem: it takes other arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins, extensions
        return
    try:
        signature.bind(None, 0)
    except TypeError:
        taken = ", ".join(str(each.replace(annotation=each.empty)) for each in signature.parameters.values())
        raise InvalidProblem(
            f"{name} is a function of ({taken}), but it is called with two arguments, (x, step): the upper variables "
            f"and the number of the step. Write {name}=lambda x, step: ..., also where only one of them matters."
        ) from None


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but True or False.

    Raises:
        InvalidProblem: value is not a bool.
    """
    if not isinstance(value, bool):
        raise InvalidProblem(f"{name}={value!r} must be True or False")


def check_count(name: str, value: Any, low: int) -> None:
    """Refuse anything but an int of at least `low`.

    Raises:
        InvalidProblem: value is not an int, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InvalidProblem(f"{name}={value!r} must be an int of at least {low}")


def resolve(name: str, value: Hyperparameter, x: Any, step: int, y: Tensor) -> float | Tensor:
    """Return the hyperparameter at `(x, step)`, such that arithmetic with it keeps the shape and dtype of y.

    Raises:
        InvalidProblem: it is a tensor that does not broadcast to the shape of y.
    """
    found = at(value, x, step)
    if not isinstance(found, Tensor) or found.ndim == 0:
        return found
    pairs = zip(reversed(found.shape), reversed(y.shape), strict=False)
    if found.ndim > y.ndim or any(size not in (1, target) for size, target in pairs):
        raise InvalidProblem(
            f"{name} has shape {tuple(found.shape)} at step {step}, which does not broadcast against y of shape "
            f"{tuple(y.shape)}; one value a row of [m, d] has shape [m, 1]"
        )
    return found if found.dtype == y.dtype else found.to(y.dtype)


@dataclass(frozen=True)
class _Scaled:
    function: Callable[[Any, int], float | Tensor]
    factor: float

    def __call__(self, x: Any, step: int) -> float | Tensor:
        return self.function(x, step) * self.factor


def scale(value: Hyperparameter, factor: float) -> Hyperparameter:
    """Return the hyperparameter multiplied by a factor >= 0.

    Raises:
        InvalidProblem: the factor is not a finite number >= 0.
    """
    if not is_number(factor) or not math.isfinite(factor) or factor < 0:
        raise InvalidProblem(f"factor={factor!r} must be a finite number >= 0")
    return _Scaled(value, factor) if callable(value) else value * factor


def plus(base: Tensor, factor: float | Tensor, direction: Tensor, sign: int = 1) -> Tensor:
    """Return `base ± factor direction` without a temporary vector: fresh memory costs more than arithmetic."""
    if not isinstance(factor, Tensor):
        return torch.add(base, direction, alpha=sign * float(factor))
    if factor.dtype == base.dtype == direction.dtype and factor.device == base.device:
        return torch.addcmul(base, direction, factor, value=sign)
    return base + sign * (factor * direction)


def root(value: Tensor) -> Tensor:
    """Return sqrt(value) with derivative 0, not infinity, where value is 0; the values are those of `torch.sqrt`."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), value)
