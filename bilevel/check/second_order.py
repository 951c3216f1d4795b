"""Whether a module's second derivatives are right, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as _WeightNormHook

from bilevel.check._layers import NOTHING_TO_DO, Call, arguments_of, calls, examined, in_float64
from bilevel.check._probe import Finding, Verdict
from bilevel.layout import named_leaves
from bilevel.modules._copies import snapshot, unwrapped
from bilevel.report import table
from bilevel.status import InvalidProblem

WHOLE = "(whole)"


@dataclass(frozen=True)
class LayerCheck:
    """What was found of one part of a module.

    Args:
        name: dotted, as in `named_modules()`; "(whole)" for the module.
        kind: its class.
        verdict: what the comparison says.
        error: relative distance of H u by double backward and by differences of the gradient; nan without a product.
        spread: relative distance of the differences at two step sizes: far above rounding there are kinks.
        advice: what to do, empty where nothing is.
    """

    name: str
    kind: str
    verdict: Verdict
    error: float
    spread: float
    advice: str = ""


@dataclass(frozen=True)
class SecondOrderReport:
    """Second derivatives of a module: the whole, and each of its parts by itself.

    Args:
        whole: of the loss in all trainable parameters.
        layers: of each part that was called, in its parameters and inputs.
    """

    whole: LayerCheck
    layers: tuple[LayerCheck, ...]

    @property
    def suspects(self) -> tuple[LayerCheck, ...]:
        """The innermost parts with a fault; the whole where no part has one, but the whole has."""
        faulty = [layer for layer in self.layers if layer.verdict.faulty]
        inner = tuple(layer for layer in faulty if not any(other.name.startswith(f"{layer.name}.") for other in faulty))
        return inner or ((self.whole,) if self.whole.verdict.faulty else ())

    @property
    def ok(self) -> bool:
        """Whether no fault was found."""
        return not self.suspects

    def __str__(self) -> str:
        rows = [
            {"layer": part.name, "kind": part.kind, "verdict": part.verdict.name.lower().replace("_", " "),
             "error": part.error, "spread": part.spread}
            for part in (*self.layers, self.whole)
        ]  # fmt: skip
        if self.ok:
            return f"second derivatives: no fault found\n{table(rows)}"
        found = [f"{part.name} ({part.kind}): {part.verdict.value}. {part.advice}" for part in self.suspects]
        return "\n".join([f"second derivatives: {len(found)} suspect(s)", table(rows), *found])


def check_second_order(
    module: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    tol: float = 1e-5,
    seed: int = 0,
) -> SecondOrderReport:
    """Compare products `H u` by double backward with differences of gradients, in a float64 copy of a module.

        H u  against  (grad(p + t u) - grad(p - t u)) / 2t,   t = 1e-4 and 1e-5 times the size of p

    for the whole module, and for each part by itself: with the inputs that the batch leads to it, in its parameters and
    these inputs. So the part that is wrong is named, not those before it. Where the two differ, still shorter steps are
    asked before anything is called a fault, so that kinks (relu, max pooling) are told from errors: differences across
    a kink contradict each other, and agree with H u once the step is short enough.

    Args:
        module: any; compiled and data-parallel wrappers are taken off. It is not changed.
        batch: what to call it with: one tensor, a tuple of arguments, or a dict of keyword arguments.
        loss: output -> 0-dim tensor; `<c, o> + ‖o‖² / 2` with a random c if None.
        tol: relative error that is no error, for tensors scaled to entries near 1.
        seed: of the direction u, and of randomness inside the module.

    Returns:
        The verdicts, with advice.

    Raises:
        InvalidProblem: the module cannot be copied or called, has nothing to train, or its output does not depend on
            it.

    Cost:
        4 to 10 gradients of the whole, and as many of each part, in float64.

    Notes:
        One point and one direction: a fault that shows elsewhere only is not seen. Parts that are called inside their
        parent's own code, not as modules, are seen as part of the parent.

    Example:
        >>> import torch
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), weight_norm(nn.Linear(8, 2)))
        >>> report = check_second_order(net, torch.ones(5, 4))
        >>> [(layer.name, layer.verdict.name) for layer in report.suspects]
        [('2', 'WRONG')]
    """
    if not isinstance(module, nn.Module):
        raise InvalidProblem(f"check_second_order takes an nn.Module, got {type(module).__name__}.")
    if not 0 < tol < 1:
        raise InvalidProblem(f"check_second_order(tol=...) must be between 0 and 1, got {tol}.")
    private = snapshot(unwrapped(module)).double()
    if not any(parameter.requires_grad for parameter in private.parameters()):
        raise InvalidProblem(
            f"check_second_order: no parameter of {type(private).__name__} is trainable; call requires_grad_(True)."
        )
    given = in_float64(arguments_of(batch))
    try:
        parts = calls(private, given, seed)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InvalidProblem(
            f"check_second_order: {type(private).__name__} cannot be called in float64 with this batch: {error}. Pass "
            "a tensor, a tuple of arguments or a dict of keyword arguments, and make no float32 tensors inside."
        ) from error
    root = Call(private, given, (False,) * len(list(named_leaves(given))))
    whole = examined(root, seed, tol, loss, inputs=False)
    if whole.message == NOTHING_TO_DO:
        raise InvalidProblem(
            f"check_second_order: the {'loss' if loss else 'output'} does not depend on the parameters of "
            f"{type(private).__name__} (.detach(), .item(), no_grad?)."
        )
    layers = [_check(name, call.module, examined(call, seed, tol, None, inputs=True)) for name, call in parts.items()]
    return SecondOrderReport(_check(WHOLE, private, whole), tuple(layers))


def _check(name: str, part: nn.Module, found: Finding) -> LayerCheck:
    advice = _advice(part, found) if found.verdict.faulty else ""
    return LayerCheck(name, type(part).__name__, found.verdict, found.error, found.spread, advice)


def _advice(part: nn.Module, found: Finding) -> str:
    said = f" (torch: {found.message[:200]})" if found.message else ""
    if found.verdict is Verdict.NON_FINITE:
        return "Look for sqrt, log, norm or a division at zero."
    if found.verdict is Verdict.MISSING and ("attention" in found.message or "sdp" in found.message):
        return (
            "Fused attention has no double backward: call it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), "
            f"which Problem(hvp='auto') does by itself{said}."
        )
    if found.verdict is Verdict.MISSING:
        return (
            "An operation inside can be differentiated once only: write it in plain operations, or use "
            f"Problem(hvp='differences') or a first-order solver{said}."
        )
    if _holds(part, _WeightNorm, _WeightNormHook):
        return (
            "Torch's fused weight normalization is wrong when differentiated twice: wrap the module, "
            "net = bilevel.functional(module), which computes it in plain operations; in code of your own use "
            "bilevel.weight_norm(layer) in place of torch's."
        )
    if _holds(part, _SpectralNorm, _SpectralNormHook):
        return (
            "Torch's spectral normalization takes its estimate of the singular vectors for constants: wrap the module, "
            "net = bilevel.functional(module), which divides by the singular value itself."
        )
    return (
        "A backward of its own hides (part of) the second derivative, as an autograd Function does that saves detached "
        "tensors: save with ctx.save_for_backward and compute backward by differentiable operations, or use "
        "Problem(hvp='differences') or a first-order solver."
    )


def _holds(part: nn.Module, step: type, hook: type) -> bool:
    return any(
        (isinstance(inner, ParametrizationList) and any(isinstance(each, step) for each in inner))
        or any(isinstance(each, hook) for each in inner._forward_pre_hooks.values())
        for inner in part.modules()
    )
