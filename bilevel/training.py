"""Training as a process: one lower step as a pure function of its state, with its derivative in two stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.declared import Declared
from bilevel.layout import named_leaves, rebuild
from bilevel.linearization import SecondDerivatives, gradients, join, leaves_of, second_derivatives
from bilevel.optimizers import Optimizer
from bilevel.oracles import Oracles, tensors_in
from bilevel.status import InvalidProblem, NonFinite


class TrainingState(NamedTuple):
    """Where training stands: the weights and the optimizer's state, counters included.

    Random numbers inside the objective are seeded by the step, and buffers of modules are functional, so that neither
    is part of the state.
    """

    y: Tensor
    optimizer: Any


class Cotangent(NamedTuple):
    """The derivative of the upper objective in a training state, and what has come out for x so far.

    Args:
        y: in the weights.
        optimizer: in the tensors of the optimizer's state, in order.
        x: in x, direct and through the steps visited, `[p]`.
        largest: the largest norm of `y` so far, 0-dim.
        contribution: norm of what the step visited last added to `x`, 0-dim.
    """

    y: Tensor
    optimizer: tuple[Tensor, ...]
    x: Tensor
    largest: Tensor
    contribution: Tensor


def tensors_of(optimizer_state: Any) -> list[Tensor]:
    """Return the tensors of an optimizer's state, in order."""
    return tensors_in(optimizer_state)


def with_tensors(optimizer_state: Any, tensors: list[Tensor]) -> Any:
    """Return an optimizer's state with other tensors, in order."""
    rest = iter(tensors)
    leaves = (next(rest) if isinstance(leaf, Tensor) else leaf for _, leaf in named_leaves(optimizer_state))
    return rebuild(optimizer_state, leaves)


@dataclass(frozen=True)
class Training:
    """Lower steps at one x: `s' = h(s, x)` with `g = dg/dy(x, y)` and `(y', b') = update(y, g, b, x)`.

    It is a `bilevel.replay.Process`. The derivative of a step is taken in two stages: first through `update`, which is
    elementwise and yields the cotangent u of g; then `H u` and `J^T u` in one pass over the graph of g.

    Args:
        oracles: the problem's derivatives.
        optimizer: of the lower level; its hyperparameters may be functions of `(x, step)`.
        x: `[p]`.
        first_batch: the lower batch of step 0.
        microbatches: parts into which each batch is split; a lower objective that is a mean over the batch is the
            same with any number of them, and the graph of one part is held at a time.
    """

    oracles: Oracles
    optimizer: Optimizer[Any]
    x: Tensor
    first_batch: int = 0
    microbatches: int = 1

    def start(self, y: Tensor, optimizer_state: Any = None) -> TrainingState:
        """Return the state before the first step."""
        return TrainingState(y, self.optimizer.init(y) if optimizer_state is None else optimizer_state)

    def advance(self, step: int, state: TrainingState) -> TrainingState:
        """Return the state after a step, without a derivative."""
        with torch.no_grad():
            gradient = self._gradient(step, state.y)
            return TrainingState(*self.optimizer.update(state.y, gradient, state.optimizer, self._nested))

    def linearize(self, step: int, state: TrainingState) -> tuple[TrainingState, Callable[[Cotangent], Cotangent]]:
        """Return the state after a step, and the map that pulls a cotangent back through it."""
        parts = self._linearized(step, state.y) if self.microbatches == 1 else None
        if parts is None:
            gradient = self._gradient(step, state.y)
        else:
            self.oracles.count(gradients=1)
            gradient = self._declared.add_gradient(parts.gradient, state.y)
        xs = leaves_of(self.oracles.x_layout, self.x)
        buffers = tensors_of(state.optimizer)
        with torch.enable_grad():
            inputs = [_source(t) for t in (state.y, gradient, *buffers)]
            optimizer_state = with_tensors(state.optimizer, inputs[2:])
            y, after = self.optimizer.update(inputs[0], inputs[1], optimizer_state, self.oracles.x_layout.nest(xs))
        # Only what the derivative needs is held: not the values of inputs and outputs.
        outputs = [y, *tensors_of(after)]
        live = [i for i, t in enumerate(outputs) if t.requires_grad]
        ends: list[Any] = [get_gradient_edge(outputs[i]) for i in live]
        starts: list[Any] = [*(get_gradient_edge(t) for t in inputs), *xs]
        shapes = [(b.shape, b.dtype, b.device) for b in buffers]
        reached = TrainingState(y.detach(), with_tensors(after, [t.detach() for t in outputs[1:]]))
        at = state.y if parts is None or self._declared.regularizer is not None else None
        count = len(inputs)
        del inputs, outputs, optimizer_state, y, after, gradient, buffers, state

        def pull(a: Cotangent) -> Cotangent:
            along = [a.y, *a.optimizer]
            found = torch.autograd.grad(ends, starts, [along[i] for i in live], allow_unused=True)
            in_y, u, in_buffers, in_x = found[0], found[1], found[2:count], found[count:]
            added = join(self.oracles.x_layout, in_x, (), self.x) if any(g is not None for g in in_x) else None
            y_total = torch.zeros_like(a.y) if in_y is None else in_y
            if u is not None:
                through_y, through_x = self._products(step, at, u, parts)
                # Several leaves were just concatenated; the product of a single one may be u itself.
                fresh = len(self.oracles.y_layout.names) > 1
                y_total = through_y.add_(y_total) if fresh else through_y + y_total
                added = through_x if added is None else added + through_x if through_x is not None else added
            filled = tuple(
                torch.zeros(shape, dtype=dtype, device=device) if g is None else g
                for g, (shape, dtype, device) in zip(in_buffers, shapes, strict=True)
            )
            return self._checked(step, a, y_total, filled, added)

        return reached, pull

    def _checked(
        self, step: int, a: Cotangent, y: Tensor, buffers: tuple[Tensor, ...], added: Tensor | None
    ) -> Cotangent:
        size = y.norm()
        contribution = size.new_zeros(()) if added is None else added.norm()
        if not bool((size + contribution).isfinite()):
            layout = self.oracles.y_layout if not bool(size.isfinite()) else self.oracles.x_layout
            flat = y.reshape(-1, layout.size) if not bool(size.isfinite()) else added
            assert flat is not None
            bad = (~flat.reshape(-1, layout.size).isfinite()).any(0).nonzero()
            leaf = layout.name_of(int(bad[0])) if len(bad) else layout.names[0]
            raise NonFinite(
                f"the metagradient is not finite from lower step {step} down, first in leaf '{leaf}': the derivative "
                "of that step is infinite (a root or a division at zero), or growth overflowed. Shorten the lower "
                "steps, truncate, or give Adam eps_root > 0."
            )
        total = a.x if added is None else a.x + added
        return Cotangent(y, buffers, total, torch.maximum(a.largest, size), contribution)

    # -- the gradient and its products, whole or in parts ------------------------------------------------------------

    def _linearized(self, step: int, y: Tensor, rows: slice | None = None) -> SecondDerivatives:
        oracles = self.oracles
        evaluate = oracles.lower_at(self.first_batch + step, rows)
        return second_derivatives(oracles.way, evaluate, oracles.x_layout, oracles.y_layout, self.x, y)

    def _gradient(self, step: int, y: Tensor) -> Tensor:
        oracles, number = self.oracles, self.first_batch + step
        if oracles.way == "math_attention":
            with sdpa_kernel(SDPBackend.MATH):
                return self._plain_gradient(number, y)
        return self._plain_gradient(number, y)

    def _plain_gradient(self, number: int, y: Tensor) -> Tensor:
        oracles = self.oracles
        if self.microbatches == 1:
            return self._declared.add_gradient(oracles.lower_gradient(self.x, y, number, declared=False)[1], y)
        oracles.count(gradients=1)
        total = torch.zeros_like(y)
        for rows, share in self._parts(number):
            xs, ys = leaves_of(oracles.x_layout, self.x, requires_grad=False), leaves_of(oracles.y_layout, y)
            with torch.enable_grad():
                found = gradients([oracles.lower_at(number, rows)(xs, ys)], ys)
            total.add_(join(oracles.y_layout, found, (), y), alpha=share)
        return self._declared.add_gradient(total, y)

    def _products(
        self, step: int, y: Tensor | None, u: Tensor, whole: SecondDerivatives | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return H u and J^T u (None where x does not enter)."""
        self.oracles.count(hvps=1, crosses=1)
        in_x: list[Tensor | None]
        if whole is not None:
            in_y, in_x = whole.both_products(u)
        else:
            assert y is not None
            in_y, in_x = torch.zeros_like(y), [None] * len(self.oracles.x_layout.names)
            for rows, share in self._parts(self.first_batch + step):
                part_y, part_x = self._linearized(step, y, rows).both_products(share * u)
                in_y.add_(part_y)
                in_x = _added(in_x, part_x)
        if self._declared.regularizer is not None:
            assert y is not None
            in_y = in_y + self._declared.hvp(y, u)
            in_x = _added(in_x, self._declared.cross(y, u))
        if all(leaf is None for leaf in in_x):
            return in_y, None
        return in_y, join(self.oracles.x_layout, in_x, (), self.x)

    def _parts(self, number: int) -> list[tuple[slice, float]]:
        lengths = {t.shape[0] if t.dim() else 0 for t in tensors_in(self.oracles.batch("lower", number))}
        if len(lengths) != 1 or 0 in lengths or self.oracles.problem.blocks is not None:
            raise InvalidProblem(
                f"microbatches={self.microbatches} needs lower batches whose tensors share their leading dimension, "
                f"and no blocks; found lengths {sorted(lengths)}. Use microbatches=1."
            )
        length = lengths.pop()
        parts = min(self.microbatches, length)
        bounds = [i * length // parts for i in range(parts + 1)]
        return [(slice(a, b), (b - a) / length) for a, b in pairwise(bounds)]

    @cached_property
    def _declared(self) -> Declared:
        return self.oracles.declared(self.x)

    @cached_property
    def _nested(self) -> Any:
        return self.oracles.x_layout.unflatten(self.x)


class _Source(torch.autograd.Function):
    """The identity, at whose output a derivative ends: unlike a leaf, its node does not hold the value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _source(value: Tensor) -> Tensor:
    source: Tensor = _Source.apply(value.detach(), torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
    return source


def _added(one: list[Tensor | None], other: list[Tensor | None]) -> list[Tensor | None]:
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]
