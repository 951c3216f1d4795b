"""Estimates from values: unbiased for what they claim, with honest standard errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import PES, SGD, Problem, Status, Unrolled, ZerothOrder, hypergradient
from bilevel.dry_run import open_oracles
from bilevel.status import InvalidProblem

H = torch.tensor([0.5, 1.5], dtype=torch.float64)
PROBLEM = Problem(
    upper=lambda x, y, b: 0.5 * (y - 3.0).square().sum(),
    lower=lambda x, y, b: 0.5 * (H * (y - x).square()).sum(),
)
X, Y = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
RATE = 0.3


def exact(steps: int) -> Tensor:
    """The gradient of f after so many steps from Y."""
    p = (1 - RATE * H) ** steps
    return (1 - p) * (p * Y + (1 - p) * X - 3.0)


def test_pairs_are_unbiased_on_a_quadratic_and_know_their_error() -> None:
    """Smoothing a quadratic by a Gaussian adds a constant: its gradient is that of F."""
    estimator = ZerothOrder(lower=SGD(RATE), steps=3, pairs=400, sigma=0.5, restart=True)
    h = hypergradient(PROBLEM, X, Y, estimator=estimator)
    error = h.certificate.error_estimate
    assert error is not None
    assert float((h.gradient - exact(3)).norm()) < 3 * float(error)
    assert float(error) == pytest.approx((3 / 400) ** 0.5 * float(exact(3).norm()), rel=0.3)
    assert h.certificate.status is Status.APPROXIMATE


def test_a_smoothed_objective_is_what_is_estimated() -> None:
    """F = y^3 of y_1 = x: smoothed with sigma, the slope is 3 (x^2 + sigma^2), not 3 x^2."""
    problem = Problem(upper=lambda x, y, b: y**3, lower=lambda x, y, b: 0.5 * (y - x).square())
    one = torch.ones((), dtype=torch.float64)
    estimator = ZerothOrder(lower=SGD(1.0), steps=1, pairs=20_00, sigma=1.0)
    h = hypergradient(problem, one, 0 * one, estimator=estimator)
    assert h.certificate.error_estimate is not None
    assert abs(float(h.gradient) - 6.0) < 3.5 * float(h.certificate.error_estimate)
    assert abs(float(h.gradient) - 3.0) > 3.5 * float(h.certificate.error_estimate)


def test_one_pair_has_no_error_estimate() -> None:
    h = hypergradient(PROBLEM, X, Y, estimator=ZerothOrder(lower=SGD(RATE), steps=1, pairs=1))
    assert h.certificate.error_estimate is not None
    assert float(h.certificate.error_estimate) == torch.inf


def windows(estimator: Any, count: int) -> tuple[Tensor, float]:
    """The sum of a training's windows at one x, each from where the last one ended, and its standard error."""
    oracles, x, y = open_oracles(PROBLEM, X, Y, trains=True)
    state, total, variance = estimator.init(oracles, x, y), torch.zeros_like(x), 0.0
    for window in range(count):
        estimate, state = estimator.estimate(oracles, x, y, state, upper_step=window)
        total, y = total + estimate.gradient, estimate.y
        if estimate.certificate.error_estimate is not None:
            variance += float(estimate.certificate.error_estimate) ** 2
    return total, variance**0.5


@pytest.mark.slow
def test_persistent_windows_are_unbiased_where_truncated_ones_are_not() -> None:
    """Three windows of two steps: the gradient of f after 2, 4 and 6 steps, summed."""
    expected = exact(2) + exact(4) + exact(6)
    found, error = windows(PES(lower=SGD(RATE), steps=2, horizon=6, pairs=1500, sigma=0.3), 3)
    assert float((found - expected).norm()) < 3 * error
    truncated, _ = windows(Unrolled(lower=SGD(RATE), steps=2, restart=False), 3)
    assert float((truncated - expected).norm()) > 6 * error


def test_particles_start_anew_at_the_horizon() -> None:
    estimator = PES(lower=SGD(RATE, 0.5), steps=2, horizon=4, pairs=1)
    oracles, x, y = open_oracles(PROBLEM, X, Y, trains=True)
    state, seen = estimator.init(oracles, x, y), []
    for window in range(5):
        _, state = estimator.estimate(oracles, x, y, state, upper_step=window)
        seen.append((state.memory.window, state.memory.optimizer[0].step))
    assert seen == [(1, 2), (2, 4), (1, 2), (2, 4), (1, 2)]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ZerothOrder(pairs=0), "pairs >= 1"),
        (lambda: ZerothOrder(sigma=0.0), "sigma > 0"),
        (lambda: PES(steps=7, horizon=20), "multiple of steps=7"),
        (lambda: PES(steps=7, horizon=5), "multiple"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, text: str) -> None:
    with pytest.raises(InvalidProblem, match=text):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ZerothOrder, PES])
def test_they_descend_and_are_saved(kind: Any) -> None:
    task = bilevel.problems.scalar()
    options = {"horizon": 20} if kind is PES else {}
    solver = bilevel.HypergradientDescent(estimator=kind(steps=20, pairs=4, **options), lower_steps=0)
    session = bilevel.Session(task.problem, solver, task.x0, task.y0)
    for _ in range(3):
        session.step()
    saved = session.state_dict()
    session.step()
    fresh = bilevel.Session(task.problem, solver, task.x0, task.y0)
    fresh.load_state_dict(saved)
    fresh.step()
    assert torch.equal(fresh.x, session.x)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=80)
    assert abs(float(solution.x) - 2.0) < 0.2
