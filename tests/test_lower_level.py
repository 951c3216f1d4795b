"""The lower level alone: closed forms, sets and kinks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel

B = torch.tensor([3.0, 0.5, -2.0], dtype=torch.float64)


def problem(**parts: Any) -> bilevel.Problem:
    return bilevel.Problem(
        upper=lambda x, y, batch: (y - x).square().sum(),
        lower=lambda x, y, batch: 0.5 * (y - B * x).square().sum(),
        **parts,
    )


START = torch.tensor(1.0, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)


def test_ridge_has_its_closed_form() -> None:
    found = bilevel.solve_lower(problem(regularizer=bilevel.L2(weight=lambda x: x)), *START)
    torch.testing.assert_close(found.y, B / 2, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.upper_value, (B / 2 - 1).square().sum(), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.lower_value, B.square().sum() / 4, rtol=1e-8, atol=0)
    assert found.status is bilevel.Status.CONVERGED
    assert float(found.residual) <= 1e-8


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"regularizer": bilevel.L1(weight=1.0)}, [2.0, 0.0, -1.0]),
        ({"lower_set": bilevel.Box(-1.0, 1.0)}, [1.0, 0.5, -1.0]),
    ],
)
def test_kinks_and_bounds_are_exact(parts: dict[str, Any], expected: list[float]) -> None:
    found = bilevel.solve_lower(problem(**parts), *START)
    torch.testing.assert_close(found.y, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    assert found.status is bilevel.Status.CONVERGED


def test_the_start_may_come_from_x() -> None:
    stated = problem(lower_init=lambda x: x.expand(3) * 1)
    found = bilevel.solve_lower(stated, START[0])
    torch.testing.assert_close(found.y, B, rtol=0, atol=1e-8)


def test_options_bound_the_work() -> None:
    scale = torch.tensor([1.0, 30.0, 1000.0], dtype=torch.float64)
    hard = bilevel.Problem(
        upper=lambda x, y, batch: (y - x).square().sum(), lower=lambda x, y, batch: (scale * (y - x).square()).sum()
    )
    few = bilevel.solve_lower(hard, *START, max_steps=2)
    assert (few.status, few.steps) == (bilevel.Status.STEP_LIMIT, 2)
    loose = bilevel.solve_lower(hard, *START, tol=1.0)
    assert loose.status is bilevel.Status.CONVERGED
    assert 1e-8 < float(loose.residual) <= 1.0


def test_without_a_bound_proximal_gradients_take_the_steps_they_need() -> None:
    """Curvatures from 1e-5 to 1: proximal gradients crawl, and 2000 of them are too few."""
    scale = torch.logspace(-5, 0, 8, dtype=torch.float64)
    crawling = bilevel.Problem(
        upper=lambda x, y, batch: (y - x).square().sum(),
        lower=lambda x, y, batch: 0.5 * (scale * (y - x).square()).sum(),
        regularizer=bilevel.L1(1e-9),
    )
    start = START[0], torch.zeros(8, dtype=torch.float64)
    found = bilevel.solve_lower(crawling, *start)
    assert found.status is bilevel.Status.CONVERGED
    assert found.steps > 2000
    torch.testing.assert_close(found.y, 1 - 1e-9 / scale, rtol=0, atol=2e-3)
    assert bilevel.solve_lower(crawling, *start, max_steps=2000).status is bilevel.Status.STEP_LIMIT


@pytest.mark.parametrize(
    ("bound", "parts"),
    [
        ("LBFGS_STEPS", {}),
        ("PROXIMAL_STEPS", {"regularizer": bilevel.L1(1e-3)}),
        ("SLSQP_STEPS", {"constraint": lambda x, y, batch: y.sum().reshape(1) - 1}),
    ],
)
def test_each_minimizer_has_a_bound_of_its_own(
    bound: str, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    curved = bilevel.Problem(
        upper=lambda x, y, batch: (y - x).square().sum(),
        lower=lambda x, y, batch: ((y - B * x).exp() - y + y.square()).sum() + y.prod().square(),
        **parts,
    )
    assert bilevel.solve_lower(curved, *START).steps > 2
    monkeypatch.setattr(f"bilevel.lower_level.minimizers.{bound}", 2)
    few = bilevel.solve_lower(curved, *START)
    assert (few.status, few.steps) == (bilevel.Status.STEP_LIMIT, 2)
    assert bilevel.solve_lower(curved, *START, max_steps=100).steps > 2


def test_the_start_is_not_changed_and_structures_are_kept() -> None:
    stated = bilevel.Problem(
        upper=lambda x, y, batch: (y["a"] - x).square().sum(), lower=lambda x, y, batch: (y["a"] - B * x).square().sum()
    )
    y0 = {"a": torch.zeros(3, dtype=torch.float64)}
    found = bilevel.solve_lower(stated, START[0], y0)
    assert not y0["a"].any()
    torch.testing.assert_close(found.y["a"], B, rtol=0, atol=1e-8)


def test_constraints_are_solved_by_scipy() -> None:
    """min ‖y - B‖² / 2 with y1 + y2 + y3 <= 0 moves B along (1, 1, 1)."""
    found = bilevel.solve_lower(problem(constraint=lambda x, y, batch: y.sum().reshape(1)), *START)
    torch.testing.assert_close(found.y, B - B.mean(), rtol=0, atol=1e-7)
    assert found.status.ok or found.status is bilevel.Status.STALLED


def test_mini_batches_below_are_refused() -> None:
    batches = bilevel.Shuffled(torch.randn(8, 2), batch_size=4)
    with pytest.raises(bilevel.InvalidProblem, match="same lower batch"):
        bilevel.solve_lower(problem(lower_data=batches), *START)


@pytest.mark.parametrize("options", [{"tol": 0.0}, {"max_steps": -1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(bilevel.InvalidProblem, match="tol > 0 and max_steps >= 0"):
        bilevel.solve_lower(problem(), *START, **options)


def test_a_lower_level_without_a_minimum_has_diverged() -> None:
    falling = bilevel.Problem(upper=lambda x, y, batch: (y - x).square().sum(), lower=lambda x, y, batch: (x * y).sum())
    with pytest.raises(bilevel.Diverged, match="unbounded"):
        bilevel.solve_lower(falling, *START)
