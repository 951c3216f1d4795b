"""F3SA: what its recursive estimates do to noise, its costs and options. Its limits are in test_first_order.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, InvalidProblem, Problem
from bilevel.data import DataSource
from bilevel.dry_run import open_oracles
from bilevel.optimizers import Power
from bilevel.problems import toys
from bilevel.solvers.f2sa import F2SA
from bilevel.solvers.f3sa import F3SA

A = torch.linspace(1, 4, 6, dtype=torch.float64)
B = torch.linspace(-0.5, 0.5, 24, dtype=torch.float64).reshape(4, 6)
T = torch.linspace(1, -1, 6, dtype=torch.float64)
X, Y = torch.zeros(4, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)


class Noise(DataSource):
    """A fresh noise vector at every step."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    @property
    def deterministic(self) -> bool:
        return False

    def batch(self, step: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(hash((step, seed)) & (2**62 - 1))
        return self.scale * torch.randn(6, generator=generator, dtype=torch.float64)


def noisy(scale: float = 0.3) -> Problem:
    return Problem(
        upper=lambda x, y, b: 0.5 * (y - T).square().sum() + 0.25 * (x - 1).square().sum() + b @ y,
        lower=lambda x, y, b: 0.5 * y @ (A * y) - (x @ B) @ y + b @ y,
        upper_data=Noise(scale),
        lower_data=Noise(scale),
    )


def hypergradient(x: Tensor) -> Tensor:
    return 0.5 * (x - 1) + B @ (((x @ B) / A - T) / A)


def test_estimates_carry_a_fraction_of_the_noise() -> None:
    """The noise adds to gradients and not to their differences, so an estimate is a mean of about 1 / η batches."""
    oracles, x, y = open_oracles(noisy(), X, Y, needs_hvp=False)
    errors: dict[float, list[Tensor]] = {0.05: [], 1.0: []}
    for renewal, found in errors.items():
        solver = F3SA(renewal=renewal, penalty=10.0)
        state = solver.init(oracles, x, y)
        for k in range(150):
            at_y = state.relaxed
            state = solver.step(oracles, state)
            if k >= 60:
                found.append(state.estimates.f_y - (at_y - T))
    noise, plain = (torch.stack(errors[renewal]).square().mean().sqrt() for renewal in (0.05, 1.0))
    assert float(plain) == pytest.approx(0.3, rel=0.1)
    # The stationary recursion e <- (1 - η) e + η ζ has the deviation sqrt(η / (2 - η)) of ζ: 0.16.
    assert float(noise / plain) == pytest.approx(0.16, rel=0.4)


def test_the_penalty_stays_outside_the_estimates() -> None:
    """Folded into them, a growing penalty would leave a share of its old value in the direction."""
    problem = bilevel.problems.quadratic().problem
    oracles, x, y = open_oracles(problem, torch.zeros(4).double(), torch.zeros(10).double(), needs_hvp=False)
    solver = F3SA(penalty=Power(1.0, 2.0), renewal=0.01, upper=SGD(1e-3))
    state = solver.init(oracles, x, y)
    for _ in range(10):
        state = solver.step(oracles, state)
    # Without noise the estimates are the gradients, at the points where they were taken.
    at_x, new = state.before[0], oracles.lower_gradients(state.before[0], state.y)
    torch.testing.assert_close(state.estimates.g_x_at_z, new.x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        state.estimates.g_x_at_y, oracles.lower_gradients(at_x, state.relaxed).x, rtol=1e-10, atol=1e-12
    )


@pytest.mark.slow
def test_at_equal_steps_it_ends_closer_than_f2sa() -> None:
    """With noise that is the same at both points; what depends on the point cancels less."""
    options: dict[str, Any] = {"upper": SGD(0.5), "penalty": 100.0, "lower_lr": 0.2}
    errors = []
    for solver in (F2SA(**options, lower_steps=1), F3SA(**options, renewal=0.05)):
        total = 0.0
        for seed in range(2):
            oracles, x, y = open_oracles(noisy(), X, Y, seed=seed, needs_hvp=False)
            state: Any = solver.init(oracles, x, y)
            for k in range(500):
                state = solver.step(oracles, state)
                total += float(hypergradient(state.x).square().sum()) if k >= 200 else 0.0
        errors.append(total / 600)
    assert errors[1] < 0.25 * errors[0]


def test_counts() -> None:
    oracles, x, y = open_oracles(noisy(), X, Y, needs_hvp=False)
    for solver in (F3SA(), F3SA(lower_lr=0.1)):
        state = solver.init(oracles, x, y)
        for _ in range(2):
            before = oracles.counts
            state = solver.step(oracles, state)
            assert oracles.counts - before == (1, 12 + 1, 0, 0)


@pytest.mark.slow
def test_shen_and_a_simple_quadratic() -> None:
    for task, steps in ((toys.shen(1.0), 600), (toys.sc(), 600)):
        solution = bilevel.solve(task.problem, F3SA(upper=SGD(0.02)), task.x0, task.y0, steps=steps)
        assert task.evaluate is not None
        assert task.evaluate(solution.x, solution.y)["x_error"] <= 1e-2


def test_independent_batches_are_others() -> None:
    oracles, x, y = open_oracles(noisy(), X, Y, needs_hvp=False)
    shared, independent = (F3SA(shared_batches=flag) for flag in (True, False))
    one, other = (solver.step(oracles, solver.init(oracles, x, y)) for solver in (shared, independent))
    assert not torch.equal(one.y, other.y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"renewal": 0.0}, "renewal must be"),
        ({"renewal": 1.5}, "renewal must be in"),
        ({"penalty": -1.0}, "penalty must be"),
        ({"lower_lr": 0.0}, "lower_lr must be"),
        ({"upper": None}, "upper must be an Optimizer"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        F3SA(**options)


def test_unstable_lower_steps_are_refused() -> None:
    with pytest.raises(InvalidProblem, match="outside"):
        bilevel.solve(noisy(), F3SA(lower_lr=0.6), X, Y, steps=1)
