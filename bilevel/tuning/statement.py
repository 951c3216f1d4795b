"""The problem: train with hyperparameters from a space, and judge on held-out examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor, nn

from bilevel.data import Full
from bilevel.modules import FunctionalModule, functional
from bilevel.optimizers import SGD, Optimizer
from bilevel.problem import Problem
from bilevel.regularizers import L2
from bilevel.sets import Box
from bilevel.space import (
    Curve,
    PerExample,
    PerInput,
    PerLayer,
    PerParameter,
    PerStep,
    PerUnit,
    Real,
    Repeated,
    Space,
    Weights,
    check_space,
)
from bilevel.status import InvalidProblem
from bilevel.tuning.decay import Decay
from bilevel.tuning.examples import Held, Training, converted
from bilevel.tuning.loss import Loss

Augment: TypeAlias = Callable[[Tensor, Any, Generator], Tensor]

ALLOWED: dict[str, tuple[type[Space], ...]] = {
    "weight_decay": (Real, PerLayer, PerUnit, PerInput, PerParameter),
    "label_smoothing": (Real,),
    "class_weight": (Weights,),
    "data_weight": (PerExample,),
    "augment": (Real,),
    "lr": (Real, PerStep, Curve),
    "momentum": (Real, PerStep, Curve),
}
RANGES = {"weight_decay": 1e308, "label_smoothing": 1.0, "data_weight": 1e308, "lr": 1e308, "momentum": 1.0}
"""Largest values that make sense; the least is 0."""


@dataclass(frozen=True)
class Statement:
    """A tuning problem with its starts.

    Args:
        problem: f is the mean validation loss, g the training loss; x holds coordinates, y the model's parameters.
        x0: coordinates at the start, by name.
        net: the model in training mode, as a function.
        judge: the same in evaluation mode, but for batch normalization, which uses the statistics of its batch.
        optimizer: of the training, with what of it is tuned.
        spaces: by name.
        decay: how weight decays are dealt out, if they are tuned.
        train_steps: T.
    """

    problem: Problem
    x0: dict[str, Tensor]
    net: FunctionalModule
    judge: FunctionalModule
    optimizer: Optimizer[Any]
    spaces: dict[str, Space]
    decay: Decay | None
    train_steps: int

    @property
    def through_training(self) -> bool:
        """Whether something is tuned that acts through the training steps alone."""
        return "lr" in self.spaces or "momentum" in self.spaces

    def values(self, x: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the hyperparameters at x in their own units: floats, tensors, or by layer or parameter."""
        found: dict[str, Any] = {}
        for name, space in self.spaces.items():
            value = space.value(x[name].detach())
            if name == "weight_decay":
                assert self.decay is not None
                found[name] = self.decay.named(value)
            else:
                found[name] = float(value) if value.dim() == 0 else value
        return found


def state(
    model: nn.Module,
    training: Training,
    validation: Held,
    space: Mapping[str, Any],
    loss: Loss,
    *,
    augment: Augment | None,
    optimizer: Optimizer[Any],
    train_steps: int,
    weight_decay: float,
) -> Statement:
    """State the problem.

    Raises:
        InvalidProblem: the space is none, has an unknown name, or touches nothing in the model or the training.
    """
    spaces = _spaces(space)
    net, judge = _functions(model)
    parameters = net.parameters()
    like = next(iter(parameters.values()))
    _check_touched(spaces, loss, augment)
    decay = Decay.of(spaces["weight_decay"], parameters) if "weight_decay" in spaces else None
    sizes: dict[str, tuple[int, ...]] = {"class_weight": (loss.classes or 0,), "data_weight": (training.count,)}
    if decay is not None:
        sizes["weight_decay"] = () if decay.size is None else (decay.size,)
    x0 = {name: each.start(_size(each, sizes.get(name, ()), train_steps), like) for name, each in spaces.items()}
    problem = Problem(
        upper=lambda x, y, batch: loss.plain(judge(y, batch[0]), batch[1]).mean(),
        upper_data=Full(tuple(validation)),
        lower=_lower(net, spaces, loss, augment, like),
        lower_data=training.source,
        upper_set=Box(0.0, 1.0),
        regularizer=_regularizer(spaces, decay, weight_decay),
    )
    trained_by = _optimizer(optimizer, spaces, train_steps)
    return Statement(problem, x0, net, judge, trained_by, spaces, decay, train_steps)


def _spaces(space: Any) -> dict[str, Space]:
    """Return the spaces by name; several strengths of `augment` under a name each."""
    allowed, flat = dict(ALLOWED), space
    if isinstance(space, Mapping) and isinstance(space.get("augment"), Mapping):
        several = {f"augment.{name}": entry for name, entry in space["augment"].items()}
        flat = {name: entry for name, entry in space.items() if name != "augment"} | several
        allowed |= dict.fromkeys(several, (Real,))
    spaces = check_space(flat, allowed)
    for name, largest in RANGES.items():
        each = spaces.get(name)
        each = each.each if isinstance(each, Repeated) else each
        if isinstance(each, Real) and not (each.low >= 0 and each.high <= largest):
            raise InvalidProblem(f"space['{name}']: values from {each.low} to {each.high}, but they must be >= 0"
                                 + (" and at most 1." if largest == 1.0 else "."))  # fmt: skip
    return spaces


def _check_touched(spaces: Mapping[str, Space], loss: Loss, augment: Augment | None) -> None:
    for name in ("label_smoothing", "class_weight"):
        if name in spaces and loss.classes is None:
            raise InvalidProblem(f"space['{name}'] touches nothing: it belongs to cross-entropy, with integer targets "
                                 "and without loss=...")  # fmt: skip
    augmented = any(name.partition(".")[0] == "augment" for name in spaces)
    if augmented and augment is None:
        raise InvalidProblem("space['augment'] touches nothing: pass augment=function(inputs, strength, generator).")
    if augment is not None and not augmented:
        raise InvalidProblem("augment=... has no strength to take: add 'augment': Real(low, high) to the space.")


def _functions(model: nn.Module) -> tuple[FunctionalModule, FunctionalModule]:
    if not isinstance(model, nn.Module):
        raise InvalidProblem(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    net = functional(model)
    judged = copy.deepcopy(net.template).eval()
    for part in judged.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
    return net if model.training else net.train(), functional(judged)


def _size(space: Space, size: tuple[int, ...], steps: int) -> tuple[int, ...]:
    if isinstance(space, PerStep):
        return (steps,)
    return (space.count,) if isinstance(space, Curve) else size


def _lower(
    net: FunctionalModule, spaces: Mapping[str, Space], loss: Loss, augment: Augment | None, like: Tensor
) -> Callable[[Any, Any, Any], Tensor]:
    def value(x: Mapping[str, Tensor], name: str) -> Tensor | None:
        return spaces[name].value(x[name]) if name in spaces else None

    strengths = [name for name in spaces if name.partition(".")[0] == "augment"]

    def lower(x: Mapping[str, Tensor], y: Mapping[str, Tensor], batch: Any) -> Tensor:
        inputs, targets = converted(batch, like)
        if augment is not None:
            several = {name.partition(".")[2]: spaces[name].value(x[name]) for name in strengths}
            inputs = augment(inputs, several.get("", several), _generator(like.device))
        by_example = value(x, "data_weight")
        if by_example is not None:
            by_example = by_example[batch[2]]
        outputs = net(y, inputs)
        return loss.training(outputs, targets, value(x, "label_smoothing"), value(x, "class_weight"), by_example)

    return lower


def _generator(device: torch.device) -> Generator:
    """Return torch's own generator, which the library seeds for each step so that steps can be run again."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


def _regularizer(spaces: Mapping[str, Space], decay: Decay | None, fixed: float) -> L2 | None:
    if decay is None:
        return L2(fixed) if fixed else None
    space = spaces["weight_decay"]
    return L2(weight=lambda x: decay.dealt(space.value(x["weight_decay"])))


def _optimizer(optimizer: Optimizer[Any], spaces: Mapping[str, Space], steps: int) -> Optimizer[Any]:
    """Return the optimizer with the learning rate and the momentum that are tuned."""
    if "lr" in spaces:
        optimizer = optimizer.with_lr(_scheduled(spaces["lr"], "lr", steps))
    if "momentum" in spaces:
        if not isinstance(optimizer, SGD):
            raise InvalidProblem(f"space['momentum'] touches nothing in {type(optimizer).__name__}; take SGD.")
        optimizer = replace(optimizer, momentum=_scheduled(spaces["momentum"], "momentum", steps))
    return optimizer


def _scheduled(space: Space, name: str, steps: int) -> Callable[[Any, int], Tensor]:
    def at(x: Mapping[str, Tensor], step: int) -> Tensor:
        coordinate = x[name]
        if isinstance(space, Curve):
            return space.at(coordinate, step, steps)
        return space.value(coordinate[min(step, steps - 1)] if isinstance(space, PerStep) else coordinate)

    return at
