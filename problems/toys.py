"""Test problems of the first-order literature with known answers: each is hard in one way, and small.

`Task.evaluate` measures an answer against the known one: `x_error` and `y_error` (relative, to the nearest minimizer
where there are several) and `gap`, the upper value above the optimal one (below 0 where y is not yet feasible).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel.layout import Variables, named_leaves
from bilevel.problem import Objective, Problem
from bilevel.problems._base import Task
from bilevel.regularizers import ElasticNet
from bilevel.sets import Box

Pair: TypeAlias = dict[str, Tensor]

SHEN_MINIMA = (
    (0.3823600747669883, 0.44270572244449985), (1.2151454754759206, 0.199910887700403),
    (2.829641800022212, 1.2434582728208743),
)  # fmt: skip
"""Minimizers of `shen` and their values; the second is the global one."""


def sc(
    n: int = 4, *, a: Tensor | None = None, b: Tensor | None = None, d: Tensor | None = None,
    dtype: torch.dtype = torch.float64, device: str = "cpu",
) -> Task:  # fmt: skip
    """Strongly convex: `g = y^T A y / 2 - x^T B y`, `f = y^T A y / 2 + (x - 1)^T D (x - 1) / 2`.

    `x* = (B A^-1 B^T + D)^-1 D 1`, `y* = A^-1 B^T x*`; with identities `x* = y* = 1/2`.

    Args:
        n: upper and lower variables.
        a: `[n, n]`, symmetric and positive definite; the identity if None.
        b: `[n, n]`; the identity if None.
        d: like `a`.
        dtype: of all numbers.
        device: of all tensors.
    """
    eye, one = torch.eye(n, dtype=dtype, device=device), torch.ones(n, dtype=dtype, device=device)
    a, b, d = (eye if matrix is None else matrix.to(device, dtype) for matrix in (a, b, d))
    m = torch.linalg.solve(a, b.T)
    x_star = torch.linalg.solve(b @ m + d, d @ one)

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * y @ (a @ y) + 0.5 * (x - one) @ (d @ (x - one))

    problem = Problem(
        upper=upper,
        lower=lambda x, y, batch: 0.5 * y @ (a @ y) - x @ (b @ y),
        lower_solution=lambda x: m @ x,
        reference=x_star,
    )
    evaluate = _judge(upper, [(x_star, m @ x_star)])
    return Task("sc", problem, 0 * one, 0 * one, steps=300, evaluate=evaluate, source="sl-BAMM; closed form")


def mc(n: int = 2, *, start: float = 0.01, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Merely convex: `g = ‖y1‖^2 / 2 - x^T y1`, free in y2; `f = ‖x - y2‖^2 / 2 + ‖y1 - 1‖^2 / 2`.

    `x* = y1* = y2* = 1`, `f* = 0`. A method that leaves y2 where it started, at 0, answers `x = 1/2`.

    Args:
        n: upper variables; the lower ones are `{"y1": [n], "y2": [n]}`.
        start: of every variable.
        dtype: of all numbers.
        device: of all tensors.

    References:
        Liu, Mu, Yuan, Zeng, Zhang, "A generic first-order algorithmic framework for bi-level programming beyond
        lower-level singleton", ICML 2020, whose counter-example this is.
    """
    one = torch.ones(n, dtype=dtype, device=device)
    problem = Problem(
        upper=_merely_convex_upper,
        lower=lambda x, y, batch: 0.5 * y["y1"].square().sum() - x @ y["y1"],
        reference=one,
    )
    y0 = {"y1": start * one, "y2": start * one}
    evaluate = _judge(_merely_convex_upper, [(one, {"y1": one, "y2": one})])
    return Task("mc", problem, start * one, y0, steps=2000, evaluate=evaluate, source="closed form")


def sin(
    n: int = 2, a: float = 2.0, c: float = 2.0, *, start: float = 0.0, dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Task:  # fmt: skip
    """Find the right valley of a lower objective that is not convex; x is a number.

        g = sum_i sin(x + y_i - c),   f = (x - a)^2 + ‖y - a - c‖^2

    With C the nearest of `-pi/2 + 2 k pi` to 2a: `x* = ((1 - n) a + n C) / (1 + n)`, `y_i* = C + c - x*`.

    Args:
        n: lower variables.
        a: target of x.
        c: shift of y.
        start: of every variable.
        dtype: of all numbers.
        device: of all tensors.

    References:
        Liu, Liu, Zeng, Zhang, "A value-function-based interior-point method for non-convex bi-level optimization",
        ICML 2021.
    """
    valley = -math.pi / 2 + 2 * math.pi * round((2 * a + math.pi / 2) / (2 * math.pi))
    zero, one = torch.zeros((), dtype=dtype, device=device), torch.ones(n, dtype=dtype, device=device)
    x_star = zero + ((1 - n) * a + n * valley) / (1 + n)

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return (x - a).square() + (y - a - c).square().sum()

    problem = Problem(upper=upper, lower=lambda x, y, batch: torch.sin(x + y - c).sum(), reference=x_star)
    evaluate = _judge(upper, [(x_star, (valley + c - x_star) * one)])
    return Task("sin", problem, zero + start, start * one, steps=2000, evaluate=evaluate, source="closed form")


def wl(n: int = 4, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Weighted lasso: `g = ‖y - a‖^2 / 2 + sum_i x_i |y_i|` (declared), `f = sum_i y_i`, x in [0, 1]^n.

    a is 1/n in its first half and -1/n in its second. Any x of at least 1/n in the first half and 0 in the second is a
    solution, with y = (0, -1/n) and `f* = -1/2`; x is not unique, and f does not depend on it.

    Args:
        n: variables of each level, even.
        dtype: of all numbers.
        device: of all tensors.
    """
    first = torch.arange(n, device=device) < n // 2
    a = torch.where(first, 1.0, -1.0).to(dtype) / n

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return y.sum()

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        nearest = torch.where(first, x.clamp_min(1 / n), torch.zeros_like(x))
        return _judge(upper, [(nearest, a.clamp_max(0))])(x, y)

    problem = Problem(
        upper=upper,
        lower=lambda x, y, batch: 0.5 * (y - a).square().sum(),
        upper_set=Box(0, 1),
        regularizer=ElasticNet(l1=lambda x: x),
        lower_solution=lambda x: a.sign() * (a.abs() - x).clamp_min(0),
    )
    start = torch.full((n,), 0.5, dtype=dtype, device=device)
    return Task("wl", problem, start, 0 * start, steps=2000, evaluate=evaluate, source="closed form")


def lasso1(*, start: float = 2.0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Lasso with one strength: `g = ‖y - (3, 2, .5)‖^2 / 2 + x ‖y‖_1` (declared), `f = ‖y - (2.5, .5, 0)‖^2 / 2`.

    x in [0, 5]; `x* = 1`, `y* = (2, 1, 0)`, `f* = 1/4`. df/dy is not 0 there, so a threshold that is scaled wrongly
    by the step moves x*.

    Args:
        start: of x.
        dtype: of all numbers.
        device: of all tensors.
    """
    zero = torch.zeros((), dtype=dtype, device=device)
    b, t, y_star = (zero.new_tensor(v) for v in ([3.0, 2.0, 0.5], [2.5, 0.5, 0.0], [2.0, 1.0, 0.0]))

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * (y - t).square().sum()

    problem = Problem(
        upper=upper,
        lower=lambda x, y, batch: 0.5 * (y - b).square().sum(),
        upper_set=Box(0, 5),
        regularizer=ElasticNet(l1=lambda x: x),
        lower_solution=lambda x: (b - x).clamp_min(0),
        reference=zero + 1,
    )
    evaluate = _judge(upper, [(zero + 1, y_star)])
    return Task("lasso1", problem, zero + start, 0 * b, steps=2000, evaluate=evaluate, source="closed form")


def llc(n: int = 1, *, start: float = 10.0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Merely convex with an equation: `g = ‖y1‖^2 / 2 - x^T y1 + 1^T y2`, `h = 1^T (x + y1 + y2) / sqrt(3 n) = 0`.

    f is that of `mc`; `x* = -.3`, `y1* = .7`, `y2* = -.4`, and the multiplier of h is `-sqrt(3 n)`: the row is
    normalized, as steps on multipliers want it. The joint set is the hyperplane `h = 0`. The start is not on it.

    Args:
        n: upper variables; the lower ones are `{"y1": [n], "y2": [n]}`.
        start: of every variable.
        dtype: of all numbers.
        device: of all tensors.

    References:
        Yao, Yu, Zeng, Zhang, "Constrained bi-level optimization: proximal Lagrangian value function approach and
        Hessian-free algorithm", ICLR 2024, arXiv 2401.16164.
    """
    one = torch.ones(n, dtype=dtype, device=device)

    def excess(x: Tensor, y: Pair) -> Tensor:
        return x.sum() + y["y1"].sum() + y["y2"].sum()

    def joint(x: Tensor, y: Pair) -> tuple[Tensor, Pair]:
        shift = excess(x, y) / (3 * n)
        return x - shift, {"y1": y["y1"] - shift, "y2": y["y2"] - shift}

    problem = Problem(
        upper=_merely_convex_upper,
        lower=lambda x, y, batch: 0.5 * y["y1"].square().sum() - x @ y["y1"] + y["y2"].sum(),
        equality=lambda x, y, batch: excess(x, y).reshape(1) / math.sqrt(3 * n),
        joint_set=joint,
        reference=-0.3 * one,
    )
    y0 = {"y1": start * one, "y2": start * one}
    evaluate = _judge(_merely_convex_upper, [(-0.3 * one, {"y1": 0.7 * one, "y2": -0.4 * one})])
    return Task("llc", problem, start * one, y0, steps=2000, evaluate=evaluate, source="closed form")


def ineq(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Active inequality: `g = (y - 3)^2 / 2`, `c = x + y - 2 <= 0`, `f = (x - 2)^2 / 2 + (y - 1)^2 / 2`.

    `x* = 1.5`, `y* = .5`, multiplier 2.5. x and y have the shape `[1]`.

    Args:
        dtype: of all numbers.
        device: of all tensors.
    """
    zero = torch.zeros(1, dtype=dtype, device=device)

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * (x - 2).square().sum() + 0.5 * (y - 1).square().sum()

    def joint(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        shift = (x + y - 2).clamp_min(0) / 2
        return x - shift, y - shift

    problem = Problem(
        upper=upper,
        lower=lambda x, y, batch: 0.5 * (y - 3).square().sum(),
        constraint=lambda x, y, batch: x + y - 2,
        joint_set=joint,
        lower_solution=lambda x: (2 - x).clamp_max(3),
        reference=zero + 1.5,
    )
    evaluate = _judge(upper, [(zero + 1.5, zero + 0.5)])
    return Task("ineq", problem, zero, zero, steps=2000, evaluate=evaluate, source="closed form")


def mci(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Merely convex with an inequality: `g = (y1 - x)^2 / 2`, `c = y1 + y2 - 1 <= 0`.

    `f = (x - y2)^2 / 2 + (y1 - 1)^2 / 2`; `x* = .6`, `y* = (.6, .4)`, multiplier 0. x has the shape `[1]`, y `[2]`.

    Args:
        dtype: of all numbers.
        device: of all tensors.
    """
    zero = torch.zeros(1, dtype=dtype, device=device)

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * (x - y[1]).square().sum() + 0.5 * (y[0] - 1).square()

    def joint(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y - (y.sum() - 1).clamp_min(0) / 2

    problem = Problem(
        upper=upper,
        lower=lambda x, y, batch: 0.5 * (y[0] - x).square().sum(),
        constraint=lambda x, y, batch: y.sum().reshape(1) - 1,
        joint_set=joint,
        reference=zero + 0.6,
    )
    evaluate = _judge(upper, [(zero + 0.6, zero.new_tensor([0.6, 0.4]))])
    return Task("mci", problem, zero, zero.new_zeros(2), steps=2000, evaluate=evaluate, source="closed form")


def box(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Bounds below: `g = ‖y - x‖^2 / 2` on [-1, 1]^3, `f = ‖y - (0, 0, .5)‖^2 / 2 + ‖x - (3, 1, -.2)‖^2 / 2`.

    `x* = (3, .5, .15)`, `y* = (1, .5, .15)`: the bound of the first entry is active, so y's first entry does not move
    with x's.

    Args:
        dtype: of all numbers.
        device: of all tensors.
    """
    zero = torch.zeros(3, dtype=dtype, device=device)
    t, s, x_star = (zero.new_tensor(v) for v in ([0.0, 0.0, 0.5], [3.0, 1.0, -0.2], [3.0, 0.5, 0.15]))

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * (y - t).square().sum() + 0.5 * (x - s).square().sum()

    problem = Problem(
        upper=upper,
        lower=lambda x, y, batch: 0.5 * (y - x).square().sum(),
        lower_set=Box(-1, 1),
        lower_solution=lambda x: x.clamp(-1, 1),
        reference=x_star,
    )
    evaluate = _judge(upper, [(x_star, x_star.clamp(-1, 1))])
    return Task("box", problem, zero, zero, steps=2000, evaluate=evaluate, source="closed form")


def shen(start: float = 1.0, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Task:
    """Several minima: `g = (x + y)^2 + x sin^2(x + y)`, `f = cos(4y + 2) / (1 + e^(2 - 4x)) + log(1 + (4x - 2)^2) / 2`.

    x in [0, 3], `y* = -x`. `F(x) = f(x, -x)` has the minima .3824, 1.2151 (the global one, `reference`) and 2.8296.

    Args:
        start: of x; it decides which minimum is found. y starts at -start.
        dtype: of all numbers.
        device: of all tensors.

    References:
        Shen, Chen, "On penalty-based bilevel gradient descent method", ICML 2023, arXiv 2302.05185.
    """
    zero = torch.zeros((), dtype=dtype, device=device)

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        wave = torch.cos(4 * y + 2) * torch.sigmoid(4 * x - 2)
        return wave + 0.5 * torch.log1p((4 * x - 2).square())

    problem = Problem(
        upper=upper,
        lower=lambda x, y, batch: (x + y).square() + x * torch.sin(x + y).square(),
        upper_set=Box(0, 3),
        lower_solution=lambda x: -x,
        reference=zero + SHEN_MINIMA[1][0],
    )
    evaluate = _judge(upper, [(zero + x, zero - x) for x, _ in SHEN_MINIMA], best=SHEN_MINIMA[1][1])
    return Task(
        "shen", problem, zero + start, zero - start, steps=2000, evaluate=evaluate, source="minima by Newton's method"
    )


def _merely_convex_upper(x: Tensor, y: Pair, batch: Any) -> Tensor:
    return 0.5 * (x - y["y2"]).square().sum() + 0.5 * (y["y1"] - 1).square().sum()


def _judge(
    upper: Objective, minimizers: list[tuple[Variables, Variables]], best: float | None = None
) -> Callable[[Variables, Variables], dict[str, Any]]:
    """Return what measures an answer against the nearest minimizer in x, and against the best upper value."""
    optimum = float(upper(*minimizers[0], None)) if best is None else best

    def evaluate(x: Variables, y: Variables) -> dict[str, Any]:
        errors = [(_relative(x, x_star), _relative(y, y_star)) for x_star, y_star in minimizers]
        x_error, y_error = min(errors)
        return {"x_error": x_error, "y_error": y_error, "gap": float(upper(x, y, None)) - optimum}

    return evaluate


def _relative(v: Variables, reference: Variables) -> float:
    found, known = (
        torch.cat([leaf.detach().flatten().double() for _, leaf in named_leaves(of)]) for of in (v, reference)
    )
    return float((found - known).norm() / known.norm().clamp_min(1.0))
