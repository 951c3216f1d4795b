"""A torch optimizer whose steps can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel.integrations.higher.model import FastModel
from bilevel.optimizers import SGD, Optimizer
from bilevel.optimizers.adam import AdamState
from bilevel.optimizers.from_torch import of_settings
from bilevel.optimizers.sgd import SGDState
from bilevel.status import InvalidProblem

Override: TypeAlias = Mapping[str, Sequence[Any]]
"""Setting -> a list of one value for all parameter groups, or of one for each; values may be tensors with a graph."""

GradCallback: TypeAlias = Callable[[list[Tensor | None]], Sequence[Tensor | None]]


@final
class DifferentiableOptimizer:
    """The steps of a torch optimizer, as differentiable functions of weights, settings and the state it had.

    Args:
        other: `torch.optim.SGD`, `Adam` or `AdamW`, with any parameter groups; its state (momentum) is copied.
        reference_params: all parameters of the model, in order.
        fmodel: the model whose fast weights are stepped; None: weights are passed to `step`.
        device: where to put the state.
        override: settings that replace those of the groups, for instance `{"lr": [rate]}` with a tensor to be learned.
        grad_callback: gradients -> gradients, both in the order of the parameters (None: unused), such as clipping.
        track_higher_grads: keep the graph through the steps.

    Raises:
        InvalidProblem: another optimizer, a setting unknown to it, an override of the wrong length, or a parameter of
            the optimizer that is none of the model's.

    Notes:
        Values are those of torch's optimizers, `maximize` included, and derivatives the true ones of these values.
        `higher` ignores `maximize`, has no AdamW, and puts Adam's eps elsewhere than torch does.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: FastModel | None = None,
        device: torch.device | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
    ) -> None:
        self.kind = type(other)
        # A scheduler's own note of where it began is no setting: the rate of now is taken, as torch would.
        beside = ("params", "initial_lr")
        self.groups = [{k: v for k, v in group.items() if k not in beside} for group in other.param_groups]
        self.fmodel, self.grad_callback, self.track_higher_grads = fmodel, grad_callback, track_higher_grads
        place = {id(parameter): index for index, parameter in enumerate(reference_params)}
        self.places: list[list[int]] = []
        self.states: dict[int, Any] = {}
        for group in other.param_groups:
            self.places.append([])
            for parameter in group["params"]:
                if id(parameter) not in place:
                    raise InvalidProblem(
                        f"the optimizer steps a parameter of shape {tuple(parameter.shape)} that the model does not "
                        "have; build it from model.parameters()."
                    )
                index = place[id(parameter)]
                self.places[-1].append(index)
                self.states[index] = _state(self.kind, parameter, other.state.get(parameter, {}), device)
        self._override(override)
        self._optimizers()  # refuses at the door what no step could use

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
    ) -> list[Tensor]:
        """Return the weights after one step down the loss; the model, if there is one, takes them.

        Args:
            loss: 0-dim, a function of the weights.
            params: the weights, if there is no model, or to replace the model's.
            override: as above; it stays in force.
            grad_callback: for this step.

        Raises:
            InvalidProblem: no weights, or an override of the wrong length.
        """
        self._override(override)
        if params is None and self.fmodel is None:
            raise InvalidProblem("pass params=... to step: this optimizer has no model with fast weights.")
        now = list(self.fmodel.fast_params if params is None and self.fmodel is not None else params or [])
        gradients = _gradients(loss, now, self.track_higher_grads)
        callback = grad_callback or self.grad_callback
        after = self._stepped(now, gradients if callback is None else list(callback(gradients)))
        if not self.track_higher_grads:
            after = [weight.detach().requires_grad_(weight.requires_grad) for weight in after]
        if self.fmodel is not None:
            self.fmodel.update_params(after)
        return after

    def _stepped(self, now: list[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
        after = list(now)
        for optimizer, places in zip(self._optimizers(), self.places, strict=True):
            for index in places:
                gradient = gradients[index]
                if gradient is None:  # frozen or unused: torch's optimizers leave it as it is, weight decay included
                    continue
                state = _fitting(optimizer, self.states[index], now[index])
                after[index], self.states[index] = optimizer.update(now[index], gradient, state)
        return after

    def _optimizers(self) -> list[Optimizer[Any]]:
        return [of_settings(self.kind, group) for group in self.groups]

    def _override(self, override: Override | None) -> None:
        for name, values in (override or {}).items():
            if len(values) not in (1, len(self.groups)):
                raise InvalidProblem(
                    f"override['{name}'] has {len(values)} values for {len(self.groups)} parameter groups; give one "
                    "value, or one for each group."
                )
            for k, group in enumerate(self.groups):
                value = values[0] if len(values) == 1 else values[k]
                group[name] = tuple(value) if isinstance(value, list) else value


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: FastModel | None = None,
    device: torch.device | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
) -> DifferentiableOptimizer:
    """Return the differentiable steps of an optimizer; see `DifferentiableOptimizer`."""
    return DifferentiableOptimizer(
        opt, reference_params, fmodel, device, override, track_higher_grads=track_higher_grads
    )


def _gradients(loss: Tensor, weights: Sequence[Tensor], graph: bool) -> list[Tensor | None]:
    moving = [weight for weight in weights if weight.requires_grad]
    found = iter(torch.autograd.grad(loss, moving, create_graph=graph, allow_unused=True))
    return [next(found) if weight.requires_grad else None for weight in weights]


def _state(
    kind: type[torch.optim.Optimizer], parameter: Tensor, known: Mapping[str, Any], device: torch.device | None
) -> Any:
    """Return the state that a torch optimizer has gathered for one parameter; None where there is none."""
    tensors = {name: value.detach().clone().to(device) for name, value in known.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if name != "step" and tensor.shape != parameter.shape:
            raise InvalidProblem(
                f"the optimizer's {name} has shape {tuple(tensor.shape)}, its parameter {tuple(parameter.shape)}: its "
                "state is that of another model."
            )
    if kind is torch.optim.SGD:
        buffer = tensors.get("momentum_buffer")
        return None if buffer is None else SGDState(1, buffer)
    if "exp_avg" not in tensors:
        return None
    mean, square = tensors["exp_avg"], tensors["exp_avg_sq"]
    return AdamState(int(known["step"]), mean, square, tensors.get("max_exp_avg_sq", mean.new_zeros(0)))


def _fitting(optimizer: Optimizer[Any], state: Any, weight: Tensor) -> Any:
    """Return the state; a new one before the first step, and where an override brought momentum in on the way."""
    started = isinstance(optimizer, SGD) and state is not None and state.buffer.shape != weight.shape
    fresh = optimizer.init(weight.detach())
    if state is None or (started and fresh.buffer.shape == weight.shape):
        return fresh
    return state
