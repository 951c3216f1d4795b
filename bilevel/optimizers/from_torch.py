"""From a `torch.optim` optimizer to the pure one with the same settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from bilevel.optimizers._base import Hyperparameter, Optimizer
from bilevel.optimizers.adam import Adam, AdamW
from bilevel.optimizers.sgd import SGD
from bilevel.status import InvalidProblem

# How torch computes a step, not which step: without meaning for a pure update.
_IMMATERIAL = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})
_SGD = frozenset({"lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize"})
_ADAM = frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"})


def from_torch(optimizer: torch.optim.Optimizer, *, lr: Hyperparameter | None = None) -> Optimizer[Any]:
    """Return the SGD, Adam or AdamW that makes the same steps.

    Only settings are read: momentum already gathered by `optimizer` is left behind.

    Args:
        optimizer: an instance of `torch.optim.SGD`, `Adam` or `AdamW` whose groups agree in all settings.
        lr: replaces the rate; needed where a scheduler drives it, as its schedule cannot be read off.

    Raises:
        InvalidProblem: another class, groups that differ, a setting unknown here, or a scheduler and no `lr`.

    Example:
        >>> from_torch(torch.optim.SGD([torch.zeros(2)], lr=0.1, momentum=0.9)).momentum
        0.9
    """
    _check_kind(type(optimizer))
    settings = _common_settings(optimizer)
    if settings.pop("initial_lr", None) is not None and lr is None:
        raise InvalidProblem(
            "a scheduler drives the lr of this optimizer, and its schedule cannot be read; pass lr=, for instance "
            "Cosine(0.1, steps=1000)"
        )
    if lr is not None:
        settings["lr"] = lr
    return of_settings(type(optimizer), settings)


def of_settings(kind: type[torch.optim.Optimizer], settings: Mapping[str, Any]) -> Optimizer[Any]:
    """Return the optimizer with the settings of a parameter group of a torch optimizer of this class.

    Raises:
        InvalidProblem: another class, a setting unknown here, or a value out of its range.
    """
    _check_kind(kind)
    settings = {key: value for key, value in settings.items() if key not in _IMMATERIAL}
    decoupled = settings.pop("decoupled_weight_decay", False)
    unknown = sorted(settings.keys() - (_SGD if kind is torch.optim.SGD else _ADAM))
    if unknown:
        raise InvalidProblem(f"torch.optim.{kind.__name__} has settings unknown here: {', '.join(unknown)}")
    if kind is torch.optim.SGD:
        return SGD(**settings)
    settings["betas"] = tuple(settings["betas"])
    return AdamW(**settings) if decoupled else Adam(**settings)


def _check_kind(kind: type[torch.optim.Optimizer]) -> None:
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise InvalidProblem(
            f"cannot convert {kind.__module__}.{kind.__qualname__}; supported are torch.optim.SGD, Adam and AdamW"
        )


def _common_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    groups = [
        {key: value for key, value in group.items() if key not in _IMMATERIAL} for group in optimizer.param_groups
    ]
    first = groups[0]
    for index, group in enumerate(groups[1:], start=1):
        differing = sorted(key for key in first.keys() | group.keys() if not _same(first.get(key), group.get(key)))
        if differing:
            raise InvalidProblem(
                f"parameter groups 0 and {index} differ in {', '.join(differing)}; one optimizer has one setting: "
                "state it with tensors [d], one value an entry of y"
            )
    return first


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (left.shape == right.shape and bool((left == right).all()))
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return False
    return cast(bool, left == right)
