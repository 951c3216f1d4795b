"""Metagradient descent: learned rates, weights of examples, counts from a pool; and unrolled hypergradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, Full, Metagradient, PoolGradient, Problem, Shuffled, Sign, StoreAll, metagradient, unrolled
from bilevel.dry_run import open_oracles
from bilevel.optimizers import Cosine, CountSteps, L1Normalized
from bilevel.status import InvalidProblem


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_learned_rates_minimize_a_quadratic_in_as_many_steps_as_it_has_curvatures() -> None:
    """With one rate a step, the product of (1 - rate_t h) can vanish at every curvature h."""
    h = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    problem = Problem(upper=lambda x, y, b: y.square().sum(), lower=lambda x, y, b: 0.5 * (h * y.square()).sum())
    solver = Metagradient(lower=SGD(lambda x, step: x[step]), lower_steps=3, upper=bilevel.Adam(0.03))
    solution = bilevel.solve(problem, solver, torch.full((3,), 0.4).double(), torch.ones(3).double(), steps=250)
    assert solution.best_value < 1e-3
    torch.testing.assert_close(solution.best_x.sort().values, 1 / h.flip(0), rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    "upper",
    [Sign(Cosine(0.1, steps=60)), L1Normalized(Cosine(0.1, steps=60)), bilevel.Adam(0.2, betas=(0.5, 0.9))],
    ids=["sign", "l1", "adam"],
)
def test_each_update_finds_the_scalar_solution(upper: Any) -> None:
    task = bilevel.problems.scalar()
    solution = bilevel.solve(task.problem, Metagradient(upper=upper, lower_steps=10), task.x0, task.y0, steps=60)
    assert float(solution.x) == pytest.approx(2.0, abs=0.03)


def test_every_training_starts_anew() -> None:
    """F is one function: its value at the same x is the same, whatever was visited before."""
    data = Shuffled((draw(12),), batch_size=3)
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square(), lower=lambda x, y, b: ((y - x - b[0]).square()).mean(), lower_data=data
    )
    solver = Metagradient(lower=SGD(0.1, 0.9), lower_steps=5, upper=SGD(0.0))
    one = torch.ones((), dtype=torch.float64)
    history = bilevel.solve(problem, solver, one, one, steps=4).history["upper_value"]
    assert len(set(history)) == 1
    warm = bilevel.solve(problem, unrolled(SGD(0.1, 0.9), 5, upper=SGD(0.0)), one, one, steps=4)
    assert len(set(warm.history["upper_value"])) == 4


def test_fresh_trainings_see_the_next_batches() -> None:
    """The second training's batches are T to 2 T - 1: its value is that of a problem whose data begin there."""
    rows = draw(40)
    data = Shuffled((rows,), batch_size=4)

    class Later(bilevel.DataSource):
        deterministic = False

        def batch(self, step: int, seed: int) -> Any:
            return data.batch(step + 5, seed)

    def problem(source: bilevel.DataSource) -> Problem:
        return Problem(
            upper=lambda x, y, b: (y - 1).square(), lower=lambda x, y, b: (y - x - b[0]).square().mean(),
            lower_data=source,
        )  # fmt: skip

    one = torch.ones((), dtype=torch.float64)
    options: dict[str, Any] = {"lower": SGD(0.3), "lower_steps": 5, "upper": SGD(0.0)}
    fresh = bilevel.solve(problem(data), Metagradient(fresh=True, **options), one, one, steps=2).history["upper_value"]
    later = bilevel.solve(problem(Later()), Metagradient(**options), one, one, steps=1).history["upper_value"]
    first = bilevel.solve(problem(data), Metagradient(**options), one, one, steps=1).history["upper_value"]
    assert fresh == [first[0], later[0]]
    assert first != later


def test_schedules_and_truncation_are_passed_on() -> None:
    task = bilevel.problems.quadratic()
    found = [
        bilevel.solve(task.problem, Metagradient(lower_steps=9, **options), task.x0, task.y0, steps=5).x
        for options in ({}, {"schedule": StoreAll()}, {"truncate": 2})
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def pool_problem() -> tuple[Problem, Any, Tensor]:
    """Least squares on a pool in which some targets are wrong; x counts how often an example is used."""
    inputs = draw(20, 2)
    truth = torch.tensor([1.0, -2.0], dtype=torch.float64)
    targets = inputs @ truth
    wrong = torch.arange(20) % 4 == 0
    targets = torch.where(wrong, -3 * targets, targets)
    clean = draw(30, 2, seed=1)
    index = torch.arange(20)

    def lower(x: Tensor, y: Tensor, b: Any) -> Tensor:
        return 0.5 * (x[b[2]] * (b[0] @ y - b[1]).square()).mean()

    problem = Problem(
        upper=lambda x, y, b: 0.5 * (b[0] @ y - b[1]).square().mean(),
        lower=lower,
        upper_data=Full((clean, clean @ truth)),
        lower_data=Shuffled((inputs, targets), batch_size=5, with_index=True),
    )
    return problem, (inputs, targets, index), wrong


@pytest.mark.parametrize(("last", "parts"), [(1, 1), (3, 1), (3, 4), (8, 1)])
def test_the_gradient_of_a_pool_is_that_of_the_pool_in_one_step(last: int, parts: int) -> None:
    """Against a training into whose one step the weighted pool is put, differentiated whole."""
    problem, pool, _ = pool_problem()
    c, y0, steps = torch.ones(20, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 8
    estimator = PoolGradient(lower=SGD(0.2, 0.5), steps=steps, restart=True, pool=pool, last=last, microbatches=parts)
    found = bilevel.hypergradient(problem, c, y0, estimator=estimator).gradient
    oracles, _, _ = open_oracles(problem, c, y0, trains=True)

    class WithPool(bilevel.DataSource):
        deterministic = False

        def batch(self, step: int, seed: int) -> Any:
            return (oracles.batch("lower", step), step == steps - last)

    def lower(z: Tensor, y: Tensor, b: Any) -> Tensor:
        used = problem.lower(c, y, b[0])
        return used + problem.lower(z, y, pool) if b[1] else used + 0 * z.sum()

    entered = Problem(upper=problem.upper, lower=lower, upper_data=problem.upper_data, lower_data=WithPool())
    expected = metagradient(entered, torch.zeros(20, dtype=torch.float64), y0, lower=SGD(0.2, 0.5), steps=steps)
    torch.testing.assert_close(found, expected.gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("upper", [CountSteps(0.3, largest=2.0), CountSteps(0.2, greedy=True, largest=2.0)], ids=str)
def test_counts_drop_the_wrong_examples(upper: Any) -> None:
    problem, pool, wrong = pool_problem()
    solver = Metagradient(upper=upper, lower=SGD(0.2), lower_steps=40, truncate=5, pool=pool)
    ones = torch.ones(20, dtype=torch.float64)
    solution = bilevel.solve(problem, solver, ones, torch.zeros(2, dtype=torch.float64), steps=30)
    counts = solution.best_x
    assert bool((counts == counts.round()).all())
    assert float(counts[wrong].sum()) <= 1.0  # of five
    assert float(counts[~wrong].mean()) > 0.5
    assert solution.best_value < 0.01 * solution.history["upper_value"][0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Metagradient(upper=bilevel.LBFGS()), "upper must be an Optimizer"),  # type: ignore[arg-type]
        (lambda: Metagradient(lower_steps=0), "steps"),
        (lambda: Metagradient(pool=(torch.ones(1),), truncate=99), r"in \[1, steps=50\]"),
        (PoolGradient, "needs a lower batch"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, text: str) -> None:
    with pytest.raises(InvalidProblem, match=text):
        make()
