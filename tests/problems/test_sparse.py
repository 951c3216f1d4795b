"""Sparse models on real data: closed forms, conditions of their answers, scikit-learn's, and what tuning them finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso, lars_path
from torch import Tensor

import bilevel
from bilevel import SparseDescent
from bilevel.dry_run import open_oracles
from bilevel.optimizers.coordinate_descent import CoordinateDescent
from bilevel.optimizers.proximal import ProximalGradient
from bilevel.oracles import Oracles
from bilevel.problems import Task, elastic_net, lasso, sparse_group
from bilevel.problems._datasets import Part, Split
from bilevel.problems.sparse import _regression
from bilevel.regularizers import L1
from bilevel.sets import Box

NEAR = SparseDescent(lower=ProximalGradient(tol=1e-14, max_steps=20_000))
MADE: dict[str, Callable[..., Task]] = {"lasso": lasso, "elastic_net": elastic_net, "sparse_group": sparse_group}


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def train(task: Task) -> tuple[Tensor, Tensor]:
    inputs, targets = task.problem.lower_data.batch(0, 0)
    return inputs, targets


def by_scikit_learn(task: Task) -> SparseDescent:
    return SparseDescent(lower=CoordinateDescent(*train(task), tol=1e-14))


def opened(task: Task) -> tuple[Oracles, Tensor, Tensor]:
    return open_oracles(task.problem, task.x0, task.y0)


def largest(task: Task) -> float:
    """Return the logarithm of the least strength at which all weights are 0."""
    inputs, targets = train(task)
    return float((inputs.T @ targets / len(targets)).abs().max().log())


# -- closed forms ------------------------------------------------------------------------------------------------------


def orthonormal() -> tuple[Task, Tensor]:
    """Return a lasso with `A^T A = n I`, whose solution is a soft threshold of z, and z."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(60, 6, generator=generator, dtype=torch.float64))
    part = Part(q * math.sqrt(60), torch.randn(60, generator=generator, dtype=torch.float64))
    split = Split(part, Part(part.inputs[:20], part.targets[:20]), Part(part.inputs[20:], part.targets[20:]))
    task = _regression("orthonormal", split, L1(lambda x: x.exp()), Box(-8.0, 0.0), number(-3.0))
    return task, part.inputs.T @ part.targets / 60


@pytest.mark.parametrize("log_strength", [-1.0, -2.0, -3.0, -4.0, -8.0])
def test_an_orthonormal_lasso_is_a_soft_threshold(log_strength: float) -> None:
    task, z = orthonormal()
    x, (oracles, _, start) = number(log_strength), opened(task)
    expected = z.sign() * (z.abs() - x.exp()).clamp_min(0)
    found = NEAR.solve_lower(oracles, x[None], start).y
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert torch.equal(found == 0, expected == 0)
    assert task.evaluate is not None
    assert task.evaluate(x, found)["features"] == float((expected != 0).sum())


@pytest.mark.parametrize("make", [lasso, elastic_net])
def test_weights_vanish_at_the_largest_strength_and_not_below(make: Callable[..., Task]) -> None:
    task = make()
    (oracles, x, y), a = opened(task), largest(task)
    assert float(x[0]) == pytest.approx(a - 1)
    assert float(oracles.project_x(torch.full_like(x, 100.0))[0]) == pytest.approx(a + math.log(0.9))
    assert float(oracles.project_x(torch.full_like(x, -100.0))[0]) == pytest.approx(a - 12)
    for shift, empty in ((1e-9, True), (-1e-3, False)):
        at = x.clone()
        at[0] = a + shift
        assert bool((NEAR.solve_lower(oracles, at, y).y == 0).all()) == empty


def test_all_groups_vanish_where_the_penalty_is_large() -> None:
    task = sparse_group()
    oracles, x, y = opened(task)
    found = oracles.y_layout.unflatten(NEAR.solve_lower(oracles, torch.zeros_like(x), y).y)
    assert not found["weight"].any()
    # The intercept alone is left, which predicts the share of benign tumors.
    torch.testing.assert_close(found["bias"].sigmoid(), train(task)[1].mean(), rtol=0, atol=1e-9)


# -- optimality conditions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lasso", "elastic_net"])
def test_answers_satisfy_the_conditions_of_the_elastic_net(name: str) -> None:
    task = MADE[name]()
    solution = bilevel.solve(task.problem, SparseDescent(), task.x0, task.y0, steps=8)
    x, y, (inputs, targets) = solution.x, solution.y, train(task)
    strength = (x["l1"] if name == "elastic_net" else x).exp()
    decay = x["l2"].exp() if name == "elastic_net" else 0.0
    slope = inputs.T @ (inputs @ y - targets) / len(targets) + decay * y
    on = y != 0
    assert 5 <= int(on.sum()) < 64
    torch.testing.assert_close(slope[on], -strength * y[on].sign(), rtol=0, atol=2e-8)
    assert bool((slope[~on].abs() <= strength + 2e-8).all())


def test_answers_satisfy_the_conditions_of_the_sparse_group_lasso() -> None:
    task = sparse_group()
    oracles, _, start = opened(task)
    x = torch.tensor([-4.5, -3.5], dtype=torch.float64)
    y = oracles.y_layout.unflatten(SparseDescent().solve_lower(oracles, x, start).y)
    inputs, targets = train(task)
    (l1, group), w = x.exp(), y["weight"]
    wrong = (inputs @ w + y["bias"]).sigmoid() - targets
    slope = inputs.T @ wrong / len(targets)
    assert float(wrong.mean().abs()) < 1e-8
    kinds = set()
    for j in range(10):
        part, force = w[j::10], slope[j::10]
        if not part.any():
            assert float((force.abs() - l1).clamp_min(0).norm()) <= float(group) + 1e-8
            kinds.add("empty")
            continue
        on = part != 0
        torch.testing.assert_close(force[on], -(l1 * part.sign() + group * part / part.norm())[on], rtol=0, atol=2e-8)
        assert bool((force[~on].abs() <= l1 + 1e-8).all())
        kinds.add("full" if bool(on.all()) else "sparse")
    assert {"empty", "sparse"} <= kinds


# -- scikit-learn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["proximal", "coordinate_descent"])
@pytest.mark.parametrize("l1_ratio", [1.0, 0.7])
def test_paths_are_those_of_scikit_learn(l1_ratio: float, solver: str) -> None:
    """Lasso and ElasticNet minimize `‖A w - t‖² / 2n + a r ‖w‖_1 + a (1 - r) ‖w‖² / 2`."""
    task = elastic_net() if l1_ratio < 1 else lasso()
    (oracles, _, y), a, (inputs, targets) = opened(task), largest(task), train(task)
    descent = by_scikit_learn(task) if solver == "coordinate_descent" else NEAR
    sizes = set()
    for shift in (-0.2, -0.7, -1.2, -2.0, -3.0):
        strength = math.exp(a + shift) / l1_ratio
        x = torch.tensor([a + shift, math.log(strength * (1 - l1_ratio))] if l1_ratio < 1 else [a + shift]).double()
        y = descent.solve_lower(oracles, x, y).y
        kind = Lasso(alpha=strength) if l1_ratio == 1 else ElasticNet(alpha=strength, l1_ratio=l1_ratio)
        kind.set_params(fit_intercept=False, tol=1e-14, max_iter=10**6).fit(inputs.numpy(), targets.numpy())
        assert float((y - torch.tensor(kind.coef_)).abs().max()) < 1e-7
        assert torch.equal(y == 0, torch.tensor(kind.coef_) == 0)
        sizes.add(int((y != 0).sum()))
    assert len(sizes) == 5


# -- hypergradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_hypergradients_match_differences(name: str) -> None:
    task = MADE[name]()
    oracles, x, y = opened(task)
    y = NEAR.solve_lower(oracles, x, y).y
    exact = bilevel.ActiveSet(bilevel.Implicit(linear=bilevel.Dense()))
    found, _ = exact.estimate(oracles, x, y, exact.init(oracles, x, y))
    for step in (1e-4, 1e-5):
        rows = []
        for unit in torch.eye(len(x), dtype=torch.float64):
            ends = [x + sign * step * unit for sign in (1, -1)]
            values = [oracles.upper_value(end, NEAR.solve_lower(oracles, end, y).y) for end in ends]
            rows.append((values[0] - values[1]) / (2 * step))
        reference = torch.stack(rows)
        assert float((found.gradient - reference).norm() / reference.norm()) < 1e-6


# -- what tuning finds -------------------------------------------------------------------------------------------------


def test_tuning_a_lasso_finds_the_best_point_of_the_whole_path() -> None:
    """The path is linear between its corners, so least angle regression gives it at any strength."""
    task = lasso()
    solution = bilevel.solve(task.problem, by_scikit_learn(task), task.x0, task.y0, steps=task.steps)
    (inputs, targets), (fresh, wanted) = train(task), task.problem.upper_data.batch(0, 0)
    corners, _, path = lars_path(inputs.numpy(), targets.numpy(), method="lasso")
    for points in (100, 20_000):
        grid = np.exp(np.linspace(largest(task) - 12, largest(task) + math.log(0.9), points))
        weights = torch.tensor(np.array([np.interp(grid, corners[::-1], row[::-1]) for row in path]))
        errors = (fresh @ weights - wanted[:, None]).square().mean(0) / 2
        assert solution.best_value <= float(errors.min()) * (1 + 1e-5 * (points > 100))
    assert task.evaluate is not None
    assert task.evaluate(solution.best_x, solution.best_y)["test_r2"] > 0.53


def least_on_a_grid(task: Task, descent: SparseDescent, low: list[float], high: list[float]) -> float:
    """Return the least F on 10 x 10 points, from strong to weak penalties."""
    oracles, _, start = opened(task)
    values = []
    for i in range(10):
        y = start
        for j in range(10):
            share = torch.tensor([1 - i / 9, 1 - j / 9], dtype=torch.float64)
            x = torch.tensor(low).double() * (1 - share) + torch.tensor(high).double() * share
            y = descent.solve_lower(oracles, x, y).y
            values.append(float(oracles.upper_value(x, y)))
    return min(values)


@pytest.mark.slow
def test_tuning_an_elastic_net_beats_a_grid() -> None:
    task = elastic_net()
    a, descent = largest(task), SparseDescent(lower=CoordinateDescent(*train(task), tol=1e-9))
    solution = bilevel.solve(task.problem, descent, task.x0, task.y0, steps=task.steps)
    assert solution.best_value <= least_on_a_grid(task, descent, [a - 12, -12.0], [a + math.log(0.9), 2.0])


@pytest.mark.slow
def test_tuning_a_sparse_group_lasso_beats_a_grid() -> None:
    task = sparse_group()
    solution = bilevel.solve(task.problem, SparseDescent(), task.x0, task.y0, steps=50)
    descent = SparseDescent(lower=ProximalGradient(tol=1e-5))
    assert solution.best_value <= least_on_a_grid(task, descent, [-12.0, -12.0], [0.0, 0.0])
    assert task.evaluate is not None
    found = task.evaluate(solution.best_x, solution.best_y)
    assert found["test_accuracy"] > 0.97
    assert found["groups"] < 10


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lasso, elastic_net])
def test_interactions_make_64_features(make: Callable[..., Task]) -> None:
    plain, whole = make(interactions=False), make(interactions=True)
    (few, _), (many, _) = train(plain), train(whole)
    assert (few.shape[1], many.shape[1]) == (10, 64)
    assert plain.y0.shape == (10,)
    torch.testing.assert_close(many[:, :10], few)
    torch.testing.assert_close(many.std(0), torch.ones(64, dtype=torch.float64))
    assert int(torch.linalg.matrix_rank(many)) == 64


@pytest.mark.parametrize("make", MADE.values())
def test_float32(make: Callable[..., Any]) -> None:
    task = make(dtype=torch.float32)
    solution = bilevel.solve(task.problem, SparseDescent(), task.x0, task.y0, steps=2)
    assert solution.status.ok
    oracles, x, _ = opened(task)
    assert x.dtype == oracles.y_layout.flatten(solution.y).dtype == torch.float32
