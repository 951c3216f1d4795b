"""The lower level's constraints as one vector (c, then h), and their multipliers in the user's units."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from bilevel.linearization import gradients, join, leaves_of
from bilevel.oracles import Constraint, ConstraintGradient, Oracles


class Rows(NamedTuple):
    """c and h at one point with their gradients, detached; n entries (of each block, with m blocks).

    Args:
        value: `[n]` or `[m, n]`.
        x: `[n, p]`; with blocks each row is summed over blocks.
        y: `[n, d]` or `[n, m, d]`.
        inequalities: how many of the n come from c; the rest are equalities.
    """

    value: Tensor
    x: Tensor
    y: Tensor
    inequalities: int

    @property
    def norms(self) -> Tensor:
        """Lengths of the gradients in y, shaped like `value`; 1 for those that vanish."""
        norms = self.y.norm(dim=-1)
        norms = norms if norms.dim() == 1 else norms.T
        return torch.where(norms > 0, norms, torch.ones_like(norms))

    @property
    def coupling(self) -> Tensor:
        """Largest singular value of the gradients in y, each scaled to length 1 (over all blocks); 0-dim."""
        if not len(self.y):
            return self.y.new_zeros(())
        by_block = self.y if self.y.dim() == 2 else self.y.transpose(0, 1)
        largest: Tensor = torch.linalg.matrix_norm(by_block / self.norms[..., None], 2).amax().clamp_min(1.0)
        return largest


def names(oracles: Oracles) -> list[Constraint]:
    """Return which of constraint and equality the problem has."""
    return [name for name in get_args(Constraint) if getattr(oracles.problem, name) is not None]


def constraint_rows(oracles: Oracles, x: Tensor, y: Tensor, step: int = 0) -> Rows:
    """Return all constraints with their gradients. n gradients."""
    values, in_x, in_y, inequalities = [y.new_zeros((*y.shape[:-1], 0))], [x.new_zeros(0, len(x))], [], 0
    in_y.append(y.new_zeros((0, *y.shape)))
    for name in names(oracles):
        xs, ys = leaves_of(oracles.x_layout, x), leaves_of(oracles.y_layout, y)
        with torch.enable_grad():
            value = oracles.call(name, step, xs, ys)
            for i in range(value.shape[-1]):
                found = gradients([value[..., i].sum()], [*xs, *ys], retain_graph=True)
                in_x.append(join(oracles.x_layout, found[: len(xs)], (), x)[None])
                in_y.append(join(oracles.y_layout, found[len(xs) :], (), y)[None])
        oracles.count(gradients=value.shape[-1])
        values.append(value.detach())
        inequalities += value.shape[-1] if name == "constraint" else 0
    return Rows(torch.cat(values, -1), torch.cat(in_x), torch.cat(in_y), inequalities)


def constraint_terms(
    oracles: Oracles, x: Tensor, y: Tensor, multiplier: Tensor | None, inequalities: int, step: int = 0
) -> ConstraintGradient:
    """Return (c, h) and the gradients of `<multiplier, (c, h)>`. One gradient each; without a multiplier one value."""
    value, in_x, in_y = [y.new_zeros((*y.shape[:-1], 0))], torch.zeros_like(x), torch.zeros_like(y)
    parts = {"constraint": slice(None, inequalities), "equality": slice(inequalities, None)}
    for name in names(oracles):
        weights = None if multiplier is None else multiplier[..., parts[name]]
        term = oracles.constraint(x, y, weights, step, name=name)
        value, in_x, in_y = [*value, term.value], in_x + term.x, in_y + term.y
    return ConstraintGradient(torch.cat(value, -1), in_x, in_y)


def clipped(multiplier: Tensor, bound: float, inequalities: int) -> Tensor:
    """Return the multipliers within `[0, bound]`, those of equalities within `[-bound, bound]`."""
    signed = multiplier.clamp(-bound, bound)
    return torch.cat([signed[..., :inequalities].clamp_min(0), signed[..., inequalities:]], -1)


def violation(value: Tensor, inequalities: int) -> Tensor:
    """Return c where it is positive (else 0) and h, signed, shaped like `value`."""
    return torch.cat([value[..., :inequalities].clamp_min(0), value[..., inequalities:]], -1)
