"""The lower level's constraints as one vector (c, then h), and their multipliers in the user's units."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from bilevel.linear._lanczos import random_signs
from bilevel.linearization import gradients, join, leaves_of
from bilevel.oracles import Constraint, ConstraintGradient, Oracles
from bilevel.smoothness import smoothness

NEARBY = 0.1
FORGET = 0.99


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

    def by_block(self) -> Tensor:
        """Return the gradients in y as one matrix `[n, d]`, or one for each block `[m, n, d]`."""
        return self.y if self.y.dim() == 2 else self.y.transpose(0, 1)


class Scale(NamedTuple):
    """How constraints are scaled: what steps of multipliers rest on, measured at the start.

    Args:
        norms: typical lengths of the gradients in y near the start, `[n]` or `[m, n]`: the larger of those there and
            at a point nearby, since a gradient may vanish at the start. 1 where both vanish.
        start: largest singular value of the gradients at the start, each over its norm (over all blocks), at least 1;
            0-dim. 0 without constraints.
        coupling: the same now, as far as it was seen on the way, and at least `start`.
        bend: curvature in (x, y) of the sum of all constraints, each over its norm; 0-dim, 0 for linear ones.
        inequalities: how many constraints are inequalities; they come first.
    """

    norms: Tensor
    start: Tensor
    coupling: Tensor
    bend: Tensor
    inequalities: int

    def curvature(self, multiplier: Tensor) -> Tensor:
        """Estimate the curvature of `<multiplier, (c, h)>` in (x, y), from above where all constraints are convex."""
        if not multiplier.numel():
            return self.bend
        return self.bend * (multiplier.abs() * self.norms).amax()

    def followed(self, change: Tensor, apart: Tensor) -> Scale:
        """Follow the coupling by what the constraints change over a move of y: up at once, down slowly. 0 gradients."""
        distance = apart.norm()
        slope = (change / self.norms).norm() / distance.clamp_min(torch.finfo(apart.dtype).tiny)
        now = torch.maximum(slope, FORGET * self.coupling + (1 - FORGET) * slope)
        # Shorter moves show rounding.
        seen = distance > torch.finfo(apart.dtype).eps ** 0.5
        return self._replace(coupling=torch.where(seen, torch.maximum(now, self.start), self.coupling))

    @classmethod
    def measure(cls, oracles: Oracles, x: Tensor, y: Tensor) -> Scale:
        """Measure at a start. Cost: 2 gradients for each constraint, and 16 of all of them."""
        rows = constraint_rows(oracles, x, y)
        if not rows.value.numel():
            none = y.new_zeros(())
            return cls(torch.zeros_like(rows.value), none, none, none, 0)
        spread = NEARBY * (1 + y.norm()) * random_signs(y, 0) / y.shape[-1] ** 0.5
        near = constraint_rows(oracles, x, oracles.project_y(y + spread))
        norms = torch.maximum(rows.by_block().norm(dim=-1), near.by_block().norm(dim=-1).nan_to_num(0.0, 0.0))
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        coupling = torch.linalg.matrix_norm(rows.by_block() / norms[..., None], 2).amax().clamp_min(1.0)

        def summed(v: Tensor) -> Tensor:
            found = constraint_terms(oracles, v[: len(x)], v[len(x) :].view(y.shape), 1 / norms, rows.inequalities)
            return torch.cat([found.x, found.y.flatten()])

        bend = smoothness(summed, torch.cat([x, y.flatten()]))
        # Below this, differences of gradients are rounding: the constraints are linear.
        bend = torch.where(bend > torch.finfo(y.dtype).eps ** 0.5, bend, torch.zeros_like(bend))
        return cls(norms, coupling, coupling, bend.nan_to_num(0.0), rows.inequalities)


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
