"""The context of an inner loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bilevel.integrations.higher.model import FastModel
from bilevel.integrations.higher.optimizer import DifferentiableOptimizer, Override, get_diff_optim


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[FastModel, DifferentiableOptimizer]]:
    """Yield a model with fast weights and the differentiable steps of its optimizer, as `higher.innerloop_ctx` does.

        w_0 = weights of the model,   w_(t+1) = the optimizer's step from w_t,   all in one graph

    Args:
        model: never changed.
        opt: `torch.optim.SGD`, `Adam` or `AdamW` of the model's parameters.
        device: where to put weights and state; None: where they are.
        copy_initial_weights: start from copies, to which gradients do not flow further; False: from the model's own
            weights, so that `backward` leaves their metagradients in `model.parameters()`.
        override: settings -> list of one value, or one for each parameter group; may be tensors to be learned.
        track_higher_grads: keep the graph; False trains as usual, in the memory of one step.

    Raises:
        InvalidProblem: a module or an optimizer that is not supported.

    Cost:
        Memory grows with each step while the graph is kept. `bilevel.metagradient` has the same gradients in bounded
        memory.

    References:
        Grefenstette, Amos, Yarats, Htut, Molchanov, Meier, Kiela, Cho, Chintala (2019), "Generalized inner loop
        meta-learning", arXiv 1910.01727.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> inputs, targets, rate = torch.ones(4, 3), torch.ones(4, 1), torch.tensor(0.1, requires_grad=True)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with innerloop_ctx(model, optimizer, override={"lr": [rate]}) as (net, steps):
        ...     for _ in range(3):
        ...         weights = steps.step((net(inputs) - targets).square().mean())
        ...     (net(inputs) - targets).square().mean().backward()
        >>> bool(rate.grad < 0)
        True
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    yield fmodel, get_diff_optim(opt, model.parameters(), fmodel, device, override, track_higher_grads)


def monkeypatch(
    module: nn.Module,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> FastModel:
    """Return a module with fast weights; the arguments are those of `innerloop_ctx`. Nothing is patched here."""
    if copy_initial_weights:
        weights = [p.detach().clone().to(device).requires_grad_(p.requires_grad) for p in module.parameters()]
    else:
        weights = [p.clone().to(device) for p in module.parameters()]
    there = module if device is None else copy.deepcopy(module).to(device)
    return FastModel(there, weights, track_higher_grads)
