"""Weight normalization in plain operations, for modules that are differentiated twice outside of `functional`."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from bilevel.modules._normalization import PlainWeightNorm
from bilevel.status import InvalidProblem

M = TypeVar("M", bound=nn.Module)


def weight_norm(module: M, name: str = "weight", dim: int | None = 0) -> M:
    """Reparametrize a weight as `g v / ‖v‖`, in place, like `torch.nn.utils.parametrizations.weight_norm`.

    Values, gradients and names of parameters (`parametrizations.weight.original0` for g, `original1` for v) are those
    of torch's, so that state dicts fit; second derivatives are right, too. Those of torch's fused kernel are wrong on
    the CPU for the first and the last dim, without an error. A weight that torch's parametrization normalizes already
    keeps its g and v, and `dim` is the one it has.

    Args:
        module: a layer, such as `nn.Linear`.
        name: of the weight.
        dim: which dim of the weight is left out of the norms, so that there is one for each of its indices; None: one
            norm of it all.

    Returns:
        The module.

    Raises:
        InvalidProblem: the module has no such weight.

    Notes:
        Not needed for modules that go through `bilevel.functional`, which does it by itself.

    References:
        Salimans, Kingma, "Weight normalization", NeurIPS 2016.

    Example:
        >>> import torch
        >>> layer = weight_norm(nn.Linear(3, 2))
        >>> sorted(name for name, _ in layer.named_parameters())
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    if not isinstance(getattr(module, name, None), Tensor):
        raise InvalidProblem(f"weight_norm: {type(module).__name__} has no tensor {name!r}.")
    if parametrize.is_parametrized(module, name):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        steps = module.parametrizations[name]
        assert isinstance(steps, parametrize.ParametrizationList)
        theirs = [index for index, step in enumerate(steps) if isinstance(step, _WeightNorm)]
        for index in theirs:
            steps[index] = PlainWeightNorm(steps[index].dim)  # type: ignore[arg-type]
        if theirs:
            return module
    parametrize.register_parametrization(module, name, PlainWeightNorm(-1 if dim is None else dim), unsafe=True)
    return module
