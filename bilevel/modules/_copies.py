"""Private copies of modules, made fit to be differentiated twice as functions of their parameters."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from bilevel.modules._normalization import make_exact
from bilevel.status import InvalidProblem


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside data-parallel and compiled wrappers.

    Raises:
        InvalidProblem: the module is sharded or scripted, or has lazy parameters.
    """
    while (inner := _inner(module)) is not None:
        module = inner
    if _is_sharded(module):
        raise InvalidProblem(
            "functional(): the module is sharded (FSDP or DTensor), where functional calls return wrong numbers "
            "without an error; pass the module before sharding, and let every rank hold all parameters."
        )
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise InvalidProblem("functional(): a scripted module is no function of its parameters; pass the original.")
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise InvalidProblem(f"functional(): parameters {lazy} have no shape yet; call the module once on a batch.")
    return module


def _is_sharded(module: nn.Module) -> bool:
    # Only who shards has these modules loaded; importing them here would take half of the library's import time.
    fsdp, tensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    wrappers = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp is not None else ()
    kinds = (tensor.DTensor,) if tensor is not None else ()
    return any(isinstance(part, wrappers) for part in module.modules()) or any(
        isinstance(parameter, kinds) for parameter in module.parameters()
    )


def snapshot(module: nn.Module) -> nn.Module:
    """Return a deep copy in which compiled parts are their originals.

    Raises:
        InvalidProblem: the module cannot be copied.
    """
    # Weights derived from parameters (weight_norm) are kept as attributes with a graph, which deepcopy refuses.
    derived = {id(value): value.detach().clone() for _, _, value in attributes(module) if value.grad_fn is not None}
    try:
        private = copy.deepcopy(module, derived)
    except (RuntimeError, TypeError) as error:
        raise InvalidProblem(f"functional(): {type(module).__name__} cannot be copied: {error}") from error
    for part in list(private.modules()):
        for name, child in list(part.named_children()):
            while (inner := _inner(child)) is not None:
                child = inner
                setattr(part, name, child)
    return private


def working_copy(template: nn.Module, training: bool | None, commit_buffers: bool) -> nn.Module:
    """Return a copy of `template` to call: it shares its tensors, but its layers may be replaced.

    Args:
        template: a snapshot.
        training: the mode of all layers; as they are if None.
        commit_buffers: keep running statistics moving.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*template.parameters(), *template.buffers())}
    working = copy.deepcopy(template, shared)
    if training is not None:
        working.train(training)
    for part in working.modules():
        if isinstance(part, _NormBase) and part.training and not commit_buffers:
            part.track_running_stats = False
    make_exact(working)
    return working


def attributes(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the tensors that parts of a module hold as plain attributes, neither parameters nor buffers."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                yield part, name, value


def _inner(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper for data parallelism or compilation holds, or None."""
    wraps = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
    inner = module.module if wraps else getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None
