"""The dual SVM: scikit-learn's solutions, optimality conditions, hypergradients, and the C that it finds."""

from __future__ import annotations

import pytest
import torch
from sklearn.svm import LinearSVC
from torch import Tensor

import bilevel
from bilevel import SparseDescent
from bilevel.dry_run import open_oracles
from bilevel.optimizers.proximal import ProximalGradient
from bilevel.problems import Task, svm
from bilevel.problems._datasets import tumors
from bilevel.problems.svm import _signed

NEAR = SparseDescent(lower=ProximalGradient(tol=1e-15, max_steps=50_000, patience=5000))
EXACT = bilevel.ActiveSet(bilevel.Implicit(linear=bilevel.CG(tol=1e-12, max_steps=300)))
TRAIN, FRESH, _ = (_signed(part) for part in tumors(0, torch.float64, "cpu"))
ROWS = TRAIN.inputs * TRAIN.targets[:, None]
N = len(ROWS)


def solved(task: Task, x: Tensor) -> Tensor:
    oracles, flat, y = open_oracles(task.problem, x, task.y0)
    return NEAR.solve_lower(oracles, flat, y).y


def weights(x: Tensor, y: Tensor) -> Tensor:
    return (x.exp() / N * y) @ ROWS


def strengths(per_sample: bool) -> Tensor:
    """Return x: one number, or one for each sample."""
    spread = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return -1 + 0.5 * spread if per_sample else torch.tensor(-1.0, dtype=torch.float64)


@pytest.mark.parametrize("per_sample", [False, True])
def test_scores_are_those_of_scikit_learn(per_sample: bool) -> None:
    """LinearSVC too gives the intercept a feature of its own and a penalty."""
    task, x = svm(per_sample=per_sample), strengths(per_sample)
    model = LinearSVC(loss="hinge", C=1.0, tol=1e-9, max_iter=10**6, random_state=0, intercept_scaling=1.0)
    share = (x.exp() / N).expand(N)
    model.fit(TRAIN.inputs[:, :-1].numpy(), TRAIN.targets.numpy(), sample_weight=share.numpy())
    scores = torch.tensor(model.decision_function(FRESH.inputs[:, :-1].numpy()))
    torch.testing.assert_close(FRESH.inputs @ weights(x, solved(task, x)), scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_sample", [False, True])
def test_shares_say_where_samples_lie(per_sample: bool) -> None:
    task, x = svm(per_sample=per_sample), strengths(per_sample)
    y = solved(task, x)
    margins = ROWS @ weights(x, y)
    beyond, inside, on = y == 0, y == 1, (y > 0) & (y < 1)
    assert all(part.any() for part in (beyond, inside, on))
    assert bool((margins[beyond] >= 1 - 1e-9).all())
    assert bool((margins[inside] <= 1 + 1e-9).all())
    torch.testing.assert_close(margins[on], torch.ones_like(margins[on]), rtol=0, atol=1e-8)
    assert task.evaluate is not None
    found = task.evaluate(x, y)
    assert found["support_vectors"] == float((inside | on).sum())
    assert found["on_the_margin"] == float(on.sum())


def test_the_dual_has_no_gap() -> None:
    """`min_w ‖w‖² / 2 + sum_i C_i max(1 - s_i <w, a_i>, 0)` is minus the least lower value."""
    task, x = svm(per_sample=True), strengths(True)
    y = solved(task, x)
    w = weights(x, y)
    primal = w.square().sum() / 2 + (x.exp() / N * (1 - ROWS @ w).clamp_min(0)).sum()
    dual = task.problem.lower(x, y, None)
    torch.testing.assert_close(primal, -dual, rtol=1e-9, atol=0)


def test_one_c_is_the_sum_of_all() -> None:
    one, each = svm(), svm(per_sample=True)
    x = strengths(False)
    y = solved(one, x)
    torch.testing.assert_close(solved(each, x.expand(N).clone()), y, rtol=0, atol=1e-7)
    whole = bilevel.hypergradient(one.problem, x, y, estimator=EXACT, certify=False).gradient
    parts = bilevel.hypergradient(each.problem, x.expand(N).clone(), y, estimator=EXACT, certify=False).gradient
    torch.testing.assert_close(parts.sum(), whole, rtol=1e-7, atol=0)
    assert not parts[y == 0].any()
    assert parts[y == 1].all()


@pytest.mark.parametrize("per_sample", [False, True])
def test_hypergradients_match_differences(per_sample: bool) -> None:
    """With one C for each sample, along a random direction."""
    task, x = svm(per_sample=per_sample), strengths(per_sample)
    y = solved(task, x)
    oracles, flat, start = open_oracles(task.problem, x, y)
    found = EXACT.estimate(oracles, flat, start, EXACT.init(oracles, flat, start))[0]
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(flat.shape, generator=generator, dtype=torch.float64)
    for step in (1e-4, 1e-5):
        ends = [flat + sign * step * direction for sign in (1, -1)]
        values = [oracles.upper_value(end, NEAR.solve_lower(oracles, end, start).y) for end in ends]
        expected = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(found.gradient @ direction, expected, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_tuning_finds_the_best_of_a_grid() -> None:
    task = svm()
    descent = SparseDescent(lower=ProximalGradient(tol=1e-6))
    solution = bilevel.solve(task.problem, descent, task.x0, task.y0, steps=task.steps)
    oracles, _, y = open_oracles(task.problem, task.x0, task.y0)
    values = []
    for log_c in torch.linspace(-6, 6, 100, dtype=torch.float64):
        y = descent.solve_lower(oracles, log_c[None], y).y
        values.append(float(oracles.upper_value(log_c[None], y)))
    assert solution.best_value <= min(values) * (1 + 1e-3)
    assert task.evaluate is not None
    assert task.evaluate(solution.best_x, solution.best_y)["test_accuracy"] > 0.97


@pytest.mark.slow
def test_one_c_for_each_sample_fits_the_validation_data_better() -> None:
    one, each = svm(), svm(per_sample=True)
    descent = SparseDescent(lower=ProximalGradient(tol=1e-5))
    best = [bilevel.solve(task.problem, descent, task.x0, task.y0, steps=40).best_value for task in (one, each)]
    assert best[1] < 0.9 * best[0]
    assert each.x0.shape == (N,)
