"""Make any solver differentiable: the implicit function theorem as an autograd function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel.layout import Layout, Variables, named_leaves
from bilevel.linear import GMRES, LinearSolver, Operator
from bilevel.status import InvalidProblem, LinearSolveFailed, SecondOrderUnsupported, SolveFailed, Status

Condition: TypeAlias = Callable[[Variables, Variables], Variables]
"""(x, y) -> something structured like y, differentiable in both."""


def implicit_function(
    solver: Callable[[Variables], Variables],
    *,
    optimality: Condition | None = None,
    fixed_point: Condition | None = None,
    linear: LinearSolver | None = None,
    tol: float = 1e-4,
) -> Callable[[Variables], Variables]:
    """Return `x -> solver(x)` with derivatives by the implicit function theorem, whatever the solver does inside.

        R(x, y) = 0:   `A^T u = -b`, `A = dR/dy`;          x receives `(dR/dx)^T u`   (`optimality=R`)
        y = P(x, y):   `(I - dP/dy)^T u = b`;              x receives `(dP/dx)^T u`   (`fixed_point=P`)

    for a cotangent b of y. A may be any regular matrix. A prox map `P = prox_r(y - step dg/dy)` or a projection gives
    the derivative across kinks and bounds where strict complementarity holds, the same for any step.

    Args:
        solver: x -> y, a Tensor or nested Tensors each. It is called with x detached and may leave torch.
        optimality: R, returns something structured like y; usually the gradient of an objective.
        fixed_point: P, returns something structured like y. Give one of the two.
        linear: solver of the linear system; GMRES if None. `CG()` where A is symmetric and positive definite; NormalCG
            takes any A, and differentiates R twice.
        tol: > 0: how large `‖R‖` (or `‖P - y‖`) may be relative to `1 + ‖y‖`, and the relative residual of the linear
            system, before the answer is refused.

    Returns:
        A function of x whose value is attached to the graph of x's leaves, to be differentiated once.

    Raises:
        InvalidProblem: none or both of the conditions are given, or (at a call) they do not return something like y.
        SolveFailed: at a call: the solver's answer does not satisfy the condition.
        LinearSolveFailed: in a backward pass: the linear system was not solved to `tol`.
        SecondOrderUnsupported: in a backward pass over a backward pass.

    Cost:
        One call of the condition to check an answer; in a backward pass one more, and a backward pass over it for each
        product.

    References:
        Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019. Blondel et al., "Efficient and modular implicit
        differentiation", NeurIPS 2022.

    Example:
        >>> root = implicit_function(lambda x: x.sqrt(), optimality=lambda x, y: y * y - x)
        >>> x = torch.tensor(4.0, requires_grad=True)
        >>> root(x).backward()
        >>> x.grad
        tensor(0.2500)
    """
    if (optimality is None) == (fixed_point is None):
        raise InvalidProblem("implicit_function needs one of optimality= and fixed_point=.")
    if not tol > 0:
        raise InvalidProblem(f"implicit_function: tol must be > 0, got {tol}.")
    condition = optimality if optimality is not None else fixed_point
    assert condition is not None
    chosen = GMRES(tol=1e-10, max_steps=None, restart=50) if linear is None else linear
    kind = "optimality" if optimality is not None else "fixed_point"

    def solved(x: Variables) -> Variables:
        leaves = [leaf for _, leaf in named_leaves(x)]
        x_layout = Layout.of(x, name="x")
        detached = x_layout.nest([leaf.detach() for leaf in leaves])
        with torch.enable_grad():
            y = solver(detached)
        y_layout = Layout.of(y, name="y")
        point = _Point(condition, kind, x_layout, y_layout, x_layout.flatten(x), y_layout.flatten(y), chosen, tol)
        point.check()
        return y_layout.nest(_Attach.apply(point, *leaves))  # type: ignore[no-untyped-call]

    return solved


@dataclass(frozen=True)
class _Point:
    """A solution and the condition it satisfies, to be differentiated."""

    condition: Condition
    kind: str
    x_layout: Layout
    y_layout: Layout
    x: Tensor
    y: Tensor
    linear: LinearSolver
    tol: float

    def check(self) -> None:
        """Refuse a y that does not satisfy the condition."""
        with torch.no_grad():
            residual = self.y_layout.concat(self._residual(self.x_layout.views(self.x), self.y_layout.views(self.y)))
        size, scale = float(residual.norm()), 1 + float(self.y.norm())
        if not size <= self.tol * scale:
            what = "‖R(x, y)‖" if self.kind == "optimality" else "‖P(x, y) - y‖"
            raise SolveFailed(
                f"implicit_function: the solver's answer is no solution: {what} = {size:.3g}, above tol = "
                f"{self.tol:.3g} times 1 + ‖y‖ = {scale:.3g}. Solve more accurately, mend {self.kind}=, or raise tol."
            )

    def pullback(self, cotangent: Tensor) -> list[Tensor | None]:
        """Return what the leaves of x receive for a cotangent of y."""
        solution = self.linear.solve(Operator(self._transposed, apply_transpose=self._forward), -cotangent)
        residual = float(solution.residual.max())
        if not residual <= self.tol or not bool(solution.value.isfinite().all()):
            status = Status.STEP_LIMIT if solution.status.ok else solution.status
            raise LinearSolveFailed(
                f"implicit_function: the linear system of the backward pass failed after {solution.steps} iterations: "
                f"{status.value} (relative residual {residual:.2g}, tol {self.tol:.2g}). The solution may not be "
                f"isolated; or pass another linear= solver.",
                status=status,
            )
        xs, _, outputs = self._graph
        return self._grad(outputs, xs, solution.value)

    def _residual(self, xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
        found = self.condition(self.x_layout.nest(xs), self.y_layout.nest(ys))
        leaves = self.y_layout.align(found, None, what=self.kind)
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
        if shapes != [tuple(shape) for shape in self.y_layout.shapes]:
            expected = dict(zip(self.y_layout.names, self.y_layout.shapes, strict=True))
            raise InvalidProblem(f"{self.kind} must return something like y, {expected}; got shapes {shapes}.")
        return leaves if self.kind == "optimality" else [p - y for p, y in zip(leaves, ys, strict=True)]

    @cached_property
    def _graph(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Leaves of x, leaves of y, and the residual as a function of them."""
        xs, ys = (
            [leaf.detach().requires_grad_() for leaf in layout.views(flat)]
            for layout, flat in ((self.x_layout, self.x), (self.y_layout, self.y))
        )
        with torch.enable_grad():
            return xs, ys, self._residual(xs, ys)

    def _transposed(self, u: Tensor) -> Tensor:
        """Return A^T u."""
        _, ys, outputs = self._graph
        return self._joined(self._grad(outputs, ys, u), u)

    def _forward(self, v: Tensor) -> Tensor:
        """Return A v, as the derivative of A^T u in u."""
        u, pulled = self._pulled
        if not pulled.requires_grad:
            return torch.zeros_like(v)
        return torch.autograd.grad(pulled, u, v, retain_graph=True)[0]

    @cached_property
    def _pulled(self) -> tuple[Tensor, Tensor]:
        _, ys, outputs = self._graph
        u = torch.zeros_like(self.y, requires_grad=True)
        with torch.enable_grad():
            return u, self._joined(self._grad(outputs, ys, u, create_graph=True), u)

    def _grad(self, outputs: list[Tensor], inputs: list[Tensor], u: Tensor, **options: Any) -> list[Tensor | None]:
        live = [i for i, output in enumerate(outputs) if output.requires_grad]
        if not live:
            return [None] * len(inputs)
        weights, kept = self.y_layout.views(u), [outputs[i] for i in live]
        found = torch.autograd.grad(
            kept, inputs, [weights[i] for i in live], retain_graph=True, allow_unused=True, **options
        )
        return list(found)

    def _joined(self, leaves: list[Tensor | None], like: Tensor) -> Tensor:
        filled = [
            like.new_zeros(shape) if leaf is None else leaf
            for leaf, shape in zip(leaves, self.y_layout.shapes, strict=True)
        ]
        return self.y_layout.concat(filled)


class _Attach(torch.autograd.Function):
    """Give a solution, as a function of the leaves of x."""

    @staticmethod
    def forward(ctx: Any, point: _Point, *leaves: Tensor) -> tuple[Tensor, ...]:
        """Return the leaves of y."""
        ctx.point = point
        ctx.save_for_backward(*leaves)
        return tuple(view.clone() for view in point.y_layout.views(point.y))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        """Return what each leaf of x receives."""
        point: _Point = ctx.point
        with torch.no_grad():
            found = point.pullback(point.y_layout.concat(cotangents).detach())
        if torch.is_grad_enabled():  # asked for with create_graph=True
            leaves = [leaf for leaf in (*ctx.saved_tensors, *cotangents) if leaf.requires_grad]
            found = [None if part is None else _Once.apply(part, *leaves) for part in found]  # type: ignore[no-untyped-call]
        return None, *found


class _Once(torch.autograd.Function):
    """Pass a derivative on and refuse to differentiate it: without a graph, it would silently count as constant."""

    @staticmethod
    def forward(ctx: Any, derivative: Tensor, *leaves: Tensor) -> Tensor:
        """Return the derivative."""
        return derivative.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """Refuse.

        Raises:
            SecondOrderUnsupported: always.
        """
        raise SecondOrderUnsupported(
            "implicit_function is differentiated once only; its second derivative was asked for. Take differences of "
            "first derivatives."
        )
