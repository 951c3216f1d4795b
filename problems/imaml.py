"""Meta-learning with quadratic tasks: the proximal lower problem of implicit MAML, solved by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.data import Full
from bilevel.problem import Problem
from bilevel.problems._base import Task


def imaml_quadratic(
    tasks: int = 5, d: int = 12, strength: float = 2.0, *, seed: int = 0, dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Task:  # fmt: skip
    """Choose the common start x of several quadratic tasks (blocks), each adapted with a proximal term.

        g_i = y^T Q_i y / 2 - c_i^T y + s ‖y - x‖^2 / 2,   f_i = ‖y - t_i‖^2 / 2,   y_i* = (Q_i + s I)^-1 (c_i + s x)

    With `M_i = s (Q_i + s I)^-1` and `r_i = t_i - (Q_i + s I)^-1 c_i`, x* solves `sum_i M_i^T M_i x = sum_i M_i^T r_i`.

    Args:
        tasks: how many.
        d: variables of each; x has as many.
        strength: s > 0 of the proximal term; large s keeps y near x.
        seed: of Q_i (eigenvalues between 0.5 and 3), c_i, t_i.
        dtype: of all numbers.
        device: of all tensors.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rotations, _ = torch.linalg.qr(draw(tasks, d, d))
    eigenvalues = torch.linspace(0.5, 3.0, d, dtype=torch.float64)
    q = rotations @ torch.diag(eigenvalues) @ rotations.mT
    c, t = draw(tasks, d), draw(tasks, d) + 1.0
    inverse = torch.linalg.inv(q + strength * torch.eye(d, dtype=torch.float64))
    m, shift = strength * inverse, (inverse @ c.unsqueeze(-1)).squeeze(-1)
    reference = torch.linalg.solve((m.mT @ m).sum(0), (m.mT @ (t - shift).unsqueeze(-1)).sum(0).squeeze(-1))
    q, c, t, m, shift, reference = (v.to(device, dtype) for v in (q, c, t, m, shift, reference))

    def lower(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        curvature, slope = batch
        return 0.5 * y @ (curvature @ y) - slope @ y + 0.5 * strength * (y - x).square().sum()

    problem = Problem(
        upper=lambda x, y, target: 0.5 * (y - target).square().sum(),
        lower=lower,
        upper_data=Full(t),
        lower_data=Full((q, c)),
        lower_init=lambda x: x.expand(tasks, d).clone(),
        blocks=tasks,
        lower_solution=lambda x: m @ x + shift,
        reference=reference,
    )
    start = torch.zeros(d, dtype=dtype, device=device)
    return Task("imaml-quadratic", problem, start, start.expand(tasks, d).clone(), steps=300, source="closed form")
