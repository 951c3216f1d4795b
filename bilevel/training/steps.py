"""Training as a process: one lower step as a pure function of its state, with its derivative in two stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.data._base import batch_after
from bilevel.declared import Declared
from bilevel.linearization import DoubleBackward, SecondDerivatives, gradients, join, leaves_of, second_derivatives
from bilevel.optimizers import Optimizer, Pulled
from bilevel.oracles import Oracles, tensors_in
from bilevel.status import InvalidProblem, NonFinite
from bilevel.training.state import Cotangent, Tangent, TrainingState, tensors_of, with_tensors


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

    def batch_after(self, steps: int) -> int:
        """Return the lower batch on which to look at what so many steps reached."""
        return batch_after(self.oracles.problem.lower_data, self.first_batch, steps)

    def advance(self, step: int, state: TrainingState) -> TrainingState:
        """Return the state after a step, without a derivative."""
        with torch.no_grad():
            gradient = self._gradient(step, state.y)
            return TrainingState(*self.optimizer.update(state.y, gradient, state.optimizer, self._nested))

    def linearize(self, step: int, state: TrainingState) -> tuple[TrainingState, Callable[[Cotangent], Cotangent]]:
        """Return the state after a step, and the map that pulls a cotangent back through it."""
        oracles, y = self.oracles, state.y
        core = self._linearized(step, y, held=False) if self.microbatches == 1 else None
        if core is not None:
            oracles.count(gradients=1)
        if isinstance(core, DoubleBackward):
            # By formula if the optimizer has one: then the graph of the gradient is all the graph there is.
            gradient = self._declared.add_gradient(core.gradient, y)
            formula = self.optimizer.linearized(y, gradient, state.optimizer, oracles.x_layout.nest(core.xs))
            if formula is not None:
                after = TrainingState(formula.y.detach(), formula.state)
                kept = None if oracles.problem.regularizer is None else y
                return after, _ByFormula(self, step, kept, core.edge, formula.learned, formula.pull, core.xs, core.ends)
        return self._by_graph(step, state, core)

    def _by_graph(
        self, step: int, state: TrainingState, core: SecondDerivatives | None
    ) -> tuple[TrainingState, Callable[[Cotangent], Cotangent]]:
        """Differentiate the update by a graph; it is added to that of the gradient where there is one."""
        oracles, y = self.oracles, state.y
        one_graph = isinstance(core, DoubleBackward)
        with torch.enable_grad():
            if core is None:
                gradient = traced = _source(self._gradient(step, y))
            else:
                traced = core.traced if isinstance(core, DoubleBackward) else _source(core.gradient)
                gradient = self._declared.add_gradient(traced, y)
            xs = core.xs if isinstance(core, DoubleBackward) else leaves_of(oracles.x_layout, self.x)
            before = [_source(t) for t in (y, *tensors_of(state.optimizer))]
            optimizer_state = with_tensors(state.optimizer, before[1:])
            after_y, after = self.optimizer.update(before[0], gradient, optimizer_state, oracles.x_layout.nest(xs))
        outputs = [after_y, *tensors_of(after)]
        pullback = _ByGraph(
            self, step,
            y=None if one_graph and oracles.problem.regularizer is None else y,
            core=None if one_graph else core,
            ends=[None if not t.requires_grad else get_gradient_edge(t) for t in outputs],
            starts=[get_gradient_edge(t) for t in before],
            like=[(t.shape, t.dtype, t.device) for t in before],
            middle=None if one_graph and self._declared.regularizer is None else get_gradient_edge(traced),
            xs=xs,
            ys=core.ends if isinstance(core, DoubleBackward) else [],
        )  # fmt: skip
        return TrainingState(outputs[0].detach(), with_tensors(after, [t.detach() for t in outputs[1:]])), pullback

    def push(self, step: int, state: TrainingState, tangents: Sequence[Tangent]) -> tuple[TrainingState, list[Tangent]]:
        """Return the state after a step, and the tangents pushed forward through it.

        The pullback is linear in the cotangent u; its derivative in u, transposed, is the push-forward.
        """
        oracles, layouts = self.oracles, (self.oracles.y_layout, self.oracles.x_layout)
        core = self._linearized(step, state.y)
        if not isinstance(core, DoubleBackward):
            raise InvalidProblem(
                "forward mode needs a lower objective that is differentiated by double backward, not by "
                f"{oracles.way}; use Unrolled, or ZerothOrder."
            )
        oracles.count(gradients=1, hvps=len(tangents))
        with torch.enable_grad():
            before = [_source(t) for t in (state.y, *tensors_of(state.optimizer))]
            nested = oracles.x_layout.nest(core.xs)
            gradient = core.traced
            if self._declared.regularizer is not None:
                regularizer = self._declared.regularizer
                coefficients = regularizer.coefficients(nested, oracles.y_layout)
                gradient = gradient + regularizer.gradient(coefficients, before[0])
            buffers = with_tensors(state.optimizer, before[1:])
            after_y, after = self.optimizer.update(before[0], gradient, buffers, nested)
            outputs = [after_y, *tensors_of(after)]
            us = [torch.zeros_like(t).requires_grad_() for t in outputs]
            pulled = gradients(outputs, [*before, *core.ys, *core.xs], us, create_graph=True)
        pushed = []
        for t in tangents:
            along = [t.y, *t.optimizer, *layouts[0].views(t.y), *layouts[1].views(t.x)]
            kept = [(p, v) for p, v in zip(pulled, along, strict=True) if p is not None]
            found = gradients([p for p, _ in kept], us, [v for _, v in kept], retain_graph=True)
            moved = [torch.zeros_like(u) if g is None else g for g, u in zip(found, us, strict=True)]
            pushed.append(Tangent(moved[0], tuple(moved[1:]), t.x))
        return TrainingState(after_y.detach(), with_tensors(after, [t.detach() for t in outputs[1:]])), pushed

    def cotangent_of_gradient(self, step: int, state: TrainingState, a: Cotangent) -> Tensor:
        """Return u, the cotangent of the lower gradient in a step, given that of the state after it."""
        with torch.enable_grad():
            gradient = self._gradient(step, state.y).requires_grad_()
            y, after = self.optimizer.update(state.y, gradient, state.optimizer, self._nested)
            (found,) = gradients([y, *tensors_of(after)], [gradient], [a.y, *a.optimizer])
        return torch.zeros_like(gradient) if found is None else found

    def checked(
        self, step: int, a: Cotangent, y: Tensor, buffers: tuple[Tensor, ...], added: Tensor | None
    ) -> Cotangent:
        """Return the cotangent before a step, or say where it ceased to be finite."""
        size = torch.linalg.vector_norm(y)
        contribution = torch.zeros_like(size) if added is None else torch.linalg.vector_norm(added)
        if not math.isfinite(size + contribution):
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

    def _linearized(self, step: int, y: Tensor, rows: slice | None = None, *, held: bool = True) -> SecondDerivatives:
        oracles = self.oracles
        evaluate = oracles.lower_at(self.first_batch + step, rows)
        return second_derivatives(
            oracles.way, evaluate, oracles.x_layout, oracles.y_layout, self.x, y, held=held, xs=self._xs
        )

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

    def products(
        self, step: int, y: Tensor, u: Tensor, core: SecondDerivatives | None
    ) -> tuple[Tensor | float, list[Tensor | None]]:
        """Return H u, and the leaves of J^T u (None where x does not enter), by `core` or else part by part."""
        self.oracles.count(hvps=1, crosses=1)
        if core is not None:
            in_y, in_x = core.both_products(u)
        else:
            in_y, in_x = torch.zeros_like(y), [None] * len(self.oracles.x_layout.names)
            for rows, share in self._parts(self.first_batch + step):
                part_y, part_x = self._linearized(step, y, rows).both_products(share * u)
                in_y.add_(part_y)
                in_x = _added(in_x, part_x)
        declared_y, declared_x = self.declared_products(y, u)
        return in_y + declared_y, _added(in_x, declared_x)

    def declared_products(self, y: Tensor, u: Tensor) -> tuple[Tensor | float, list[Tensor | None]]:
        """Return what the declared regularizer adds to them."""
        return self._declared.hvp(y, u), self._declared.cross(y, u)

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

    @cached_property
    def _xs(self) -> list[Tensor]:
        """The leaves of x: the graphs of all steps end at the same ones."""
        return leaves_of(self.oracles.x_layout, self.x)


@dataclass(frozen=True)
class _ByFormula:
    """The derivative of one step, transposed: that of the update is a formula, that of the gradient a graph.

    Args:
        training: whose step.
        step: which.
        y: before it, where a regularizer needs it.
        edge: of the graph of the traced gradient, None if that is constant.
        learned: hyperparameters with a graph.
        formula: the transposed derivative of the update.
        xs: the leaves of x.
        ys: the places of y in the graph of the gradient.
    """

    training: Training
    step: int
    y: Tensor | None
    edge: GradientEdge | None
    learned: tuple[Tensor, ...]
    formula: Callable[[Tensor, tuple[Tensor, ...]], Pulled]
    xs: list[Tensor]
    ys: list[Any]

    def __call__(self, a: Cotangent) -> Cotangent:
        oracles = self.training.oracles
        oracles.count(hvps=1, crosses=1)
        y, u, buffers, slopes = self.formula(a.y, a.optimizer)
        ends: list[Any] = [*self.learned] if self.edge is None else [self.edge, *self.learned]
        along = [*slopes] if self.edge is None else [u, *slopes]
        in_x: list[Tensor | None] = [None] * len(self.xs)
        if ends:
            found = torch.autograd.grad(ends, [*self.ys, *self.xs], along, allow_unused=True)
            # Several leaves were just concatenated; the product of a single one may be u itself.
            product, in_x = join(oracles.y_layout, found[: len(self.ys)], (), y), list(found[len(self.ys) :])
            y = product.add_(y) if len(self.ys) > 1 else product + y
        if self.y is not None:
            in_y, more = self.training.declared_products(self.y, u)
            y, in_x = y + in_y, _added(in_x, more)
        added = None if all(g is None for g in in_x) else join(oracles.x_layout, in_x, (), a.x)
        return self.training.checked(self.step, a, y, buffers, added)


@dataclass(frozen=True)
class _ByGraph:
    """The derivative of one step, transposed. It holds edges of a graph: unlike tensors they do not hold values.

    Args:
        training: whose step.
        step: which.
        y: before it, where products need it.
        core: gives products with H and J, where they are not part of the graph.
        ends: the weights and buffers after the step, None where nothing differentiable leads there.
        starts: those before the step, in the update alone.
        like: shape, dtype and device of each.
        middle: the gradient, where products with what led to it are added here.
        xs: the leaves of x.
        ys: the places of y in the graph of the gradient.
    """

    training: Training
    step: int
    y: Tensor | None
    core: SecondDerivatives | None
    ends: list[GradientEdge | None]
    starts: list[GradientEdge]
    like: list[tuple[torch.Size, torch.dtype, torch.device]]
    middle: GradientEdge | None
    xs: list[Tensor]
    ys: list[Any]

    def __call__(self, a: Cotangent) -> Cotangent:
        oracles, count = self.training.oracles, len(self.starts)
        pairs = [(end, v) for end, v in zip(self.ends, (a.y, *a.optimizer), strict=True) if end is not None]
        middle = [] if self.middle is None else [self.middle]
        inputs: list[Any] = [*self.starts, *self.ys, *self.xs, *middle]
        found = torch.autograd.grad([end for end, _ in pairs], inputs, [v for _, v in pairs], allow_unused=True)
        before = [
            torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype, device) in zip(found[:count], self.like, strict=True)
        ]
        y = before[0]
        in_x: list[Tensor | None] = list(found[count + len(self.ys) : len(inputs) - len(middle)])
        if self.ys:
            oracles.count(hvps=1, crosses=1)
            y = y + join(oracles.y_layout, found[count : count + len(self.ys)], (), y)
        u = found[-1] if middle else None
        if u is not None:
            assert self.y is not None
            multiply = self.training.declared_products if self.ys else self._products
            in_y, more = multiply(self.y, u)
            y, in_x = y + in_y, _added(in_x, more)
        added = None if all(g is None for g in in_x) else join(oracles.x_layout, in_x, (), a.x)
        return self.training.checked(self.step, a, y, tuple(before[1:]), added)

    def _products(self, y: Tensor, u: Tensor) -> tuple[Tensor | float, list[Tensor | None]]:
        return self.training.products(self.step, y, u, self.core)


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


def _added(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]
