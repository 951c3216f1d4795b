"""An nn.Module as a pure function of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel.modules._copies import attributes, snapshot, unwrapped, working_copy
from bilevel.modules._normalization import refresh_singular_vectors
from bilevel.status import InvalidProblem


def functional(module: nn.Module, commit_buffers: bool = False) -> FunctionalModule:
    """Return a module as a function `net(y, *inputs)` of its trainable parameters y, a dict.

    The function owns a copy of the module as it is now: nothing it does changes the user's module (parameters, buffers
    and modes), and nothing that is done to the module later changes the function.

    - Frozen parameters (`requires_grad=False`) are constants, listed in `net.frozen`.
    - Tied parameters are one entry, under their first name; its gradient is the sum over their places.
    - BatchNorm in training mode uses the statistics of the batch and moves no running statistics; so it can be
      vectorized and differentiated twice. In evaluation mode it uses the running statistics.
    - Other buffers start each call as they are in the copy, so that a call leaves no trace in the next.
    - Weight normalization is computed in plain operations: the second derivatives of torch's fused kernel are wrong.
    - Spectral normalization divides by the largest singular value, in both modes: torch's running estimate of it is no
      function of y, and hides second derivatives. So values differ from the module's by the error of its estimate.
    - Wrappers of `torch.compile` and data parallelism are taken off.

    Args:
        module: its modes (training or evaluation, layer by layer) are kept; see `net.train()` and `net.eval()`.
        commit_buffers: write the buffers that a call changed (running statistics) into the user's module after each
            call, Hessian-vector products and line searches included; it cannot be vectorized (`blocks`). Calls then
            start from the user's current buffers.

    Raises:
        InvalidProblem: no parameter is trainable; or the module is sharded, scripted, lazy, or cannot be copied.

    Notes:
        On CUDA, double backward through recurrent layers needs `torch.backends.cudnn.flags(enabled=False)`; attention
        needs `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, on the CPU too.

    Example:
        >>> net = functional(nn.Linear(3, 2))
        >>> y = net.parameters()
        >>> sorted(y), net(y, torch.ones(5, 3)).shape
        (['bias', 'weight'], torch.Size([5, 2]))
    """
    original = unwrapped(module)
    template = snapshot(original)
    if not any(parameter.requires_grad for parameter in template.parameters()):
        names = [name for name, _ in template.named_parameters()]
        raise InvalidProblem(
            f"functional({type(original).__name__}): all {len(names)} parameters are frozen; "
            "call module.requires_grad_(True) on the parts to be trained."
        )
    source = original if commit_buffers else template
    return FunctionalModule(template, source, working_copy(template, None, commit_buffers))


@final
@dataclass(frozen=True, eq=False)
class FunctionalModule:
    """What `functional` returns: call it as `net(y, *inputs, **options)`, y a dict like `net.parameters()`.

    Args:
        template: the copy of the module, never called.
        source: whose buffers each call starts from, and changes if it is not the template.
        working: the copy that is called; it shares the template's tensors.
    """

    template: nn.Module = field(repr=False)
    source: nn.Module = field(repr=False)
    working: nn.Module

    def __call__(self, y: Mapping[str, Tensor], *inputs: Any, **options: Any) -> Any:
        """Return the module's output at parameters y.

        Raises:
            InvalidProblem: the names in y are not those of `parameters()`.
        """
        if y.keys() != self._trainable.keys():
            missing, unknown = self._trainable.keys() - y.keys(), y.keys() - self._trainable.keys()
            raise InvalidProblem(
                f"{type(self.working).__name__}: parameters missing: {sorted(missing)}, unknown: {sorted(unknown)}; "
                "y is a dict like net.parameters()."
            )
        buffers = dict(zip(self._buffer_names, (buffer.clone() for buffer in self.source.buffers()), strict=True))
        tensors, attributes_before = {**y, **buffers}, self._attributes
        try:
            output = torch.func.functional_call(self.working, tensors, inputs, options, tie_weights=self._has_ties)
        finally:
            for part, name, value in attributes_before:
                setattr(part, name, value)
        if self.source is not self.template:
            with torch.no_grad():
                for name, buffer in zip(self._buffer_names, self.source.buffers(), strict=True):
                    buffer.copy_(tensors[name])
        return output

    def parameters(self) -> dict[str, Tensor]:
        """Return a detached copy of each trainable parameter, by name: the start of training."""
        return {name: parameter.detach().clone() for name, parameter in self._trainable.items()}

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that are constants."""
        return tuple(name for name, parameter in self.template.named_parameters() if not parameter.requires_grad)

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """The further names of each parameter that has several."""
        first = {id(parameter): name for name, parameter in self.template.named_parameters()}
        others: dict[str, tuple[str, ...]] = {}
        for name, parameter in self.template.named_parameters(remove_duplicate=False):
            known = first[id(parameter)]
            if name != known:
                others[known] = (*others.get(known, ()), name)
        return others

    def train(self) -> FunctionalModule:
        """Return this function with all layers in training mode."""
        return self._in_mode(True)

    def eval(self) -> FunctionalModule:
        """Return this function with all layers in evaluation mode."""
        return self._in_mode(False)

    def module(self, y: Mapping[str, Tensor]) -> nn.Module:
        """Return a new module of the original class with copies of the values y, for inference or to be saved.

        Parameters that were tied or frozen are so again; buffers and modes are those of this function, except that
        spectral normalizations get the singular vectors of the new weights.
        """
        result = copy.deepcopy(self.template)
        for part, like in zip(result.modules(), self.working.modules(), strict=True):
            part.training = like.training
        with torch.no_grad():
            for name, parameter in result.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(y[name])
            for buffer, current in zip(result.buffers(), self.source.buffers(), strict=True):
                buffer.copy_(current)
            refresh_singular_vectors(result)
        return result

    def summary(self) -> str:
        """Return a few lines of text: what is trained, what is constant, what is tied."""
        sizes = [parameter.numel() for parameter in self._trainable.values()]
        ties = [f"{first} = {' = '.join(others)}" for first, others in self.tied.items()]
        buffers = list(self.template.buffers())
        kept = "discarded after each call" if self.source is self.template else "committed to the module"
        return "\n".join(
            [
                f"{type(self.template).__name__}: {sum(sizes)} trainable numbers in {len(sizes)} tensors",
                f"frozen: {len(self.frozen)} tensors" + "".join(f"\n  {name}" for name in self.frozen),
                f"tied: {len(ties)} tensors" + "".join(f"\n  {tie}" for tie in ties),
                f"buffers: {len(buffers)} tensors" + (f", changes {kept}" if buffers else ""),
            ]
        )

    @cached_property
    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.template.named_parameters() if parameter.requires_grad}

    @cached_property
    def _has_ties(self) -> bool:
        # Looking for ties at each call would cost a sixth of it in a deep narrow net.
        buffers = [name for name, _ in self.template.named_buffers(remove_duplicate=False)]
        return bool(self.tied) or len(buffers) > len(self._buffer_names)

    @cached_property
    def _buffer_names(self) -> list[str]:
        # Those of the source may differ: compiled parts add a prefix.
        return [name for name, _ in self.template.named_buffers()]

    @cached_property
    def _attributes(self) -> list[tuple[nn.Module, str, Tensor]]:
        """What to put back after each call: weights derived from parameters would keep its graph alive."""
        return list(attributes(self.working))

    def _in_mode(self, training: bool) -> FunctionalModule:
        commits = self.source is not self.template
        return FunctionalModule(self.template, self.source, working_copy(self.template, training, commits))
