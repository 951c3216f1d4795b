"""A module that is called with the newest of its fast weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel.modules import functional
from bilevel.status import InvalidProblem


@final
class FastModel:
    """A module as a function of a list of weights, which remembers the lists that an inner loop went through.

    It owns a copy of the module: buffers (running statistics) move in the copy only, as they do in the module itself,
    and the user's module is never changed. Weight normalization is computed in plain operations, since the second
    derivatives of torch's fused kernel are wrong.

    Args:
        module: any `nn.Module` that `bilevel.functional` takes.
        params: the first fast weights, in the order of `module.parameters()`.
        track_higher_grads: remember every list; otherwise only the newest.

    Raises:
        InvalidProblem: `functional` cannot take the module.

    Notes:
        Unlike the patched modules of `higher` it is no `nn.Module`, and has no submodules: what can be read is
        `parameters()`, `named_parameters()`, `fast_params` and `init_fast_params`. Setting any other attribute raises.
    """

    __slots__ = ("_history", "_names", "_net", "track_higher_grads")

    def __init__(self, module: nn.Module, params: Sequence[Tensor], track_higher_grads: bool = True) -> None:
        # Frozen parameters are weights here like all others: an optimizer leaves them as they are.
        own = copy.deepcopy(module).requires_grad_(True)
        self._net = functional(own, commit_buffers=True)
        self._names = list(self._net.parameters())
        self._history: list[list[Tensor]] = []
        self.track_higher_grads = track_higher_grads
        self.update_params(params)

    def __call__(self, *inputs: Any, params: Sequence[Tensor] | None = None, **options: Any) -> Any:
        """Return the module's output at the newest weights, or at `params`, which then are the newest."""
        if params is not None:
            self.update_params(params)
        return self._net(dict(zip(self._names, self.fast_params, strict=True)), *inputs, **options)

    forward = __call__

    @property
    def fast_params(self) -> list[Tensor]:
        """The newest weights."""
        return self._history[-1]

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The first weights.

        Raises:
            InvalidProblem: they were not remembered.
        """
        return self._at(0)

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Tensor]:
        """Return the weights of a moment: 0 the first, then one list an update; None: the newest.

        Raises:
            InvalidProblem: they were not remembered.
        """
        return iter(self.fast_params if time is None else self._at(time))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Return the newest weights with the module's names."""
        return zip(self._names, self.fast_params, strict=True)

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Take a list of weights as the newest.

        Raises:
            InvalidProblem: it has another length than the module's parameters.
        """
        params = list(params)
        if len(params) != len(self._names):
            raise InvalidProblem(f"expected {len(self._names)} weights {self._names}, got {len(params)}.")
        self._history = [*self._history, params] if self.track_higher_grads else [params]

    def train(self, mode: bool = True) -> FastModel:
        """Set the mode of all layers; returns this model."""
        self._net = self._net.train() if mode else self._net.eval()
        return self

    def eval(self) -> FastModel:
        """Set evaluation mode; returns this model."""
        return self.train(False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that `backward` left in the first weights."""
        for weight in self._history[0]:
            if weight.is_leaf:
                weight.grad = None if set_to_none or weight.grad is None else torch.zeros_like(weight)

    def _at(self, time: int) -> list[Tensor]:
        if not self.track_higher_grads and time not in (-1, 0):
            raise InvalidProblem(f"weights of step {time} were not kept: track_higher_grads=False keeps the newest.")
        return self._history[time]
