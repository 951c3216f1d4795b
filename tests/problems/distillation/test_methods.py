"""RaT-BPTT, MTT, FRePo, the implicit baseline and CDA: each against an independent derivative or a known value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import bilevel
from bilevel.dry_run import open_oracles
from bilevel.hypergradients.implicit import Implicit
from bilevel.optimizers import LBFGS
from bilevel.problems import Part
from bilevel.problems import distillation as dd
from bilevel.problems.distillation._unroll import window_gradient
from bilevel.problems.distillation.cda import SMALLEST, cropped, smallest_crop
from bilevel.problems.distillation.mtt import learned_rate
from bilevel.problems.distillation.ridge_head import ridge_head
from bilevel.problems.distillation.synthetic import hard_targets
from bilevel.status import InvalidProblem, NonFinite
from bilevel.training import Training

SGD = bilevel.SGD(0.2, momentum=0.5)


def solved(task: dd.Distillation, solver: Any, steps: int = 3, **options: Any) -> bilevel.Solution:
    return bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps, **options)


def check_replayed(task: dd.Distillation, solver: Any) -> bilevel.Solution:
    """2 + 2 steps are 4, bit for bit."""
    whole = solved(task, solver, 4)
    again = solved(task, solver, 2, resume=solved(task, solver, 2))
    assert torch.equal(whole.state.x, again.state.x)
    return whole


# -- RaT-BPTT ----------------------------------------------------------------------------------------------------------


def test_the_whole_window_gives_the_gradient_of_training(data: Part, network: dd.Network) -> None:
    task = dd.distillation(data, network, learn_targets=True, batch_size=None)
    oracles, x, _ = open_oracles(task.problem, task.x0, task.y0)
    start = network.start(7, torch.float64)
    exact = bilevel.metagradient(task.problem, task.x0, start, lower=SGD, steps=6)
    flat = oracles.y_layout.flatten(start)
    found = window_gradient(oracles, Training(oracles, SGD, x), flat, 6, 6, 0)
    assert torch.allclose(found.gradient, oracles.x_layout.flatten(exact.gradient), rtol=1e-12)
    assert found.certificate.status is bilevel.Status.CONVERGED
    part = bilevel.metagradient(task.problem, task.x0, start, lower=SGD, steps=6, truncate=2)
    windowed = window_gradient(oracles, Training(oracles, SGD, x), flat, 6, 2, 0)
    assert torch.allclose(windowed.gradient, oracles.x_layout.flatten(part.gradient), rtol=1e-12)
    assert windowed.certificate.status is bilevel.Status.APPROXIMATE
    assert not torch.allclose(windowed.gradient, found.gradient, rtol=1e-3)


def test_a_step_follows_the_gradient_of_a_fresh_training(
    data: Part, network: dd.Network, difference: Callable[..., list[float]]
) -> None:
    # With W = U the step of plain gradient descent is that of autograd through a hand-written training.
    task = dd.distillation(data, network, batch_size=None)
    solver = dd.RaTBPTT(network, unroll=3, window=3, lower=bilevel.SGD(0.3), upper=bilevel.SGD(1.0), clip=None)
    solution = solved(task, solver, 1)
    images = task.x0["images"].clone().requires_grad_()
    first = solved(task, replace(solver, lower=bilevel.SGD(0.0)), 1).y  # an idle training ends where it starts
    y = {name: value.requires_grad_() for name, value in first.items()}
    assert not torch.equal(y["head.weight"], task.y0["head.weight"])
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(network.logits(y, images), task.labels)
        gradients = torch.autograd.grad(loss, list(y.values()), create_graph=True)
        y = {name: value - 0.3 * g for (name, value), g in zip(y.items(), gradients, strict=True)}
    upper = torch.nn.functional.cross_entropy(network.logits(y, data.inputs), data.targets)
    (gradient,) = torch.autograd.grad(upper, images)
    assert torch.allclose(solution.x["images"], task.x0["images"] - gradient, rtol=1e-10)


def test_trainings_take_random_times(data: Part, network: dd.Network) -> None:
    solver = dd.RaTBPTT(network, unroll=9, window=4)
    times = [solver.time(step) for step in range(200)]
    assert set(times) == set(range(4, 10))
    assert times == [solver.time(step) for step in range(200)]
    assert times != [replace(solver, seed=1).time(step) for step in range(200)]
    task = dd.distillation(data, network, synthetic_batch=2, batch_size=5)
    check_replayed(task, replace(solver, lower=SGD))


def test_long_gradients_are_clipped(data: Part, network: dd.Network) -> None:
    task = dd.distillation(data, network, batch_size=3)
    base = dd.RaTBPTT(network, unroll=3, window=2, lower=SGD, upper=bilevel.SGD(1.0), clip=None)
    moves = []

    def watch(event: bilevel.callbacks.Event) -> None:
        moves.append(event.state.x)

    for clip in (None, 0.5):
        moves.clear()
        solved(task, replace(base, clip=clip, memory=0.5), 4, callbacks=[watch])
        lengths = [float((b - a).norm()) for a, b in pairwise(moves)]
        if clip is not None:
            # Each is at most half the running mean of those before.
            norm = float((moves[0] - open_oracles(task.problem, task.x0, task.y0)[1]).norm())
            for length in lengths:
                assert length <= 0.5 * norm * (1 + 1e-9)
                norm = 0.5 * norm + 0.5 * length


def test_bad_unrolled_options_are_refused(data: Part, network: dd.Network) -> None:
    for change in (
        {"unroll": 2, "window": 3}, {"window": 0}, {"clip": 0.0}, {"memory": 1.0}, {"lower": bilevel.SGD(None)},
        {"upper": LBFGS()},
    ):  # fmt: skip
        with pytest.raises(InvalidProblem):
            dd.RaTBPTT(network, **change)
    task = dd.distillation(data, network)
    with pytest.raises(InvalidProblem, match="fresh networks"):
        bilevel.solve(replace(task.problem, lower_init=lambda x: task.y0), dd.RaTBPTT(network), task.x0, task.y0)


# -- MTT ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def experts(data: Part, network: dd.Network) -> torch.Tensor:
    return dd.train_experts(data, network, experts=2, epochs=3, lr=0.2, batch_size=8)


def test_matching_is_one_at_rest_and_zero_on_target(data: Part, network: dd.Network, experts: torch.Tensor) -> None:
    task = dd.distillation(data, network)
    idle = dd.MTT(dd.Trajectories(experts), steps=4, lower=bilevel.SGD(0.0))
    assert solved(task, idle, 1).history["upper_value"][0] == 1.0
    # Let the target be where four steps on the synthetic data lead.
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0)
    training, state = Training(oracles, SGD, x), None
    for step in range(4):
        state = training.advance(step, training.start(y) if state is None else state)
    assert state is not None
    hit = dd.MTT(dd.Trajectories(torch.stack([y, state.y])[None], 1), steps=4, lower=SGD)
    assert solved(task, hit, 1).history["upper_value"][0] == 0.0


def test_matching_has_the_derivative_of_its_loss(
    data: Part, network: dd.Network, experts: torch.Tensor, difference: Callable[..., list[float]]
) -> None:
    task = dd.distillation(data, network, lr=0.1)
    solver = dd.MTT(dd.Trajectories(experts, 1, max_start=0), steps=3)
    oracles, x, _ = open_oracles(task.problem, task.x0, task.y0, trains=True)
    matching = solver.matching(oracles)
    start, target = matching.batch("upper", 0)

    def value(at: torch.Tensor) -> torch.Tensor:
        training = Training(matching, solver.lower, at)
        state = training.start(start)
        for step in range(3):
            state = training.advance(step, state)
        return (state.y - target).square().sum() / (start - target).square().sum()

    found = window_gradient(matching, Training(matching, solver.lower, x), start, 3, None, 0)
    assert float(found.upper_value) == pytest.approx(float(value(x)), rel=1e-12)
    for leaf in ("images", "log_lr"):
        direction = oracles.x_layout.unflatten(torch.zeros_like(x))
        direction[leaf] = torch.ones_like(direction[leaf])
        flat = oracles.x_layout.flatten(direction)
        for slope in difference(value, x, flat):
            assert slope == pytest.approx(float(found.gradient @ flat), rel=1e-6)


def test_matching_learns(data: Part, network: dd.Network, experts: torch.Tensor) -> None:
    task = dd.distillation(data, network, start="noise", lr=0.1)
    base = dd.MTT(dd.Trajectories(experts), steps=3, upper=bilevel.Adam(0.05))
    solution = check_replayed(task, base)
    rated = solved(task, replace(base, upper_rate=bilevel.SGD(0.0)), 4)
    assert float(rated.x["log_lr"]) == pytest.approx(math.log(0.1))
    assert float(solution.x["log_lr"]) != pytest.approx(math.log(0.1))
    long = solved(task, base, 40).history["upper_value"]
    assert sum(long[-5:]) < 0.9 * sum(long[:5])


def test_trajectories_are_drawn_within_bounds(experts: torch.Tensor) -> None:
    assert experts.shape[:2] == (2, 4)
    assert not torch.equal(experts[0, 0], experts[1, 0])
    source = dd.Trajectories(experts, 2)
    pairs = {(int((experts == a).all(2).nonzero()[0, 1]), int((experts == b).all(2).nonzero()[0, 1]))
             for a, b in (source.batch(step, 0) for step in range(50))}  # fmt: skip
    assert pairs == {(0, 2), (1, 3)}
    assert not source.deterministic
    assert dd.Trajectories(experts[:1], 3).deterministic
    assert all(torch.equal(a, b) for a, b in zip(source.batch(3, 1), source.to("cpu").batch(3, 1), strict=True))
    assert torch.equal(dd.Trajectories(experts[:1], 1, max_start=0).batch(9, 9)[1], experts[0, 1])


def test_bad_matching_is_refused(data: Part, network: dd.Network, experts: torch.Tensor) -> None:
    for bad in ((experts[0], 1), (experts, 0), (experts, 4), (experts, 2, 2), (experts * math.nan, 1)):
        with pytest.raises(InvalidProblem, match="Trajectories"):
            dd.Trajectories(*bad)
    for change in ({"experts": 0}, {"epochs": 0}, {"lr": 0.0}, {"momentum": 1.0}):
        with pytest.raises(InvalidProblem, match="train_experts"):
            dd.train_experts(data, network, **change)
    with pytest.raises(NonFinite, match="lower it"):
        dd.train_experts(data, network, experts=1, epochs=30, lr=1e308, momentum=0.9)
    source = dd.Trajectories(experts)
    with pytest.raises(InvalidProblem, match="at least 1"):
        dd.MTT(source, steps=0)
    with pytest.raises(InvalidProblem, match="step length"):
        dd.MTT(source, lower=bilevel.SGD(None))
    task = dd.distillation(data, network)
    with pytest.raises(InvalidProblem, match="no part of x"):
        solved(task, dd.MTT(source))
    with pytest.raises(InvalidProblem, match="no part of x"):
        learned_rate(task.x0, 0)
    with pytest.raises(InvalidProblem, match="same network"):
        solved(task, dd.MTT(dd.Trajectories(experts[:, :, 1:]), lower=SGD))


# -- FRePo -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
def test_regression_has_the_derivative_of_its_loss(
    data: Part, network: dd.Network, learned: bool, difference: Callable[..., list[float]]
) -> None:
    task = dd.distillation(data, network, ipc=2, loss="mse", learn_targets=learned, batch_size=None)
    solver = dd.FRePo(network, ridge=0.1)
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0)
    regression = bilevel.oracles.Oracles(solver.regression(task.problem), oracles.x_layout, oracles.y_layout)
    gradient = solver.estimate(oracles, x, y).gradient
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for slope in difference(lambda at: regression.upper_value(at, y), x, direction):
        assert slope == pytest.approx(float(gradient @ direction), rel=1e-7)


def test_regression_is_bilevel(data: Part, network: dd.Network) -> None:
    # The head as lower variables, its ridge regression as lower objective: the implicit hypergradient is FRePo's.
    task = dd.distillation(data, network, ipc=2, loss="mse", learn_targets=True, batch_size=None)
    solver = dd.FRePo(network, ridge=0.1)
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0)
    wanted = hard_targets(data.targets, 3, "mse", torch.float64)

    def lower(at: Any, head: torch.Tensor, batch: None) -> torch.Tensor:
        features = network.features(task.y0, at["images"])
        l2 = 0.1 * features.square().sum() / len(features)
        return 0.5 * ((features @ head - at["targets"]).square().sum() + l2 * head.square().sum())

    def upper(at: Any, head: torch.Tensor, batch: None) -> torch.Tensor:
        return 0.5 * (network.features(task.y0, data.inputs) @ head - wanted).square().sum(1).mean()

    problem = bilevel.Problem(upper=upper, lower=lower)
    features = network.features(task.y0, task.x0["images"])
    head = features.T @ ridge_head(features, task.x0["targets"], 0.1 * features.square().sum() / len(features))
    exact = bilevel.hypergradient(problem, task.x0, head, estimator=Implicit(linear=bilevel.Dense()))
    found = solver.estimate(oracles, x, y).gradient
    assert torch.allclose(found, oracles.x_layout.flatten(exact.gradient), rtol=1e-7, atol=1e-10)


def test_regression_learns_with_a_pool(data: Part, network: dd.Network) -> None:
    task = dd.distillation(data, network, start="noise", loss="mse", learn_targets=True, batch_size=6)
    base = dd.FRePo(network, pool=dd.Pool(2, (1, 3), 4, SGD), upper=bilevel.Adam(0.05))
    first = check_replayed(task, base)
    assert all(member.births >= 1 for member in first.state.pool)
    for change in ({"ridge": 1.0}, {"upper": bilevel.SGD(0.1)}, {"pool": dd.Pool(2, (1, 3), 4, SGD, seed=1)}):
        assert not torch.equal(solved(task, replace(base, **change), 4).state.x, first.state.x)
    values = solved(task, base, 40).history["upper_value"]
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    with pytest.raises(InvalidProblem, match="ridge"):
        dd.FRePo(network, ridge=0.0)


def test_networks_of_a_pool_age_and_are_replaced(data: Part, network: dd.Network) -> None:
    task = dd.distillation(data, network, loss="mse")
    oracles, x, _ = open_oracles(task.problem, task.x0, task.y0)
    pool = dd.Pool(3, (2, 2), 4, SGD)
    members = pool.init(oracles, network, torch.float64)
    assert len({float(member.y.sum()) for member in members}) == 3
    once = pool.advanced(oracles, network, members, 1, x, 0)
    assert (once[1].age, once[1].births) == (2, 1)
    assert once[0] is members[0]
    training = Training(oracles, SGD, x)
    state = training.advance(1, training.advance(0, training.start(members[1].y)))
    assert torch.equal(once[1].y, state.y)
    twice = pool.advanced(oracles, network, once, 1, x, 1)
    assert (twice[1].age, twice[1].births) == (0, 2)
    assert not torch.equal(twice[1].y, members[1].y)
    assert {pool.draw(step) for step in range(60)} == {0, 1, 2}
    for bad in ({"size": 0}, {"age": 0}, {"steps": (2, 1)}, {"steps": (-1, 1)}):
        with pytest.raises(InvalidProblem, match="Pool"):
            dd.Pool(**bad)


# -- the implicit baseline ----------------------------------------------------------------------------------------


def test_the_implicit_baseline_learns(data: Part) -> None:
    network = dd.mlp(shape=(1, 4, 4), classes=3)
    task = dd.distillation(data, network, start="noise", decay=0.05, batch_size=None)
    solver = dd.implicit(lower=LBFGS(), lower_steps=100, linear=bilevel.CG(), upper=bilevel.Adam(0.1), clip_norm=1.0)
    assert solver.clip_norm == 1.0
    values = solved(task, solver, 30).history["upper_value"]
    assert values[-1] < 0.5 * values[0]
    assert dd.implicit().estimator.truncate


# -- CDA ---------------------------------------------------------------------------------------------------------------


def test_crops_shrink_on_their_schedule() -> None:
    for schedule in ("cosine", "linear", "step"):
        assert smallest_crop(0, 100, schedule) == 1.0
        assert smallest_crop(100, 100, schedule) == pytest.approx(SMALLEST)
        assert smallest_crop(40, 100, schedule, milestone=0.4) == pytest.approx(SMALLEST)
        path = [smallest_crop(step, 100, schedule) for step in range(101)]
        assert path == sorted(path, reverse=True)
    assert smallest_crop(25, 100, "linear") == pytest.approx(1 - 0.92 / 4)
    assert smallest_crop(25, 100, "cosine") == pytest.approx(1 - 0.92 * (1 - math.cos(math.pi / 4)) / 2)
    assert smallest_crop(99, 100, "step") == 1.0
    for bad in ({"schedule": "no"}, {"milestone": 0.0}, {"milestone": 1.1}):
        with pytest.raises(InvalidProblem, match="schedule"):
            smallest_crop(0, 10, **bad)


def test_a_whole_crop_is_the_image() -> None:
    images = torch.randn((4, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    square = [cropped(images, 1.0, generator) for _ in range(3)]
    assert all(crop.shape == images.shape for crop in square)
    small = cropped(images, 0.1, generator)
    assert float(small.min()) >= float(images.min())
    assert float(small.max()) <= float(images.max())
    flat = torch.ones_like(images)
    assert torch.allclose(cropped(flat, 0.08, generator), flat)


def test_synthesis_makes_what_its_teacher_knows(data: Part) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(20)
    centers = torch.randn((3, 1, 8, 8), generator=generator)
    train = Part(centers[labels] + 0.1 * torch.randn((60, 1, 8, 8), generator=generator), labels)
    network = dd.conv_net(4, depth=1, shape=(1, 8, 8), classes=3)
    options: dict[str, Any] = {"ipc": 2, "steps": 8, "width": 4, "epochs": 20, "teacher_lr": 0.03}
    found = dd.cda(train, network, **options)
    assert found.images.shape == (6, 1, 8, 8)
    assert found.targets.argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
    again = dd.cda(train, network, **options)
    assert torch.equal(found.images, again.images)
    for change in (
        {"lr": 0.2}, {"matching": 1.0}, {"first_matching": 0.0}, {"schedule": "linear"}, {"milestone": 0.5},
        {"seed": 1}, {"steps": 9}, {"width": 5}, {"epochs": 21}, {"teacher_lr": 0.02},
    ):  # fmt: skip
        assert not torch.equal(dd.cda(train, network, **(options | change)).images, found.images), change
    for bad in ({"ipc": 0}, {"steps": 0}, {"lr": 0.0}, {"matching": -1.0}, {"epochs": 0}, {"schedule": "no"}):
        with pytest.raises(InvalidProblem):
            dd.cda(train, network, **(options | bad))
