"""Metasmoothness: 1 where weights are linear in x, low where training is chaotic or kinked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import SGD, Adam, NotMetasmooth, Problem, metasmoothness
from bilevel.status import InvalidProblem


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A = draw(6, 4)


def linear(scale: float = 1.0) -> Problem:
    return Problem(
        upper=lambda x, y, b: (y / scale - 1).square().sum(),
        lower=lambda x, y, b: 0.5 * (y / scale - A @ x).square().sum() * scale**2,
    )


def test_weights_linear_in_x_score_one() -> None:
    x, y0 = draw(4, seed=1), draw(6, seed=2)
    for scale in (1.0, 100.0):
        found = metasmoothness(linear(scale), x, scale * y0, lower=SGD(0.2), steps=7, directions=5)
        assert found.scores.shape == (5,)
        torch.testing.assert_close(found.scores, torch.ones(5, dtype=torch.float64))
    # F is a quadratic of x: its second difference is 2 ‖(1 - 0.8^7) A v‖^2 for each v.
    assert bool((found.curvature > 0).all())
    half = metasmoothness(linear(), x, y0, h=0.05, lower=SGD(0.2), steps=7, directions=5)
    torch.testing.assert_close(half.curvature, found.curvature, rtol=1e-6, atol=1e-8)


def test_x_that_moves_nothing_scores_one() -> None:
    problem = Problem(upper=lambda x, y, b: y.sum() + x.sum(), lower=lambda x, y, b: (y - 0 * x).square().sum())
    x = torch.ones(2)
    assert float(metasmoothness(problem, x, x, lower=SGD(0.1), steps=3).score) == 1.0


def test_chaos_is_not_smooth() -> None:
    """Logistic maps: after 40 steps nothing of the response is left."""
    problem = Problem(upper=lambda x, y, b: y.sum(), lower=lambda x, y, b: ((1 - x) * y**2 / 2 + x * y**3 / 3).sum())
    x, y0 = torch.full((30,), 3.7).double(), torch.full((30,), 0.3).double()
    with pytest.warns(NotMetasmooth, match="do not respond linearly"):
        found = metasmoothness(problem, x, y0, h=1e-3, lower=SGD(1.0), steps=100)
    assert -0.5 < float(found.score) < 0.5
    assert bool((found.scores.abs() <= 1).all())
    assert float(metasmoothness(problem, x, y0, h=1e-3, lower=SGD(1.0), steps=3).score) > 0.99


def relu_net(x: Any, y: Any, b: Any) -> Tensor:
    inputs, targets = draw(24, 6, seed=5), draw(24, seed=6)
    hidden = torch.relu(inputs @ y["a"] + y["b"])
    return (x.exp() * (hidden @ y["c"] - targets).square()).mean()


def test_a_larger_step_is_less_smooth() -> None:
    problem = Problem(upper=lambda x, y, b: y["c"].sum(), lower=relu_net)
    y0 = {"a": draw(6, 8, seed=7), "b": draw(8, seed=8), "c": draw(8, seed=9)}
    x = torch.zeros(24, dtype=torch.float64)
    small, large = (metasmoothness(problem, x, y0, h=h, lower=Adam(0.05), steps=30).score for h in (1e-4, 0.1))
    assert float(small) > float(large) > 0.5


@pytest.mark.parametrize("options", [{"h": 0.0}, {"directions": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidProblem, match="metasmoothness needs"):
        metasmoothness(linear(), draw(4), draw(6), lower=SGD(0.1), **options)
