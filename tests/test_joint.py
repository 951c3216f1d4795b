"""Curvatures in both variables at once, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bilevel.joint import coupling, joint_smoothness, natural_unit
from bilevel.smoothness import smoothness


def quadratic(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    full = (full + full.T).to(dtype)
    return full, torch.randn(3, generator=generator).to(dtype), torch.randn(4, generator=generator).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_against_dense_matrices(dtype: torch.dtype, tolerance: float) -> None:
    full, x, y = quadratic(dtype)

    def gradients(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = full @ torch.cat([x, y.flatten()])
        return both[:3], both[3:].view_as(y)

    largest = float(torch.linalg.eigvalsh(full.double()).abs().max())
    assert float(joint_smoothness(gradients, x, y)) == pytest.approx(largest, rel=tolerance)
    assert float(joint_smoothness(gradients, x, y.view(2, 2))) == pytest.approx(largest, rel=tolerance)
    mixed = float(torch.linalg.svdvals(full[:3, 3:].double())[0])
    assert float(coupling(gradients, x, y)) == pytest.approx(mixed, rel=tolerance)
    assert float(coupling(gradients, x, y.view(2, 2))) == pytest.approx(mixed, rel=tolerance)


def test_nothing_is_coupled() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    assert float(coupling(lambda x, y: (x, 2 * y), zero, zero)) == 0.0


def test_a_start_of_signs_would_miss_the_diagonal() -> None:
    """(x + y)^2 has curvature along (1, 1) only, and (1, -1) is a vector of random signs."""
    one = torch.zeros(1, dtype=torch.float64)
    assert float(joint_smoothness(lambda x, y: (2 * (x + y), 2 * (x + y)), one, one)) == pytest.approx(4.0)
    assert float(smoothness(lambda v: 2 * v.sum().expand(2), torch.zeros(2, dtype=torch.float64))) == pytest.approx(4.0)


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e3])
def test_natural_unit_follows_the_units_of_x(factor: float) -> None:
    full, x, y = quadratic()
    full[:3, :3] *= 0.01  # little curvature in x alone: the coupling decides

    def gradients(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = full @ torch.cat([factor * x, y])
        return factor * both[:3], both[3:]

    below = float(torch.linalg.eigvalsh(full[3:, 3:]).abs().max())
    across = float(torch.linalg.svdvals(full[:3, 3:])[0])
    unit = natural_unit(gradients, x / factor, y, coupled=0.5)
    assert float(unit) == pytest.approx(0.5 * below / across / factor, rel=1e-4)
    scaled = joint_smoothness(gradients, x / factor, y, unit=unit)
    plain = joint_smoothness(gradients, x / factor, y, unit=1 / factor)
    assert float(scaled) < 2 * below
    assert float(plain) == pytest.approx(float(torch.linalg.eigvalsh(full).abs().max()), rel=1e-4)


def test_natural_unit_where_x_is_curved_or_alone() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    assert float(natural_unit(lambda x, y: (25 * x + 0.1 * y, y + 0.1 * x), zero, zero, coupled=1.0)) == pytest.approx(
        0.2, rel=1e-3
    )
    assert float(natural_unit(lambda x, y: (0 * x, y), zero, zero, coupled=2.0)) == 1.0
    assert float(natural_unit(lambda x, y: (-y, y**3 - x), zero, zero, coupled=2.0)) == 1.0  # flat at 0
