"""The calls that a module makes of its parts, caught, so that each part can be examined by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bilevel.check._probe import Finding, Probe, Verdict
from bilevel.layout import named_leaves, rebuild
from bilevel.modules import FunctionalModule
from bilevel.oracles import random_state, tensors_in

NOTHING_TO_DO = "nothing to differentiate"


class Call(NamedTuple):
    """A call of a module, `module(*arguments, **options)`; its tensors are detached copies.

    Args:
        module: what was called.
        given: `(arguments, options)`.
        moving: for each leaf of `given`, whether it depends on parameters or inputs, so that it may be moved.
    """

    module: nn.Module
    given: Any
    moving: tuple[bool, ...]


def arguments_of(batch: Any) -> Any:
    """Return `(arguments, options)` for a batch: a tuple is arguments, a dict options, anything else one argument."""
    if isinstance(batch, dict):
        return (), batch
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def in_float64(given: Any) -> Any:
    """Return copies in which floating-point tensors are float64."""
    leaves = [
        leaf.detach().clone().double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for _, leaf in named_leaves(given)
    ]
    return rebuild(given, iter(leaves))


def calls(module: nn.Module, given: Any, seed: int) -> dict[str, Call]:
    """Return the first call of each part of a module, by name, parametrizations of weights not included."""
    seen: dict[str, Call] = {}
    with ExitStack() as stack, random_state(seed, _device(module)), torch.enable_grad():
        for name, part in module.named_modules():
            if name and "parametrizations" not in name.split("."):
                hook = part.register_forward_pre_hook(functools.partial(_record, seen, name), with_kwargs=True)
                stack.callback(hook.remove)
        leaves = [
            leaf.clone().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            for _, leaf in named_leaves(given)
        ]
        arguments, options = rebuild(given, iter(leaves))
        # Not the leaves themselves: layers that work in place may not touch those.
        _called(module, [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], (arguments, options))
    return seen


def _record(seen: dict[str, Call], name: str, part: nn.Module, arguments: Any, options: Any) -> None:
    if name in seen:
        return
    leaves = [leaf for _, leaf in named_leaves((arguments, options))]
    copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    moving = tuple(isinstance(leaf, Tensor) and leaf.requires_grad and _finite(leaf) for leaf in leaves)
    seen[name] = Call(part, rebuild((arguments, options), iter(copies)), moving)


def examined(call: Call, seed: int, tol: float, loss: Callable[[Any], Tensor] | None, *, inputs: bool) -> Finding:
    """Compare second derivatives of a call's output (made a number) in its parameters, and in its inputs if `inputs`.

    Without a loss the output o counts as `<c, o> + ‖o‖² / 2`, c random. A fault is looked at again without the square:
    where a part hides all of its own second derivative, that is then zero.
    """
    curved = _probe(call, seed, tol, loss, inputs, 1.0)
    if curved is None:
        return Finding(Verdict.RIGHT, 0.0, 0.0, NOTHING_TO_DO)
    found = curved.finding()
    if loss is None and found.verdict is Verdict.WRONG:
        linear = _probe(call, seed, tol, loss, inputs, 0.0)
        again = found if linear is None else linear.finding()
        return again if again.verdict is Verdict.VANISHES else found
    return found


def _probe(
    call: Call, seed: int, tol: float, loss: Callable[[Any], Tensor] | None, inputs: bool, square: float
) -> Probe | None:
    """Return the function of parameters (and inputs) to examine; None where nothing can be differentiated."""
    layer = FunctionalModule(call.module, call.module, call.module)
    leaves = [leaf for _, leaf in named_leaves(call.given)]
    names = list(layer.parameters())
    moved = [i for i, moving in enumerate(call.moving) if moving and inputs]
    point = [*layer.parameters().values(), *(leaves[i] for i in moved)]
    generator = torch.Generator().manual_seed(seed)

    def function(tensors: Sequence[Tensor]) -> Tensor:
        placed = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for i, tensor in zip(moved, tensors[len(names) :], strict=True):
            placed[i] = tensor.clone()
        arguments, options = rebuild(call.given, iter(placed))
        with random_state(seed, _device(call.module)):
            output = layer(dict(zip(names, tensors, strict=False)), *arguments, **options)
            return _number(output, square) if loss is None else loss(output)

    if not point or not _differentiable(function, point):
        return None
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) * _scale(p) for p in point]
    return Probe(function, point, direction, tol)


def _differentiable(function: Callable[[Sequence[Tensor]], Tensor], point: list[Tensor]) -> bool:
    with torch.enable_grad():
        return function([p.detach().clone().requires_grad_() for p in point]).requires_grad


def _number(output: Any, square: float) -> Tensor:
    """Return `<c, o> + square ‖o‖² / 2` over the floating-point tensors o of an output."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for o in tensors_in(output):
        if o.is_floating_point() and o.requires_grad:
            c = torch.randn(o.shape, generator=generator, dtype=o.dtype).to(o.device)
            total = total.to(o.device) + (c * o).sum() + square * o.square().sum() / 2
    return total


def _called(module: nn.Module, leaves: list[Any], like: Any) -> None:
    arguments, options = rebuild(like, iter(leaves))
    FunctionalModule(module, module, module)(dict(_trainable(module)), *arguments, **options)


def _trainable(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _scale(tensor: Tensor) -> float:
    """Return the typical size of entries, 1 where all are 0."""
    size = float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
    return size if size > 0 else 1.0


def _finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
