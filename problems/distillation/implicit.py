"""Distillation by the implicit function theorem: the baseline with one network, kept near its minimum."""

from __future__ import annotations

from typing import Any

from bilevel.hypergradients.implicit import Implicit
from bilevel.linear import CG, LinearSolver
from bilevel.optimizers import LBFGS, Adam, Optimizer
from bilevel.solvers.hypergradient_descent import HypergradientDescent


def implicit(
    *,
    linear: LinearSolver | None = None,
    lower: Optimizer[Any] | LBFGS | None = None,
    lower_steps: int = 50,
    upper: Optimizer[Any] | None = None,
    clip_norm: float | None = None,
) -> HypergradientDescent:
    """Return the descent that keeps one network near its minimum on x, with an inverse-Hessian product at each step.

        h = df/dx - J^T v,   (H + damping I) v = df/dy

    Args:
        linear: of the system with H; `CG(damping=0.01, max_steps=20)` if None. The paper takes a Neumann series.
        lower: optimizer of the network; `Adam(1e-3)` if None. Its state, and the network, go on from step to step.
        lower_steps: before each upper step.
        upper: optimizer of x; `Adam(1e-2)` if None.
        clip_norm: longer hypergradients are scaled down to this norm.

    Notes:
        A network's Hessian is not positive definite, and the damping only covers mild negative curvature; solves that
        meet more are used as they are and flagged by the certificate (`Implicit(truncate=True)`). The images fit the
        one network that x was distilled with: fresh ones do worse. State the problem with some `decay`.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", AISTATS 2020,
        arXiv 1911.02590.

    Example:
        >>> import bilevel
        >>> import torch
        >>> from bilevel.problems import distillation as dd
        >>> train = bilevel.problems.Part(torch.tensor([[[[-1.0]]], [[[1.0]]]]), torch.tensor([0, 1]))
        >>> task = dd.distillation(train, dd.mlp(shape=(1, 1, 1), classes=2), start="noise", decay=0.1)
        >>> solution = bilevel.solve(task.problem, dd.implicit(upper=bilevel.Adam(0.1)), task.x0, task.y0, steps=40)
        >>> solution.x["images"].flatten().sign()
        tensor([-1.,  1.])
    """
    return HypergradientDescent(
        upper=Adam(lr=1e-2) if upper is None else upper,
        lower=Adam(lr=1e-3) if lower is None else lower,
        lower_steps=lower_steps,
        estimator=Implicit(linear=CG(damping=0.01, max_steps=20) if linear is None else linear, truncate=True),
        clip_norm=clip_norm,
    )
