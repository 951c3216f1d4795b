"""The two optimizers of penalties: lengths by signs, and quasi-Newton steps within them."""

from __future__ import annotations

import pytest
import torch

from bilevel.integrations.sklearn._rprop import Rprop
from bilevel.integrations.sklearn._secant import Secant, _updated

VALLEY = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)


def run(optimizer: Rprop | Secant, matrix: torch.Tensor, steps: int) -> torch.Tensor:
    y = torch.tensor([3.0, 1.0], dtype=torch.float64)
    state = optimizer.init(y)
    for _ in range(steps):
        y, state = optimizer.update(y, matrix @ y, state)  # type: ignore[arg-type]
    return y


def test_rprop_does_not_see_the_size_of_gradients() -> None:
    scales = torch.tensor([1e-8, 1e8], dtype=torch.float64).diag()
    torch.testing.assert_close(run(Rprop(), scales, 30), run(Rprop(), torch.eye(2, dtype=torch.float64), 30))
    assert run(Rprop(), scales, 30).abs().max() < 1e-2


def test_rprop_lengths() -> None:
    optimizer = Rprop(lr=1.0, grow=2.0, shrink=0.25, longest=3.0)
    y = torch.zeros(1)
    state = optimizer.init(y)
    for slope, expected in [(-1.0, 1.0), (-1.0, 3.0), (-1.0, 6.0), (1.0, 5.25), (0.0, 5.25)]:
        y, state = optimizer.update(y, torch.tensor([slope]), state)
        assert y.item() == expected


def test_secant_goes_along_a_valley_that_rprop_crosses() -> None:
    assert run(Secant(), VALLEY, 30).norm() < 1e-6
    assert run(Rprop(), VALLEY, 30).norm() > 1e-3


def test_secant_bounds_its_steps_and_goes_down_even_along_a_saddle() -> None:
    saddle = torch.tensor([1.0, -1.0], dtype=torch.float64).diag()
    optimizer, y = Secant(), torch.tensor([3.0, 0.1], dtype=torch.float64)
    state = optimizer.init(y)
    for _ in range(50):
        before = y
        y, state = optimizer.update(y, saddle @ y, state)
        assert bool(((y - before).abs() <= 2 * state.lengths.length + 1e-12).all())
        assert (y - before) @ saddle @ before < 0


def test_the_update_meets_the_secant_equation() -> None:
    s = torch.tensor([1.0, 0.5], dtype=torch.float64)
    z = VALLEY @ s
    torch.testing.assert_close(_updated(2 * torch.eye(2, dtype=torch.float64), s, z, first=True) @ z, s)


@pytest.mark.parametrize("optimizer", [Rprop(), Secant()])
def test_scaled_lengths(optimizer: Rprop | Secant) -> None:
    y, g = torch.zeros(2), torch.ones(2)
    half = optimizer.scaled(0.5)
    assert half.update(y, g, half.init(y))[0].tolist() == [-0.25, -0.25]  # type: ignore[arg-type]
    other = optimizer.with_lr(0.1)
    torch.testing.assert_close(other.update(y, g, other.init(y))[0], torch.tensor([-0.1, -0.1]))  # type: ignore[arg-type]
