"""The aggregated objective: its derivatives against those written out, in every way, and what they count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import L2, Problem, Shuffled
from bilevel.aggregated import Aggregated
from bilevel.dry_run import open_oracles
from bilevel.oracles import Counts

MU = 0.3


def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
    return (x.sin().sum() * y.square()).sum() + (y**3).sum()


def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
    return (y[..., :2] * x).square().sum() + (1 + y.square()).log().sum() + (x * y[..., 1:]).sum()


def points(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y, v = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2,), (*lead, 3), (*lead, 3))
    )
    return x, y, v


def written_out(x: Tensor, y: Tensor, v: Tensor, mu: float, weight: float, blocks: int = 0) -> tuple[Tensor, ...]:
    """Return value, gradient, HVP and cross product of psi by autograd; with blocks f is a mean and g a sum."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    rows = y.unbind() if blocks else [y]
    f = torch.stack([upper(x, row, None) for row in rows]).mean()
    g = torch.stack([lower(x, row, None) for row in rows]).sum()
    psi = mu * f + (1 - mu) * (g + weight * 0.5 * (x.exp().sum() * y.square()).sum())
    gradient = torch.autograd.grad(psi, y, create_graph=True)[0]
    cross, product = torch.autograd.grad(gradient, [x, y], v)
    return psi.detach(), gradient.detach(), product, cross


@pytest.mark.parametrize("way", ["double_backward", "forward_over_reverse", "math_attention", "differences"])
@pytest.mark.parametrize("mu", [0.0, MU, 1.0])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_agrees_with_autograd(way: Any, mu: float, weight: float) -> None:
    x, y, v = points()
    regularizer = L2(lambda x: weight * x.exp().sum()) if weight else None
    oracles, x, y = open_oracles(Problem(upper=upper, lower=lower, regularizer=regularizer, hvp=way), x, y)
    psi = Aggregated(oracles, x, y, mu)
    found = (psi.value, psi.gradient, psi.hvp(v), psi.cross(v))
    tolerance = 1e-7 if way == "differences" else 1e-12
    for one, other in zip(found, written_out(x, y, v, mu, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        assert not one.requires_grad


def test_blocks() -> None:
    x, y, v = points(4)
    problem = Problem(upper=upper, lower=lower, regularizer=L2(lambda x: 0.7 * x.exp().sum()), blocks=4)
    oracles, x, y = open_oracles(problem, x, y)
    psi = Aggregated(oracles, x, y, MU)
    for one, other in zip(
        (psi.value, psi.gradient, psi.hvp(v), psi.cross(v)), written_out(x, y, v, MU, 0.7, blocks=4), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_counts_and_leaves_the_upper_objective_alone_without_weight() -> None:
    calls = []

    def counted(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        return upper(x, y, batch)

    x, y, v = points()
    oracles, x, y = open_oracles(Problem(upper=counted, lower=lower), x, y)
    calls.clear()
    before = oracles.counts
    psi = Aggregated(oracles, x, y, 0.0)
    psi.hvp(v)
    psi.cross(v)
    assert not calls
    assert oracles.counts - before == Counts(gradients=1, hvps=1, crosses=1)
    before = oracles.counts
    psi = Aggregated(oracles, x, y, 0.5)
    psi.hvp(v)
    assert len(calls) == 1
    assert oracles.counts - before == Counts(gradients=2, hvps=1)


def test_each_level_sees_its_own_batch() -> None:
    data = torch.arange(8, dtype=torch.float64).reshape(8, 1)
    problem = Problem(
        upper=lambda x, y, b: (b[0].sum() * y * x).sum(),
        lower=lambda x, y, b: (y - x * b[0].mean()).square().sum(),
        upper_data=Shuffled((data,), batch_size=2),
        lower_data=Shuffled((data,), batch_size=2),
    )
    one = torch.ones(1, dtype=torch.float64)
    oracles, x, y = open_oracles(problem, one, one)
    psi = Aggregated(oracles, x, y, MU, upper_step=3, lower_step=5)
    expected = MU * oracles.upper_gradient(x, y, 3).y + (1 - MU) * oracles.lower_gradient(x, y, 5)[1]
    torch.testing.assert_close(psi.gradient, expected)
