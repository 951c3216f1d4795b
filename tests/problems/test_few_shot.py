"""Few-shot learning: its letters, its tasks, its judge, and that a learned start adapts better than a fresh one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

import bilevel
from bilevel import InvalidProblem
from bilevel.problems import glyphs, sine
from bilevel.problems._glyphs import letters
from bilevel.problems.few_shot import Adaptation, adapted, interval, scores
from bilevel.problems.glyphs import _network, accuracies, draw_letters, judged_tasks, nearest
from bilevel.problems.sine import draw_waves


@pytest.mark.slow
def test_no_letter_is_in_two_splits_and_no_two_look_alike() -> None:
    pictures = torch.cat(letters(16))
    assert pictures.shape[1:] == (12, 16, 16)
    assert 0 <= float(pictures.min()) < float(pictures.max()) <= 1
    for face in range(12):
        assert len(pictures[:, face].flatten(1).unique(dim=0)) == len(pictures)
    train, validation, test = map(len, letters(16))
    assert train > 3 * validation > 300
    assert test > 100


def test_letters_stand_in_the_middle() -> None:
    ink = letters(16).test.amax(1) > 0
    for axis in (1, 2):
        along = ink.any(axis).long()
        before, after = along.argmax(-1), along.flip(-1).argmax(-1)
        assert int((before - after).abs().max()) <= 1


TAGGED = (torch.arange(7.0)[:, None] * 12 + torch.arange(12.0))[..., None, None].expand(7, 12, 8, 8)


def test_tasks_ask_about_other_faces_of_the_same_letters() -> None:
    (support, known), (query, asked) = draw_letters(TAGGED, 50, 5, 2, 4, Generator().manual_seed(0))
    assert support.shape == (50, 10, 1, 8, 8)
    assert query.shape == (50, 20, 1, 8, 8)
    for i in range(50):
        tags, labels = torch.cat([support[i], query[i]])[:, 0, 0, 0].long(), torch.cat([known[i], asked[i]])
        assert len(tags.unique()) == 30  # no face of a letter twice
        pairs = {(int(tag) // 12, int(label)) for tag, label in zip(tags, labels, strict=True)}
        assert len(pairs) == len({letter for letter, _ in pairs}) == len({label for _, label in pairs}) == 5


def test_nearest_neighbors_know_what_they_have_seen() -> None:
    tasks = draw_letters(TAGGED, 20, 5, 1, 3, Generator().manual_seed(0))
    assert float(nearest((tasks[0], tasks[0])).min()) == 1.0
    assert float(nearest(tasks).mean()) > 0.5  # faces of one letter have near tags here


def test_waves_are_waves() -> None:
    (inputs, values), (more, _) = draw_waves(200, 3, 5, Generator().manual_seed(0))
    assert inputs.shape == values.shape == (200, 3, 1)
    assert more.shape == (200, 5, 1)
    assert float(inputs.abs().max()) <= 5
    # A sin(z - p) = u sin z + v cos z: two points give u and v, and the third one must agree.
    waves = torch.cat([inputs.sin(), inputs.cos()], -1).double()
    solved = torch.linalg.lstsq(waves, values.double())
    torch.testing.assert_close(waves @ solved.solution, values.double(), rtol=0, atol=1e-4)


def test_adaptation_is_gradient_descent_from_the_start() -> None:
    x = {"w": torch.tensor([1.0, -1.0], dtype=torch.float64)}
    targets = torch.tensor([[0.0, 2.0], [3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)

    def loss(y: dict[str, Tensor], batch: Any) -> Tensor:
        return 0.5 * (y["w"] - batch[0]).square().sum()

    lr, strength = 0.3, 0.5
    found = adapted(loss, x, (targets, targets), Adaptation(lr, 4, strength))["w"]
    minimum = (targets + strength * x["w"]) / (1 + strength)
    torch.testing.assert_close(found, minimum + (1 - lr * (1 + strength)) ** 4 * (x["w"] - minimum))
    assert bool((adapted(loss, x, (targets, targets), Adaptation(lr, 0))["w"] == x["w"]).all())
    many = targets.repeat(50, 1)  # more than are adapted at a time
    told = scores(loss, loss, x, ((many, many), (many, many)), Adaptation(lr, 4, strength))
    torch.testing.assert_close(told, 0.5 * (found - targets).square().sum(-1).repeat(50))


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator, hits = Generator().manual_seed(0), 0
    for _ in range(1000):
        mean, half = interval(torch.rand(600, generator=generator))
        hits += abs(mean - 0.5) <= half
    assert 930 <= hits <= 970


def test_an_unadapted_start_guesses() -> None:
    task = glyphs(eval_steps=0, lower_steps=1)
    assert task.evaluate is not None
    numbers = task.evaluate(task.x0, None)
    assert abs(numbers["test_accuracy"] - 0.2) < 3 * numbers["interval"]
    assert 0 < numbers["interval"] < 0.02


def test_the_judge_agrees_with_a_loop_over_tasks() -> None:
    """Adapt the first tasks one by one, in plain torch."""
    task = glyphs(lower_steps=2, channels=4)
    support, query = judged_tasks("test")
    net = bilevel.functional(_network(0, 5, 4, 16))
    found = accuracies(net, task.x0, (support, query), Adaptation(0.4, 2))
    for i in range(3):
        y = {name: leaf.detach().clone().requires_grad_() for name, leaf in task.x0.items()}
        for _ in range(2):
            loss = F.cross_entropy(net(y, support[0][i]), support[1][i])
            slopes = torch.autograd.grad(loss, list(y.values()))
            y = {
                name: (leaf - 0.4 * slope).detach().requires_grad_()
                for (name, leaf), slope in zip(y.items(), slopes, strict=True)
            }
        right = (net(y, query[0][i]).argmax(-1) == query[1][i]).double().mean()
        assert float(right) == pytest.approx(float(found[i]))


@pytest.mark.slow
def test_a_learned_start_beats_a_fresh_one() -> None:
    task = glyphs(tasks=8, channels=8, split="validation")
    solver = bilevel.maml(0.4, 3, upper=bilevel.Adam(0.01))
    solution = bilevel.solve(task.problem, solver, task.x0, steps=40)
    assert task.evaluate is not None
    fresh, learned = (task.evaluate(x, None) for x in (task.x0, solution.x))
    gain = learned["validation_accuracy"] - fresh["validation_accuracy"]
    assert gain > 0.1 > learned["interval"] + fresh["interval"]


def test_learning_sines_lowers_the_error_of_adaptation() -> None:
    task = sine()
    solution = bilevel.solve(task.problem, bilevel.maml(0.02, 5, upper=bilevel.Adam(0.01)), task.x0, steps=60)
    assert task.evaluate is not None
    fresh, learned = (task.evaluate(x, None)["test_mse"] for x in (task.x0, solution.x))
    assert learned < 0.8 * fresh


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 6, "queries": 7}, "typefaces"),
        ({"ways": 0}, "ways"),
        ({"tasks": 2.5}, "tasks"),
        ({"split": "train"}, "split"),
        ({"size": 4}, "size"),
        ({"strength": -1.0}, "strength"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        glyphs(**options)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(bilevel.MissingPackage, match=r"matplotlib.*pip install 'bilevel\[plot\]'"):
        glyphs()
    letters.cache_clear()
