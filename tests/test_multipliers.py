"""Constraints as one vector with their gradients, and the scales that steps of multipliers rest on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import Problem
from bilevel.dry_run import open_oracles
from bilevel.multipliers import Scale, clipped, constraint_rows, constraint_terms, violation
from bilevel.oracles import Oracles


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


A = doubles(1.0, 2.0, 0.0, -3.0, 0.5, 1.0).view(2, 3)
X, Y = doubles(0.3, -0.2), doubles(0.1, 0.4, -0.6)


def opened(bend: float = 0.0) -> Oracles:
    """c = A y - x + bend ‖y‖² / 2, h = 2 y3 + x1."""
    problem = Problem(
        upper=lambda x, y, b: y.square().sum() + x.square().sum(),
        lower=lambda x, y, b: (y - x.sum()).square().sum(),
        constraint=lambda x, y, b: A @ y - x - 9 + 0.5 * bend * y.square().sum(),
        equality=lambda x, y, b: (2 * y[2] + x[0]).reshape(1),
    )
    return open_oracles(problem, X, Y, needs_hvp=False)[0]


def test_rows_are_the_values_and_their_gradients() -> None:
    oracles = opened(bend=1.0)
    rows = constraint_rows(oracles, X, Y)
    torch.testing.assert_close(rows.value[:2], A @ Y - X - 9 + 0.5 * Y.square().sum())
    torch.testing.assert_close(rows.value[2:], doubles(2 * -0.6 + 0.3))
    torch.testing.assert_close(rows.y, torch.cat([A + Y, doubles(0.0, 0.0, 2.0)[None]]))
    torch.testing.assert_close(rows.x, doubles(-1, 0, 0, -1, 1, 0).view(3, 2))
    assert rows.inequalities == 2
    assert oracles.counts.gradients == 3


def test_terms_weigh_the_rows() -> None:
    oracles, weights = opened(bend=1.0), doubles(0.5, 2.0, -3.0)
    rows = constraint_rows(oracles, X, Y)
    before = oracles.counts
    terms = constraint_terms(oracles, X, Y, weights, 2)
    assert (oracles.counts - before).gradients == 2
    torch.testing.assert_close(terms.value, rows.value)
    torch.testing.assert_close(terms.x, weights @ rows.x)
    torch.testing.assert_close(terms.y, weights @ rows.y)
    alone = constraint_terms(oracles, X, Y, None, 2)
    torch.testing.assert_close(alone.value, rows.value)
    assert not bool(alone.y.any())


def test_clipped_and_violation_treat_equations_with_both_signs() -> None:
    given = doubles(-2.0, 0.5, 9.0, -9.0, 0.3)
    assert clipped(given, 3.0, 3).tolist() == [0.0, 0.5, 3.0, -3.0, 0.3]
    assert violation(given, 3).tolist() == [0.0, 0.5, 9.0, -9.0, 0.3]


def test_a_scale_is_measured_at_the_start() -> None:
    scale = Scale.measure(opened(), X, Y)
    rows = torch.cat([A, doubles(0.0, 0.0, 2.0)[None]])
    torch.testing.assert_close(scale.norms, rows.norm(dim=1))
    unit = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(scale.coupling, torch.linalg.matrix_norm(unit, 2))
    assert float(scale.bend) == 0.0
    assert float(scale.curvature(doubles(1e3, 1e3, 1e3))) == 0.0


def test_curved_constraints_have_a_curvature_that_grows_with_their_multipliers() -> None:
    scale = Scale.measure(opened(bend=2.0), X, Y)
    exact = 2.0 * float((1 / scale.norms[:2]).sum())  # of c1 / norm1 + c2 / norm2
    assert float(scale.bend) == pytest.approx(exact, rel=1e-3)
    multiplier = doubles(3.0, 1.0, 0.0)
    assert float(scale.curvature(multiplier)) >= 2.0 * float(multiplier[:2].sum())
    torch.testing.assert_close(scale.curvature(2 * multiplier), 2 * scale.curvature(multiplier))


def test_a_gradient_that_vanishes_at_the_start_is_measured_nearby() -> None:
    problem = Problem(
        upper=lambda x, y, b: (y - x).square().sum(),
        lower=lambda x, y, b: (y - x).square().sum(),
        constraint=lambda x, y, b: y.square() - 1,
    )
    oracles, x, y = open_oracles(problem, doubles(0.0), doubles(0.0), needs_hvp=False)
    scale = Scale.measure(oracles, x, y)
    assert float(scale.norms) == pytest.approx(0.2)
    assert float(scale.coupling) == 1.0


def test_without_constraints_nothing_is_measured() -> None:
    oracles, x, y = open_oracles(bilevel.problems.scalar().problem, doubles(0.0).sum(), doubles(0.0).sum())
    scale = Scale.measure(oracles, x, y)
    assert scale.norms.shape == (0,)
    assert float(scale.coupling) == float(scale.bend) == 0.0
    assert oracles.counts.gradients == 0


def test_coupling_follows_what_constraints_change_up_at_once_and_down_slowly() -> None:
    scale = Scale(doubles(2.0), doubles(1.0).sum(), doubles(1.0).sum(), doubles(0.0).sum(), 1)
    steeper = scale.followed(doubles(0.6), doubles(0.1, 0.0))  # 0.6 / 2 over 0.1
    assert float(steeper.coupling) == pytest.approx(3.0)
    flatter = steeper.followed(doubles(0.2), doubles(0.1, 0.0))
    assert float(flatter.coupling) == pytest.approx(0.99 * 3.0 + 0.01 * 1.0)
    for _ in range(1000):
        flatter = flatter.followed(doubles(0.0), doubles(0.1, 0.0))
    assert float(flatter.coupling) == 1.0  # never below what the start showed
    rounding = steeper.followed(doubles(1.0), doubles(1e-12, 0.0))
    assert float(rounding.coupling) == pytest.approx(3.0)
