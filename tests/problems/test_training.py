"""Problems whose gradients go through training: against finite differences, formulas, and what their judges promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bilevel
from bilevel import InvalidProblem, Metagradient, metagradient, problems
from bilevel.dry_run import open_oracles
from bilevel.layout import named_leaves
from bilevel.problems import Parts, Task
from bilevel.problems._datasets import Part, digits

SIZES: dict[str, Any] = {"hidden": 3, "train_steps": 6, "batch_size": 8}


def tiny(seed: int = 0, train: int = 24) -> Parts:
    """Return three classes of points in five dimensions, float64."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(3, 5, generator=generator, dtype=torch.float64)

    def part(n: int) -> Part:
        labels = torch.randint(3, (n,), generator=generator)
        noise = 0.1 * torch.randn(n, 5, generator=generator, dtype=torch.float64)
        return Part((centers[labels] + noise).clamp(0, 1), labels)

    return Parts(part(train), part(12), part(12), part(12))


def schedule(**options: Any) -> Task:
    return problems.learning_rates(parts=tiny(), **(SIZES | {"knots": 4, "fresh": False} | options))


def selection(**options: Any) -> Task:
    pool = problems.noisy_pool(parts=tiny())
    return problems.data_selection(pool=pool, **(SIZES | {"lr": 0.3} | options))


def audit(**options: Any) -> Task:
    return problems.robustness_audit(parts=tiny(), **(SIZES | {"share": 0.25} | options))


def solver_of(task: Task) -> Metagradient:
    assert isinstance(task.solver, Metagradient)
    return task.solver


def gradient(task: Task, x: Any, **options: Any) -> Any:
    solver = solver_of(task)
    return metagradient(
        task.problem, x, task.y0, **({"lower": solver.lower, "steps": solver.lower_steps} | options)
    ).gradient


def value(task: Task, x: Tensor) -> float:
    y = problems.retrained(task, x)
    assert task.problem.upper_data is not None
    return float(task.problem.upper(x, y, task.problem.upper_data.batch(0, 0)))


def inside(task: Task, seed: int = 3) -> Tensor:
    """Return a point away from the start and from the bounds."""
    assert isinstance(task.x0, Tensor)
    generator = torch.Generator().manual_seed(seed)
    spread = 0.2 * torch.rand(task.x0.shape, generator=generator, dtype=torch.float64)
    return task.x0 + torch.where(task.x0 > 0.5, -spread, spread)


@pytest.mark.parametrize("make", [schedule, selection, audit])
@pytest.mark.parametrize("h", [1e-4, 1e-5])
def test_gradients_are_those_of_differences(make: Callable[[], Task], h: float) -> None:
    task = make()
    x = inside(task)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    difference = (value(task, x + h * direction) - value(task, x - h * direction)) / (2 * h)
    assert float((gradient(task, x) * direction).sum()) == pytest.approx(difference, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("make", [schedule, selection, audit])
def test_the_solver_lowers_what_it_should(make: Callable[[], Task]) -> None:
    task = make()
    solver = replace(solver_of(task), fresh=False)
    before = {name: leaf.clone() for name, leaf in named_leaves({"x": task.x0, "y": task.y0})}
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=8)
    assert solution.best_value < solution.history["upper_value"][0]
    assert all(torch.equal(before[name], leaf) for name, leaf in named_leaves({"x": task.x0, "y": task.y0}))


# -- learning rates -----------------------------------------------------------------------------------------------


def test_one_rate_for_all_steps_has_the_sum_of_their_gradients() -> None:
    each, one = schedule(knots=6), schedule(knots=1)
    x = each.x0 - 0.3
    torch.testing.assert_close(gradient(each, x).sum(), gradient(one, x[:1]).sum(), rtol=1e-11, atol=0)


def test_the_gradient_in_the_rate_of_one_step_is_a_formula() -> None:
    """After one step from y with gradient g: d f(y - e^x g) / dx = -e^x <df, g>."""
    task = schedule(train_steps=1, knots=1)
    y = {name: leaf.clone().requires_grad_() for name, leaf in task.y0.items()}
    problem = task.problem
    oracles = open_oracles(problem, task.x0, task.y0, trains=True)[0]
    slope = torch.autograd.grad(problem.lower(task.x0, y, oracles.batch("lower", 0)), list(y.values()))
    rate = task.x0.exp()
    moved = {
        name: (leaf - rate * g).detach().requires_grad_() for (name, leaf), g in zip(y.items(), slope, strict=True)
    }
    upper = torch.autograd.grad(problem.upper(task.x0, moved, oracles.batch("upper", 0)), list(moved.values()))
    expected = -rate * sum((a * b).sum() for a, b in zip(upper, slope, strict=True))
    torch.testing.assert_close(gradient(task, task.x0), expected, rtol=1e-11, atol=1e-15)


def test_rates_stay_within_their_bounds() -> None:
    task = schedule()
    bounds = task.problem.upper_set
    assert bounds is not None
    far = torch.tensor([-100.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(bounds.project(far).exp(), torch.tensor([1e-3, 2.0], dtype=torch.float64))


# -- selection ----------------------------------------------------------------------------------------------------


def test_weights_count_only_relative_to_one_another() -> None:
    task = selection()
    x = inside(task)
    assert float(gradient(task, x) @ x) == pytest.approx(0.0, abs=1e-12)
    assert value(task, x) == pytest.approx(value(task, 3 * x), rel=1e-12)


def test_the_gradient_in_the_weights_of_one_step_is_a_formula() -> None:
    """After one step on all n examples at weights 1: d f / dx_i = -(lr / n) <df, g_i - mean g>."""
    task = selection(train_steps=1, batch_size=24)
    model_loss, y = task.problem.lower, {name: leaf.clone() for name, leaf in task.y0.items()}
    pool = problems.noisy_pool(parts=tiny())
    rows = []
    for i in range(24):
        alone = F.one_hot(torch.tensor(i), 24).double()  # the loss of example i is the lower objective of that weight
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in y.items()}
        one = model_loss(alone, leaves, pool.everything)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(one, list(leaves.values()))]))
    slopes = torch.stack(rows)
    flat = torch.cat([leaf.flatten() for leaf in y.values()]) - 0.3 * slopes.mean(0)
    sizes = [leaf.numel() for leaf in y.values()]
    moved = {
        name: piece.view_as(leaf).requires_grad_()
        for (name, leaf), piece in zip(y.items(), flat.split(sizes), strict=True)
    }
    upper = task.problem.upper(task.x0, moved, tuple(pool.target))
    df = torch.cat([g.flatten() for g in torch.autograd.grad(upper, list(moved.values()))])
    expected = -(0.3 / 24) * (slopes - slopes.mean(0)) @ df
    torch.testing.assert_close(gradient(task, task.x0), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("truncate", [1, 4])
def test_the_gradient_through_the_pool_sees_examples_that_no_batch_showed(truncate: int) -> None:
    task = selection(train_steps=4, batch_size=3)
    pool = problems.noisy_pool(parts=tiny())
    estimator = bilevel.PoolGradient(
        lower=solver_of(task).lower, steps=4, restart=True, pool=pool.everything, last=truncate
    )
    found = bilevel.hypergradient(task.problem, task.x0, task.y0, estimator=estimator).gradient
    # An example that was not shown acts through the mean weight alone, so that all of them have one gradient.
    shown = gradient(task, task.x0)
    assert int((shown - shown.median()).abs().gt(1e-12).sum()) <= 12
    assert int((found - found.median()).abs().gt(1e-12).sum()) >= 20
    # To weigh all examples more is to change nothing.
    assert float(found.sum()) == pytest.approx(0.0, abs=1e-12)


def test_the_pool_is_spoiled_as_said() -> None:
    parts = problems.small_parts(train=1000, validation=100, check=100)
    pool = problems.noisy_pool(parts=parts, noise=0.5, outside=0.2)
    same = (pool.images == parts.train.inputs).all(1)
    negative = (pool.images == 1 - parts.train.inputs).all(1)
    assert float(same.double().mean()) == pytest.approx(0.8, abs=0.04)
    assert float(negative.double().mean()) == pytest.approx(0.1, abs=0.03)
    assert torch.equal(pool.good, same & (pool.labels == parts.train.targets))
    assert float(pool.good.double().mean()) == pytest.approx(0.8 * (0.5 + 0.05), abs=0.05)
    assert torch.equal(pool.target.inputs, parts.validation.inputs)
    wrong = problems.noisy_pool(parts=parts, noise=0.5, outside=0.0, systematic=True)
    assert bool((wrong.labels == (parts.train.targets + (~wrong.good)) % 10).all())
    assert float(wrong.good.double().mean()) == pytest.approx(0.5, abs=0.05)
    clean = problems.noisy_pool(parts=parts, noise=0.0, outside=0.0)
    assert bool(clean.good.all())
    assert torch.equal(clean.labels, parts.train.targets)


def test_a_selection_is_judged_by_what_it_uses() -> None:
    task, pool = selection(), problems.noisy_pool(parts=tiny())
    assert task.evaluate is not None
    none = task.evaluate(pool.good.double(), task.y0)
    assert (none["good"], none["used"]) == (1.0, pytest.approx(float(pool.good.double().mean())))
    twice = 1 + pool.good.double()
    good = float(pool.good.double().mean())
    assert task.evaluate(twice, task.y0)["good"] == pytest.approx(2 * good / (1 + good))


# -- audit --------------------------------------------------------------------------------------------------------


def test_only_a_few_images_move_and_no_farther_than_allowed() -> None:
    task = audit(radius=0.05)
    solver = replace(solver_of(task), upper=bilevel.Sign(0.2))
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=3)
    assert task.x0.shape == (6, 5)
    for x in (solution.x, problems.random_change(task)):
        assert float((x - task.x0).abs().max()) <= 0.05 + 1e-12
        assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert task.evaluate is not None
    assert task.evaluate(solution.x, task.y0)["change"] == pytest.approx(0.05)
    assert task.evaluate(task.x0, task.y0)["change"] == 0.0
    assert not torch.equal(problems.random_change(task, 0), problems.random_change(task, 1))


def test_images_that_no_batch_shows_have_no_gradient() -> None:
    task = audit(train_steps=1, batch_size=8, share=1.0)
    moved = gradient(task, task.x0).abs().sum(1) > 0
    assert int(moved.sum()) == 8


def test_the_changed_images_take_the_place_of_the_originals() -> None:
    task = audit(share=1.0)
    assert task.problem.lower_data is not None
    images, labels, index = task.problem.lower_data.batch(0, 0)
    losses = [
        task.problem.lower(x, task.y0, (seen, labels, index))
        for x, seen in ((task.x0, images), (task.x0, torch.zeros_like(images)))
    ]
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    whole = problems.learning_rates(parts=tiny(), **SIZES).problem.lower(None, task.y0, (images, labels))
    torch.testing.assert_close(losses[0], whole)


# -- decays -------------------------------------------------------------------------------------------------------


def decays(**options: Any) -> Task:
    return problems.weight_decays(parts=tiny(), **({"hidden": 2, "grid": (-4.0, -2.0)} | options))


def test_implicit_and_unrolled_gradients_of_decays_agree() -> None:
    """The start is a minimum, so that both are the derivative of the same function; and both are a formula."""
    task = decays(grid=(-2.0,))  # curvatures from 0.08 to 0.9, so that 300 steps of 1.5 arrive
    implicit = bilevel.hypergradient(task.problem, task.x0, task.y0, estimator=bilevel.Implicit(linear=bilevel.Dense()))
    unrolled = metagradient(task.problem, task.x0, task.y0, lower=bilevel.SGD(1.5), steps=300)
    for name, leaf in implicit.gradient.items():
        torch.testing.assert_close(unrolled.gradient[name], leaf, rtol=1e-5, atol=1e-8)


def test_the_gradient_of_decays_is_the_formula() -> None:
    """d F / d x_i = -exp(x_i) y_i w_i, with H w = df/dy."""
    task = decays()
    names, shapes = list(task.y0), [leaf.shape for leaf in task.y0.values()]
    sizes = [shape.numel() for shape in shapes]

    def nested(flat: Tensor) -> dict[str, Tensor]:
        return {n: p.view(s) for n, p, s in zip(names, flat.split(sizes), shapes, strict=True)}

    def g(flat: Tensor) -> Tensor:
        return task.problem.lower(None, nested(flat), train) + 0.5 * (x.exp() * flat.square()).sum()

    train, held = (data.batch(0, 0) for data in (task.problem.lower_data, task.problem.upper_data))  # type: ignore[union-attr]
    x = torch.cat([leaf.flatten() for leaf in task.x0.values()])
    y = torch.cat([leaf.flatten() for leaf in task.y0.values()])
    df = torch.autograd.functional.jacobian(lambda flat: task.problem.upper(None, nested(flat), held), y)
    w = torch.linalg.solve(torch.autograd.functional.hessian(g, y), df)
    found = bilevel.hypergradient(task.problem, task.x0, task.y0, estimator=bilevel.Implicit(linear=bilevel.Dense()))
    flat = torch.cat([leaf.flatten() for leaf in found.gradient.values()])
    torch.testing.assert_close(flat, -x.exp() * y * w, rtol=1e-8, atol=1e-12)


def test_decays_start_from_the_best_single_one() -> None:
    both, high, low = decays(), decays(grid=(-2.0,)), decays(grid=(-4.0,))
    losses = [task.evaluate(task.x0, task.y0)["validation_loss"] for task in (both, high, low)]  # type: ignore[misc]
    assert losses[0] == min(losses[1:])
    assert len({float(leaf.flatten()[0]) for leaf in both.x0.values()}) == 1
    found = bilevel.hypergradient(both.problem, both.x0, both.y0).certificate
    assert float(found.lower_gradient_norm) < 1e-5


def test_decays_are_judged_on_all_parts() -> None:
    task, parts = decays(), tiny()
    assert task.evaluate is not None
    said = task.evaluate(task.x0, task.y0)
    assert set(said) == {"train_loss", "validation_loss", "check_loss", "test_accuracy", "test_loss", "gap"}
    assert said["gap"] == said["test_loss"] - said["validation_loss"]
    assert said["check_loss"] == pytest.approx(float(task.problem.upper(None, task.y0, tuple(parts.check))))


# -- what they share ----------------------------------------------------------------------------------------------


def test_training_again_is_the_solver_s_training_or_another() -> None:
    task = selection()
    keep = bilevel.KeepBest(task.x0, lambda x, y: 0.0)
    bilevel.solve(task.problem, solver_of(task), task.x0, task.y0, steps=2, callbacks=[keep])
    same, other = problems.retrained(task, task.x0), problems.retrained(task, task.x0, seed=1)
    assert keep.step == 0
    assert torch.equal(keep.x, task.x0)
    for name, leaf in keep.y.items():
        torch.testing.assert_close(same[name], leaf, rtol=0, atol=0)
        assert not torch.equal(other[name], leaf)
    assert all(torch.equal(other[n], leaf) for n, leaf in problems.retrained(task, task.x0, seed=1).items())
    with pytest.raises(InvalidProblem, match="has no Metagradient"):
        problems.retrained(problems.scalar(), torch.ones(()))


def test_parts_are_disjoint_and_the_test_part_is_fixed() -> None:
    one, other = (problems.small_parts(seed, 600, 300, 200) for seed in (0, 1))
    assert [len(part.targets) for part in one] == [600, 300, 200, 500]
    assert torch.equal(one.test.inputs, other.test.inputs)
    assert not torch.equal(one.train.inputs, other.train.inputs)
    rows = torch.cat([part.inputs for part in problems.small_parts(0, 600, 397, 300)])
    torch.testing.assert_close(rows.sum(1).sort().values, digits().inputs.sum(1).sort().values)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: problems.small_parts(train=1298), "at most 1297"),
        (lambda: problems.mnist_parts(train=-1), "must be >= 0"),
        (lambda: problems.noisy_pool(noise=1.5), "probabilities"),
        (lambda: problems.robustness_audit(share=0.0), r"share must be in \(0, 1\]"),
        (lambda: problems.robustness_audit(radius=-0.1), "radius"),
        (lambda: problems.weight_decays(grid=()), "at least one"),
        (lambda: schedule(train_steps=0), "steps"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(InvalidProblem, match=text):
        make()
