"""Second derivatives of the lower objective at one point: a graph built once, used for every product.

Four ways to one interface; `oracles.py` picks one for each problem at the door. Double backward over a retained graph
is the cheapest by far (0.9 to 2.1 gradients a product, measured); the others exist for objectives it cannot serve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.layout import Layout

Leaves: TypeAlias = Sequence[Tensor]
Evaluate: TypeAlias = Callable[[Leaves, Leaves], Tensor]
"""The traced lower objective at a fixed batch and random state: (leaves of x, leaves of y) -> 0-dim tensor."""


SMALL = 8
"""A leaf this many times smaller than the largest one costs next to nothing to copy."""
LARGE = 2**16
"""Entries of y from which on it is worth a node of its own that y can be freed before the graph."""


def leaves_of(layout: Layout, flat: Tensor, *, requires_grad: bool = True) -> list[Tensor]:
    """Return the leaves as detached views of `flat`, with respect to which there is no graph of the split."""
    # Each by itself: of leaves that are views of one detached vector, compiled objectives lose the second derivative.
    return [leaf.detach().requires_grad_(requires_grad) for leaf in layout.views(flat)]


class _Sources(torch.autograd.Function):
    """The identity, at whose outputs a derivative ends: unlike leaves, its node does not hold their values."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(gradients))


def sources(layout: Layout, flat: Tensor) -> list[Tensor]:
    """Return the leaves as tensors at which derivatives may end, and whose graph does not keep `flat` alive.

    An operation may save a leaf, and a view would keep all of `flat` with it. So small leaves are copied: then `flat`
    goes where no operation saves a large one, as the first layer of a network saves its inputs, not its weights.
    """
    views = layout.views(flat.detach())
    small = max((view.numel() for view in views), default=0) // SMALL
    anchor = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        values = [view.clone() if view.numel() <= small else view for view in views]
        return list(_Sources.apply(anchor, *values))  # type: ignore[no-untyped-call]


def gradients(outputs: Leaves, inputs: Leaves, weights: Leaves | None = None, **options: bool) -> list[Tensor | None]:
    """Return d<outputs, weights>/d(inputs); None for an input that no output depends on."""
    live = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not live:
        return [None] * len(inputs)
    if len(live) < len(outputs):
        outputs, weights = [outputs[i] for i in live], None if weights is None else [weights[i] for i in live]
    return list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True, **options))


def join(layout: Layout, leaves: Sequence[Tensor | None], lead: tuple[int, ...], like: Tensor) -> Tensor:
    """Concatenate leaves into one flat vector, with zeros for those that are None."""
    present = [leaf for leaf in leaves if leaf is not None]
    if len(present) == len(leaves):
        return layout.concat(present).detach()
    rows = () if layout.blocks is None else (layout.blocks,)
    if not present:
        return like.new_zeros((*lead, *rows, layout.size))
    return _concatenated(layout, leaves, like, lead).detach()


def _concatenated(layout: Layout, leaves: Sequence[Tensor | None], like: Tensor, lead: tuple[int, ...] = ()) -> Tensor:
    if all(leaf is not None for leaf in leaves):
        return layout.concat(leaves)  # type: ignore[arg-type]
    rows = () if layout.blocks is None else (layout.blocks,)
    filled = [
        like.new_zeros(lead + rows + tuple(shape)) if leaf is None else leaf
        for leaf, shape in zip(leaves, layout.shapes, strict=True)
    ]
    return layout.concat(filled)


class SecondDerivatives(ABC):
    """Products with H = d2g/dy2 and J^T = (d2g/dxdy)^T of the traced lower objective at one (x, y).

    Attributes:
        value: g, detached 0-dim.
        gradient: dg/dy, detached, `[d]` or `[m, d]`.
        gradients_per_product: what one product costs, in gradients, for the count (0 if it is a true HVP).
    """

    value: Tensor
    gradient: Tensor
    gradients_per_product = 0

    @abstractmethod
    def hvp(self, v: Tensor) -> Tensor:
        """Return H v, shaped like v (`[d]` or `[m, d]`)."""

    @abstractmethod
    def cross(self, v: Tensor) -> list[Tensor | None]:
        """Return the leaves of J^T v = d<dg/dy, v>/dx; None for leaves of x that do not enter."""

    def both_products(self, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return H v and the leaves of J^T v, after which no further product is asked for."""
        return self.hvp(v), self.cross(v)

    def hvps(self, vectors: Tensor, chunk: int) -> Tensor:
        """Return H applied to each of k vectors `[k, *]`, at most `chunk` at a time."""
        return torch.stack([self.hvp(v) for v in vectors])


class DoubleBackward(SecondDerivatives):
    """One retained graph of the gradient; each product is one more backward pass over it.

    Attributes:
        xs: the leaves of x in the graph.
        ys: those of y.
        traced: the flat gradient with its graph.
        edge: its place in the graph, None if it is constant.
        ends: the places of ys in the graph. With `held=False` and a large y most of which is one leaf, ys are no leaves
            but outputs of a node that holds no values, so that y may be freed before the graph is.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        x_layout: Layout,
        y_layout: Layout,
        x: Tensor,
        y: Tensor,
        *,
        plain_attention: bool = False,
        held: bool = True,
        xs: list[Tensor] | None = None,
    ) -> None:
        # Fused attention has no double backward. The manager must wrap the building of the graph, and may end after it.
        kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if plain_attention else nullcontext()
        self._y_layout = y_layout
        self.xs = leaves_of(x_layout, x) if xs is None else xs
        # Of many large leaves, operations save some; then y stays alive all the same.
        held = held or y.numel() < LARGE or 2 * max(y_layout.sizes) < y_layout.size
        self.ys = leaves_of(y_layout, y) if held else sources(y_layout, y)
        self.ends: list[Any] = list(self.ys) if held else [get_gradient_edge(leaf) for leaf in self.ys]
        with torch.enable_grad(), kernel:
            value = evaluate(self.xs, self.ys)
            found = gradients([value], self.ys, create_graph=True)
            # The derivative of a concatenation is views: products of the flat gradient cost what those of leaves do.
            self.traced = _concatenated(y_layout, found, y)
        self.edge = get_gradient_edge(self.traced) if self.traced.requires_grad else None
        self.value, self.gradient = value.detach(), self.traced.detach()

    def _pull(self, inputs: Sequence[Any], v: Tensor, **options: bool) -> list[Tensor | None]:
        """Return d<gradient, v>/d(inputs)."""
        if self.edge is None:
            return [None] * len(inputs)
        return list(torch.autograd.grad([self.edge], inputs, [v], allow_unused=True, **options))

    def hvp(self, v: Tensor) -> Tensor:
        """Return H v by one backward pass over the retained graph."""
        return join(self._y_layout, self._pull(self.ends, v, retain_graph=True), (), v)

    def hvps(self, vectors: Tensor, chunk: int) -> Tensor:
        """Return H applied to k vectors, `chunk` at a time in one vectorized backward pass."""
        if chunk == 1:
            return super().hvps(vectors, chunk)
        parts = []
        for part in vectors.split(chunk):
            found = self._pull(self.ends, part, retain_graph=True, is_grads_batched=True)
            parts.append(join(self._y_layout, found, part.shape[:1], part))
        return torch.cat(parts)

    def cross(self, v: Tensor) -> list[Tensor | None]:
        """Return J^T v from the same graph."""
        return self._pull(self.xs, v, retain_graph=True)

    def both_products(self, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return H v and J^T v by one backward pass, which frees the graph."""
        found = self._pull([*self.ends, *self.xs], v)
        in_y, in_x = found[: len(self.ends)], found[len(self.ends) :]
        return join(self._y_layout, in_y, (), v), in_x


class ForwardOverReverse(SecondDerivatives):
    """A forward-mode derivative of the gradient for each product: nothing retained, four to eight times the cost."""

    def __init__(self, evaluate: Evaluate, x_layout: Layout, y_layout: Layout, x: Tensor, y: Tensor) -> None:
        self._x_layout, self._y_layout, self._evaluate = x_layout, y_layout, evaluate
        self._xs = tuple(leaves_of(x_layout, x, requires_grad=False))
        self._ys = tuple(leaves_of(y_layout, y, requires_grad=False))
        self._in_y = torch.func.grad(lambda ys: evaluate(self._xs, ys))
        self._in_x = torch.func.grad(lambda xs, ys: evaluate(xs, ys))
        self.value = evaluate(self._xs, self._ys).detach()
        self.gradient = join(y_layout, self._in_y(self._ys), (), y)

    def hvp(self, v: Tensor) -> Tensor:
        """Return H v by forward over reverse."""
        tangent = torch.func.jvp(self._in_y, (self._ys,), (tuple(self._y_layout.views(v)),))[1]
        return join(self._y_layout, tangent, (), v)

    def cross(self, v: Tensor) -> list[Tensor | None]:
        """Return J^T v: the derivative of dg/dx along v in y."""
        tangents = (tuple(self._y_layout.views(v)),)
        tangent = torch.func.jvp(lambda ys: self._in_x(self._xs, ys), (self._ys,), tangents)[1]
        return list(tangent)

    def both_products(self, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return H v and J^T v as one forward-mode derivative of the gradient in y and x."""
        tangents = (tuple(self._y_layout.views(v)),)
        both = torch.func.grad(lambda ys, xs: self._evaluate(xs, ys), argnums=(0, 1))
        in_y, in_x = torch.func.jvp(lambda ys: both(ys, self._xs), (self._ys,), tangents)[1]
        return join(self._y_layout, in_y, (), v), list(in_x)


class Differences(SecondDerivatives):
    """Central differences of gradients along v: two gradients a product, relative error about eps^(2/3)."""

    gradients_per_product = 2

    def __init__(self, evaluate: Evaluate, x_layout: Layout, y_layout: Layout, x: Tensor, y: Tensor) -> None:
        self._evaluate, self._x_layout, self._y_layout, self._x, self._y = evaluate, x_layout, y_layout, x, y
        self.value, _, self.gradient = self._gradients(y)

    def _gradients(self, y: Tensor) -> tuple[Tensor, list[Tensor | None], Tensor]:
        xs, ys = leaves_of(self._x_layout, self._x), leaves_of(self._y_layout, y)
        with torch.enable_grad():
            value = self._evaluate(xs, ys)
            found = gradients([value], [*xs, *ys])
        return value.detach(), found[: len(xs)], join(self._y_layout, found[len(xs) :], (), y)

    def _step(self, v: Tensor, rows: int | None) -> Tensor:
        # The step has the length eps^(1/3) (1 + ‖y‖): below it rounding dominates, above it the third derivative does.
        size = torch.linalg.vector_norm(v, dim=rows, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
        reach = 1 + torch.linalg.vector_norm(self._y, dim=rows, keepdim=True)
        step: Tensor = reach * (torch.finfo(v.dtype).eps ** (1 / 3) / size)
        return step

    def hvp(self, v: Tensor, *, shrink: float = 1.0) -> Tensor:
        """Return H v by differences of dg/dy, each row with its own step (times `shrink`)."""
        step = shrink * self._step(v, -1)
        _, _, ahead = self._gradients(self._y + step * v)
        _, _, behind = self._gradients(self._y - step * v)
        return (ahead - behind) / (2 * step)

    def both(self, v: Tensor, *, shrink: float = 1.0) -> list[tuple[Tensor, Tensor]]:
        """Return H v and J^T v by one pair of gradients, all rows with one step, each with its error from rounding."""
        step = shrink * self._step(v, None)
        _, ahead_x, ahead_y = self._gradients(self._y + step * v)
        _, behind_x, behind_y = self._gradients(self._y - step * v)
        pairs = (
            (ahead_y, behind_y),
            (join(self._x_layout, ahead_x, (), self._x), join(self._x_layout, behind_x, (), self._x)),
        )
        width = 2 * step.flatten()
        eps = torch.finfo(v.dtype).eps
        return [((a - b) / width, (eps * (a.norm() + b.norm()) / width).sum()) for a, b in pairs]

    def cross(self, v: Tensor) -> list[Tensor | None]:
        """Return J^T v by differences of dg/dx: it sums over rows, so all rows take one step."""
        step = self._step(v, None)
        _, ahead, _ = self._gradients(self._y + step * v)
        _, behind, _ = self._gradients(self._y - step * v)
        half = (0.5 / step).squeeze()
        return [None if a is None or b is None else (a - b) * half for a, b in zip(ahead, behind, strict=True)]


def second_derivatives(
    way: str,
    evaluate: Evaluate,
    x_layout: Layout,
    y_layout: Layout,
    x: Tensor,
    y: Tensor,
    *,
    held: bool = True,
    xs: list[Tensor] | None = None,
) -> SecondDerivatives:
    """Differentiate twice in the way named by `Problem.hvp` (any but "auto").

    Args:
        way: which.
        evaluate: the lower objective.
        x_layout: layout of x.
        y_layout: layout of y.
        x: `[p]`.
        y: `[d]` or `[m, d]`.
        held: for double backward: whether the graph may keep y alive; see `DoubleBackward`.
        xs: for double backward: leaves of x to use, where many graphs share them.
    """
    if way == "forward_over_reverse":
        return ForwardOverReverse(evaluate, x_layout, y_layout, x, y)
    if way == "differences":
        return Differences(evaluate, x_layout, y_layout, x, y)
    plain = way == "math_attention"
    return DoubleBackward(evaluate, x_layout, y_layout, x, y, plain_attention=plain, held=held, xs=xs)
