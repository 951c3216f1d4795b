"""Weight and spectral normalization in plain operations, where torch's own hide second derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as _WeightNormHook


def make_exact(module: nn.Module) -> None:
    """Replace the normalizations of weights in a module, in place, by pure functions of the parameters.

    Weight normalization keeps its values. Spectral normalization divides by the largest singular value itself, where
    torch divides by an estimate that a hidden, undifferentiated power iteration improves with each call.
    """
    for part in module.modules():
        for key, hook in part._forward_pre_hooks.items():
            if isinstance(hook, _WeightNormHook):
                part._forward_pre_hooks[key] = _PlainWeightNormHook(hook.name, hook.dim)
            elif isinstance(hook, _SpectralNormHook):
                part._forward_pre_hooks[key] = _ExactSpectralNormHook(hook.name, hook.dim)
        if isinstance(part, ParametrizationList):
            for index, step in enumerate(part):
                if isinstance(step, _WeightNorm):
                    part[index] = PlainWeightNorm(step.dim)
                elif isinstance(step, _SpectralNorm):
                    part[index] = _ExactSpectralNorm(step)


def refresh_singular_vectors(module: nn.Module) -> None:
    """Give torch's spectral normalizations in a module the exact singular vectors of its present weights, in place."""
    for weight, dim, u, v in _spectral_norms(module):
        left, _, right = torch.linalg.svd(_as_matrix(weight.detach(), dim), full_matrices=False)
        u.copy_(left[:, 0])
        v.copy_(right[0])


def _spectral_norms(module: nn.Module) -> Iterator[tuple[Tensor, int, Tensor, Tensor]]:
    """Yield the weight before normalization, its dim and the buffers u and v of each spectral normalization."""
    for part in module.modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, _SpectralNormHook):
                weight, u, v = (getattr(part, hook.name + suffix) for suffix in ("_orig", "_u", "_v"))
                yield weight, hook.dim, u, v
        if isinstance(part, ParametrizationList):
            weight = getattr(part, "original", None)
            for step in part:
                if isinstance(step, _SpectralNorm) and weight is not None and weight.dim() > 1:
                    yield weight, step.dim, step._u, step._v
                weight = None if weight is None else step(weight)


def _plain_weight_norm(g: Tensor, v: Tensor, dim: int) -> Tensor:
    # torch._weight_norm is fused for the first and the last dim, and its double backward is wrong there: Hessian-vector
    # products in v are off by 36 % to 185 % (torch 2.13, CPU, float64, against differences of gradients).
    norm: Tensor = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm)


def _exact_spectral_norm(weight: Tensor, dim: int) -> Tensor:
    # Torch's u and v are constants for autograd: measured as above, Hessian-vector products in training mode are off by
    # 9 %. Needs a largest singular value that is simple.
    largest: Tensor = torch.linalg.matrix_norm(_as_matrix(weight, dim), 2)
    return weight / largest


def _as_matrix(weight: Tensor, dim: int) -> Tensor:
    return weight.movedim(dim, 0).flatten(1)


@final
class PlainWeightNorm(nn.Module):
    """`weight = g v / ‖v‖`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Return the weight."""
        return _plain_weight_norm(g, v, self.dim)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return g and v of a weight."""
        return torch.norm_except_dim(weight, 2, self.dim), weight


@final
class _PlainWeightNormHook:
    """The same, set before each call."""

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim = name, dim

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        weight = _plain_weight_norm(getattr(module, self.name + "_g"), getattr(module, self.name + "_v"), self.dim)
        setattr(module, self.name, weight)


@final
class _ExactSpectralNorm(nn.Module):
    """`weight / (its largest singular value)`; it keeps torch's buffers, so that names stay, and reads none."""

    def __init__(self, like: _SpectralNorm) -> None:
        super().__init__()
        self.dim = like.dim
        for name, buffer in like.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return nn.functional.normalize(weight, dim=0)
        return _exact_spectral_norm(weight, self.dim)


@final
class _ExactSpectralNormHook:
    """The same, set before each call."""

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim = name, dim

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        setattr(module, self.name, _exact_spectral_norm(getattr(module, self.name + "_orig"), self.dim))
