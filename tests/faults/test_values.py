"""Faults of values: numbers that are not finite, run away or vanish. One test for each row of the fault list."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, DataExhausted, DataSource, Diverged, NonFinite, Problem, Session, SolveFailed, Status
from bilevel.dry_run import open_oracles


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def track(x: Tensor, y: Tensor, _: Any) -> Tensor:
    """A lower objective with y*(x) = x."""
    return 0.5 * (y - x).square().sum()


class Scales(DataSource):
    """The batch of each step is a number: `special` at one step, 1 at all others."""

    def __init__(self, special: float, at: int) -> None:
        self.special, self.at = special, at

    @property
    def deterministic(self) -> bool:
        return False

    def batch(self, step: int, seed: int) -> Tensor:
        return doubles(self.special if step == self.at else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_row_01_upper_loss_not_finite_at_the_start(value: float) -> None:
    problem = Problem(upper=lambda x, y, b: (y - 1).square().sum() + value, lower=track)
    with pytest.raises(NonFinite, match=rf"upper objective is {value} at step 0"):
        bilevel.solve(problem, bilevel.implicit(), doubles(1.0), doubles(0.0))


def test_row_01_upper_loss_not_finite_later_raises_with_the_last_good_point() -> None:
    problem = Problem(
        upper=lambda x, y, b: (b * (y - 5).square()).sum(), lower=track, upper_data=Scales(math.nan, at=3)
    )
    start = doubles(0.0)
    with pytest.raises(NonFinite, match=r"(?s)upper objective is nan.*upper step 3.*on_nonfinite='skip'") as caught:
        bilevel.solve(problem, bilevel.implicit(), start, start, steps=10)
    x, y = caught.value.last_good
    assert bool(x.isfinite().all() & y.isfinite().all())
    three = bilevel.solve(problem, bilevel.implicit(), start, start, steps=2)
    assert torch.equal(x, three.x)  # the last x at which everything was finite
    assert not start.any()


def test_row_01_skip_goes_on_with_the_next_batch() -> None:
    problem = Problem(
        upper=lambda x, y, b: (b * (y - 1).square()).sum(), lower=track, upper_data=Scales(math.nan, at=3)
    )
    solution = bilevel.solve(problem, bilevel.implicit(), doubles(0.0), doubles(0.0), steps=150, on_nonfinite="skip")
    assert solution.status is Status.COMPLETED
    assert 3 not in [row["step"] - 1 for row in solution.history]
    torch.testing.assert_close(solution.x, doubles(1.0), atol=1e-2, rtol=0)


def test_row_01_backtrack_stays_where_the_loss_is_finite() -> None:
    problem = Problem(upper=lambda x, y, b: (y - 0.9).square().sum() - 1e-6 * (1 - y).log().sum(), lower=track)
    solver = bilevel.implicit(upper=SGD(lr=3.0))
    start = doubles(0.0)
    with pytest.raises(NonFinite):
        bilevel.solve(problem, solver, start, start, steps=30)
    solution = bilevel.solve(problem, solver, start, start, steps=30, on_nonfinite="backtrack")
    assert solution.status.ok
    assert float(solution.best_x) == pytest.approx(0.9, abs=1e-2)


@pytest.mark.parametrize("regularized", [False, True])
def test_row_02_lower_gradient_not_finite_names_the_leaf(regularized: bool) -> None:
    problem = Problem(
        upper=lambda x, y, b: y["good"].sum() + y["bad"].sum(),
        lower=lambda x, y, b: track(x, y["good"], b) + y["bad"].sqrt().sum(),
        regularizer=bilevel.L2(1.0) if regularized else None,
    )
    with pytest.raises(NonFinite, match=r"gradient of the lower objective in leaf 'bad' is not finite"):
        bilevel.hypergradient(problem, doubles(1.0), {"good": doubles(1.0), "bad": doubles(0.0)})


def test_row_02_lower_loss_not_finite_at_a_later_step() -> None:
    problem = Problem(
        upper=lambda x, y, b: (y - 5).square().sum(),
        lower=lambda x, y, b: (b * (y - x).square()).sum(),
        lower_data=Scales(math.nan, at=7),
    )
    solver = bilevel.implicit(lower=SGD(lr=0.1), lower_steps=5)
    with pytest.raises(NonFinite, match=r"lower objective is nan at upper step 1, lower step 2") as caught:
        bilevel.solve(problem, solver, doubles(0.0), doubles(0.0), steps=5)
    assert all(bool(leaf.isfinite().all()) for leaf in caught.value.last_good)


def test_row_02_starts_must_be_finite() -> None:
    problem = Problem(upper=lambda x, y, b: y["v"].sum(), lower=lambda x, y, b: track(x, y["v"], b))
    with pytest.raises(NonFinite, match="y0: leaf 'v' is not finite in 1 entries"):
        bilevel.hypergradient(problem, doubles(1.0, 2.0), {"v": doubles(1.0, math.nan)})
    with pytest.raises(NonFinite, match="x0: leaf 'x' is not finite in 2 entries"):
        bilevel.hypergradient(problem, doubles(math.inf, math.nan), {"v": doubles(1.0, 2.0)})


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_row_03_one_nan_in_the_hypergradient_is_raised_not_clipped(clip_norm: float | None) -> None:
    """The slope of sqrt(x²) is 0/0 at 0, where the second entry arrives after one exact step."""
    problem = Problem(
        upper=lambda x, y, b: (y - 5).square().sum() + x[1].square().sqrt(),
        lower=lambda x, y, b: track(x[0], y, b),
    )
    solver = bilevel.implicit(upper=SGD(lr=0.5), clip_norm=clip_norm)
    if clip_norm is not None:
        return_at_zero = doubles(0.0, 0.0)
        with pytest.raises(NonFinite, match="gradient of the upper objective in leaf 'x'"):
            bilevel.solve(problem, solver, return_at_zero, doubles(0.0))
        return
    with pytest.raises(NonFinite, match=r"hypergradient is nan.*upper step 1") as caught:
        bilevel.solve(problem, solver, doubles(0.0, 0.5), doubles(0.0), steps=5)
    assert all(bool(leaf.isfinite().all()) for leaf in caught.value.last_good)


def test_row_03_clipping_waits_for_a_finite_hypergradient() -> None:
    """Clipping by a norm that is not a number would spread one NaN over all entries."""
    problem = Problem(
        upper=lambda x, y, b: (y - 5).square().sum() + (b * x[1].square()).sum().sqrt(),
        lower=lambda x, y, b: track(x[0], y, b),
        upper_data=Scales(0.0, at=1),
    )
    oracles, x, y = open_oracles(problem, doubles(0.0, 0.5), doubles(0.0))
    solver = bilevel.implicit(clip_norm=0.1)
    state = solver.step(oracles, solver.init(oracles, x, y))
    after = solver.step(oracles, state)
    assert after.x.isnan().tolist() == [False, True]
    with pytest.raises(NonFinite, match="upper step 1"):
        bilevel.solve(problem, solver, x, y, steps=5)


def test_row_04_diverging_lower_steps() -> None:
    problem = Problem(upper=lambda x, y, b: (y - 5).square().sum(), lower=track)
    solver = bilevel.implicit(lower=SGD(lr=2.5), lower_steps=50)
    session = Session(problem, solver, doubles(1.0), doubles(0.0))
    with pytest.raises(Diverged, match=r"(?s)upper step 0.*multiply the lower lr by 0\.1"):
        session.step()
    solution = bilevel.solve(problem, solver, doubles(1.0), doubles(0.0), steps=3)
    assert solution.status is Status.DIVERGED
    assert "multiply the lower lr by 0.1" in solution.message
    assert torch.equal(solution.x, doubles(1.0))
    with pytest.raises(SolveFailed, match="diverged") as caught:
        bilevel.solve(problem, solver, doubles(1.0), doubles(0.0), steps=3, throw=True)
    assert torch.equal(caught.value.last_good[0], doubles(1.0))


def test_row_04_lower_loss_that_rises_for_twenty_steps() -> None:
    """Growth too slow to be a thousandfold is told by its persistence."""
    problem = Problem(upper=lambda x, y, b: (y - 5).square().sum(), lower=track)
    solver = bilevel.implicit(lower=SGD(lr=2.02), lower_steps=30)
    solution = bilevel.solve(problem, solver, doubles(1.0), doubles(0.0), steps=3)
    assert solution.status is Status.DIVERGED


def test_row_05_lower_level_unbounded_below() -> None:
    problem = Problem(upper=lambda x, y, b: (y - 5).square().sum(), lower=lambda x, y, b: (x * y - y.square()).sum())
    solution = bilevel.solve(problem, bilevel.implicit(), doubles(1.0), doubles(0.1), steps=3)
    assert solution.status is Status.DIVERGED
    assert "unbounded below; bound it with a regularizer" in solution.message


def test_row_06_too_long_an_upper_step_is_shortened_or_stalls() -> None:
    problem = Problem(upper=lambda x, y, b: (y - 1).square().sum().exp(), lower=track)
    solver = bilevel.implicit(upper=SGD(lr=100.0))
    solution = bilevel.solve(problem, solver, doubles(2.0), doubles(2.0), steps=40, on_nonfinite="backtrack")
    assert solution.status.ok
    assert float(solution.best_x) == pytest.approx(1.0, abs=0.2)
    hopeless = bilevel.implicit(upper=SGD(lr=1e12))
    stalled = bilevel.solve(problem, hopeless, doubles(2.0), doubles(2.0), steps=40, on_nonfinite="backtrack")
    assert stalled.status is Status.STALLED
    assert "lower lr" in stalled.message
    assert bool(stalled.x.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_07_half_precision_is_held_in_float32_with_a_warning(dtype: torch.dtype) -> None:
    """A hundred steps of 1e-4 from 1 would each round to nothing in half precision."""
    problem = Problem(
        upper=lambda x, y, b: (y - 5).float().square().sum(), lower=lambda x, y, b: track(x, y, b).float()
    )
    solver = bilevel.implicit(upper=bilevel.Adam(lr=1e-4), lower=SGD(lr=0.5), lower_steps=10)
    x0, y0 = torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype)
    with pytest.warns(bilevel.PrecisionWarning, match=r"float32.*Pass float32 variables"):
        solution = bilevel.solve(problem, solver, x0, y0, steps=100)
    assert solution.x.dtype == dtype
    assert solution.state.x.dtype == torch.float32
    torch.testing.assert_close(solution.state.x, torch.full((2,), 1.01), atol=1e-4, rtol=0)


def test_row_08_adam_through_a_zero_gradient_has_a_finite_derivative() -> None:
    adam = bilevel.Adam(lr=lambda x, step: x)

    def trained(rate: Tensor) -> Tensor:
        y, state = doubles(1.0, 2.0), adam.init(doubles(1.0, 2.0))
        for gradient in (doubles(0.0, 1.0), doubles(0.0, 0.5)):
            y, state = adam.update(y, gradient * y, state, rate)
        return y.sum()

    rate = doubles(0.1).requires_grad_()
    (slope,) = torch.autograd.grad(trained(rate), rate)
    difference = (trained(doubles(0.1 + 1e-6)) - trained(doubles(0.1 - 1e-6))) / 2e-6
    torch.testing.assert_close(slope, difference.reshape(slope.shape), rtol=1e-7, atol=0)


class Once(DataSource):
    """Gives the batches of a list; one step, one batch."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    @property
    def deterministic(self) -> bool:
        return False

    def batch(self, step: int, seed: int) -> Any:
        return self.batches[step % len(self.batches)]


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_row_09_empty_batch(level: str) -> None:
    problem = Problem(
        upper=lambda x, y, b: (y - 5).square().sum() if b is None else (b["t"] - y).square().mean(),
        lower=track if level == "upper" else lambda x, y, b: track(x, y, b) + b["t"].mean(),
        **{f"{level}_data": Once({"t": torch.zeros(0, 1)})},
    )
    with pytest.raises(DataExhausted, match=rf"empty batch: the {level} batch at step 0 has 't' of shape \(0, 1\)"):
        bilevel.hypergradient(problem, doubles(1.0), doubles(0.0))
    with pytest.raises(DataExhausted, match="empty batch"):
        bilevel.Full({"t": torch.zeros(0, 1)})


@pytest.mark.parametrize("where", ["upper", "lower", "regularizer"])
def test_row_10_overflow_of_exp_names_x(where: str) -> None:
    plain: Callable[..., Tensor] = lambda x, y, b: (y - x).square().sum()  # noqa: E731
    scaled: Callable[..., Tensor] = lambda x, y, b: (x.exp() * (y - 1).square()).sum()  # noqa: E731
    problem = Problem(
        upper=scaled if where == "upper" else plain,
        lower=scaled if where == "lower" else plain,
        regularizer=bilevel.L2(lambda x: x.exp()) if where == "regularizer" else None,
    )
    message = {"regularizer": r"L2\(weight\).*is inf.*x = 100"}.get(
        where, rf"{where} objective is inf.*x between 1 and 100"
    )
    with pytest.raises(NonFinite, match=message):
        bilevel.hypergradient(problem, torch.tensor([1.0, 100.0]), torch.zeros(2))
