"""Problems small enough to be solved by hand: the yardsticks of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.problem import Problem
from bilevel.problems._base import Task


def scalar(
    h: float = 2.0, a: float = 1.5, t: float = 3.0, *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Task:
    """Track a target with one number: `g = h/2 (y - a x)^2`, `f = (y - t)^2 / 2`, so `F' = a (a x - t)`, `x* = t / a`.

    Args:
        h: lower curvature, > 0; the hypergradient does not depend on it.
        a: slope of y*(x) = a x, not 0.
        t: the target.
        dtype: of all numbers.
        device: of all tensors.
    """
    zero = torch.zeros((), dtype=dtype, device=device)
    problem = Problem(
        upper=lambda x, y, batch: 0.5 * (y - t).square(),
        lower=lambda x, y, batch: 0.5 * h * (y - a * x).square(),
        lower_solution=lambda x: a * x,
        reference=zero + t / a,
    )
    return Task("scalar", problem, zero, zero, steps=200, source="closed form")


def quadratic(
    p: int = 4, d: int = 10, condition: float = 3.0, decay: float = 0.1, *, seed: int = 0,
    dtype: torch.dtype = torch.float64, device: str = "cpu",
) -> Task:  # fmt: skip
    """Minimize a quadratic over a quadratic: the contract that every solver must meet with its defaults.

        g = y^T A y / 2 - y^T (B x + c),   f = ‖y - t‖^2 / 2 + decay ‖x‖^2 / 2,   y* = A^-1 (B x + c)

    x* solves `(M^T M + decay I) x = M^T (t - A^-1 c)` with `M = A^-1 B`.

    Args:
        p: upper variables.
        d: lower variables.
        condition: of A, whose eigenvalues are spaced evenly in logarithm between 1 and this.
        decay: >= 0; with 0 and p >= d every target can be reached.
        seed: of A, B, c, t.
        dtype: of all numbers.
        device: of all tensors.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, _ = torch.linalg.qr(draw(d, d))
    a = q @ torch.diag(torch.logspace(0, torch.log10(torch.tensor(condition)).item(), d, dtype=torch.float64)) @ q.T
    b, c, t = draw(d, p), draw(d), draw(d)
    m, shift = torch.linalg.solve(a, b), torch.linalg.solve(a, c)
    reference = torch.linalg.solve(m.T @ m + decay * torch.eye(p, dtype=torch.float64), m.T @ (t - shift))
    a, b, c, t, m, shift, reference = (v.to(device, dtype) for v in (a, b, c, t, m, shift, reference))
    problem = Problem(
        upper=lambda x, y, batch: 0.5 * (y - t).square().sum() + 0.5 * decay * x.square().sum(),
        lower=lambda x, y, batch: 0.5 * y @ (a @ y) - y @ (b @ x + c),
        lower_solution=lambda x: m @ x + shift,
        reference=reference,
    )
    start = torch.zeros(p, dtype=dtype, device=device)
    return Task(
        "quadratic", problem, start, torch.zeros(d, dtype=dtype, device=device), steps=300, source="closed form"
    )
