"""Plain training of the demo's linear model: what the cleaning is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel.optimizers import LBFGS
from bilevel.problems._datasets import Part

DECAYS = (0.1, 0.03, 0.01, 0.003)
TOL = 1e-3
MAX_STEPS = 150


def train(part: Part, decay: float, start: Tensor | None = None) -> Tensor:
    """Minimize mean cross-entropy + `decay ‖y‖^2 / 2` of a linear softmax model by L-BFGS.

    Args:
        part: images `[n, d]` and labels from 0 to 9.
        decay: > 0, of weights and biases alike, as in `bilevel.problems.clean`.
        start: `[d + 1, 10]`, 0 if None.

    Returns:
        Weights, the biases as last row: `[d + 1, 10]`.
    """
    shape = part.inputs.shape[1] + 1, 10

    def objective(flat: Tensor) -> tuple[Tensor, Tensor]:
        y = flat.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(logits(y.view(shape), part.inputs), part.targets) + 0.5 * decay * y.square().sum()
            (gradient,) = torch.autograd.grad(loss, y)
        return loss.detach(), gradient

    first = part.inputs.new_zeros(shape) if start is None else start
    return LBFGS(tol=TOL, max_steps=MAX_STEPS).minimize(objective, first.flatten()).y.view(shape)


def logits(y: Tensor, images: Tensor) -> Tensor:
    """Return the linear model's logits `[n, 10]`."""
    return torch.addmm(y[-1], images, y[:-1])


def accuracy(y: Tensor, part: Part) -> float:
    """Return the share of digits that the model tells right."""
    return float((logits(y, part.inputs).argmax(-1) == part.targets).double().mean())


def joined(*parts: Part) -> Part:
    """Return all examples of some parts."""
    return Part(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))


def where(part: Part, chosen: Tensor) -> Part:
    """Return the examples of a part that a mask or indices choose."""
    return Part(part.inputs[chosen], part.targets[chosen])


def hold_back(validation: Part) -> tuple[Part, Part]:
    """Split validation data into two thirds to fit on and a third to choose by. The order is random already."""
    cut = 2 * len(validation.targets) // 3
    return Part(*(each[:cut] for each in validation)), Part(*(each[cut:] for each in validation))


def best_decay(part: Part, held: Part, decays: Sequence[float] = DECAYS) -> float:
    """Return the decay whose model, trained on `part`, is most accurate on `held`; the larger one if two are equal."""
    y, best = None, (-1.0, decays[0])
    for decay in decays:  # from strong to weak, so that each start is near its end
        y = train(part, decay, y)
        score = accuracy(y, held)
        best = (score, decay) if score > best[0] else best
    return best[1]


def trained_best(make: Callable[[Part], Part], validation: Part) -> tuple[Tensor, float]:
    """Choose a decay with a third of the validation data held back, then train with all of them.

    Args:
        make: validation data that may be trained on -> all data to train on.
        validation: all validation data.

    Returns:
        The model, and its decay.
    """
    fit, held = hold_back(validation)
    decay = best_decay(make(fit), held)
    return train(make(validation), decay), decay
