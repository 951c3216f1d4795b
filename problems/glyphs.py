"""Few-shot classification of letters: learn a start on some scripts, adapt it to letters of scripts never seen."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from bilevel.data._base import moved
from bilevel.modules import FunctionalModule, functional
from bilevel.problems._base import Task
from bilevel.problems._glyphs import FACES, GLYPHS, letters
from bilevel.problems.few_shot import Adaptation, Examples, Weights, check_counts, few_shot, interval, learners, scores
from bilevel.status import InvalidProblem

Split: TypeAlias = Literal["test", "validation"]
JUDGED = 1000
"""Tasks of the test; their interval is then about a percent wide."""


def glyphs(
    seed: int = 0, *, ways: int = 5, shots: int = 1, queries: int = 3, tasks: int = 16, lower_steps: int = 3,
    lr: float = 0.4, strength: float = 0.0, channels: int = 16, size: int = 16, split: Split = "test",
    eval_steps: int | None = None, device: str = "cpu",
) -> Task:  # fmt: skip
    """Learn the start of a small network from which few gradient steps tell letters apart that it has never seen.

    A task is to tell 5 letters apart, given one picture of each (5-way, 1-shot). A letter's pictures are its twelve
    typefaces: some to learn from, others to be asked about. Letters are Latin, Greek and Cyrillic in training, Armenian
    and Georgian in the test; a fifth of the training letters is held out to validate.

    The network has three convolutions of stride 2, each normalized over its own picture (`GroupNorm(1, channels)`) with
    ReLU, and one linear layer. There is no batch normalization: a prediction depends on one picture and the support
    examples, never on other queries (it is not transductive).

    Args:
        seed: of the network's start. (The tasks of each step are drawn by the seed of the solve.)
        ways: letters of a task.
        shots: pictures of each to learn from.
        queries: pictures of each to be asked about; shots + queries <= 12.
        tasks: of each upper step.
        lower_steps: gradient steps of an adaptation; the solver must take as many.
        lr: their length where `task.evaluate` adapts; the solver should take the same.
        strength: of the proximal term of implicit MAML; 0 for the others.
        channels: of each convolution.
        size: of the pictures, in pixels.
        split: whose letters `task.evaluate` asks about: those of "test", or of "validation" to choose by.
        eval_steps: gradient steps of `task.evaluate`, as many as `lower_steps` if None; 0 does not adapt.
        device: of all tensors.

    Raises:
        InvalidProblem: matplotlib is not installed, or an option is out of range.

    Notes:
        `task.evaluate` gives the mean accuracy over 1,000 test tasks and half the width of its 95 % interval.

    References:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017. The
        letters stand in for Omniglot (Lake, Salakhutdinov, Tenenbaum, 2015), which no package brings.
    """
    if split not in get_args(Split):
        raise InvalidProblem(f"glyphs(split=...) must be one of {get_args(Split)}, got {split!r}.")
    check_counts(ways=ways, shots=shots, queries=queries, tasks=tasks, lower_steps=lower_steps, channels=channels)
    if shots + queries > len(FACES):
        raise InvalidProblem(f"shots + queries must be at most {len(FACES)} typefaces, got {shots} + {queries}.")
    adaptation = Adaptation(lr, lower_steps, strength)
    pictures = letters(size)
    draw = partial(draw_letters, pictures.train.to(device), tasks, ways, shots, queries)
    net = functional(_network(seed, ways, channels, size).to(device))
    problem = few_shot(net, F.cross_entropy, draw, tasks=tasks, lower_steps=lower_steps, strength=strength)
    judge = adaptation if eval_steps is None else adaptation._replace(steps=eval_steps)
    asked = moved(judged_tasks(split, ways, shots, queries, size), device)

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        mean, half = interval(accuracies(net, x, asked, judge))
        return {f"{split}_accuracy": mean, "interval": half}

    return Task(
        "glyphs", problem, net.parameters(), None, steps=300, evaluate=evaluate, source=GLYPHS,
        solvers=learners(lr, lower_steps),
    )  # fmt: skip


def judged_tasks(
    split: Split, ways: int = 5, shots: int = 1, queries: int = 3, size: int = 16
) -> tuple[Examples, Examples]:  # fmt: skip
    """Return the 1,000 tasks that `task.evaluate` adapts to: always the same ones."""
    pictures = getattr(letters(size), split)
    return draw_letters(pictures, JUDGED, ways, shots, queries, Generator().manual_seed(1))


def accuracies(
    net: FunctionalModule, x: Weights, tasks: tuple[Examples, Examples], adaptation: Adaptation
) -> Tensor:  # fmt: skip
    """Adapt a start to every task, and return the accuracy on its query examples, `[tasks]`."""

    def loss(y: Weights, batch: Examples) -> Tensor:
        return F.cross_entropy(net(y, batch[0]), batch[1])

    def score(y: Weights, batch: Examples) -> Tensor:
        right: Tensor = net(y, batch[0]).argmax(-1) == batch[1]
        return right.double().mean()

    return scores(loss, score, x, tasks, adaptation)


def nearest(tasks: tuple[Examples, Examples]) -> Tensor:
    """Return the accuracy of every task where each query gets the label of the nearest support picture, `[tasks]`."""
    (support, known), (query, asked) = tasks
    distances = torch.cdist(query.flatten(2), support.flatten(2))
    right: Tensor = known.gather(1, distances.argmin(-1)) == asked
    return right.double().mean(-1)


def draw_letters(
    pictures: Tensor, tasks: int, ways: int, shots: int, queries: int, generator: Generator
) -> tuple[Examples, Examples]:
    """Draw tasks: which of some letters is this? Each letter in some faces to learn from, in others to be asked about.

    Args:
        pictures: `[letters, faces, size, size]`.
        tasks: how many.
        ways: letters of each.
        shots: faces of each letter to learn from.
        queries: other faces of each letter to be asked about.
        generator: draws.

    Returns:
        `(images [tasks, shots ways, 1, size, size], labels [tasks, shots ways])`, and likewise with queries.
    """
    count, faces, size, _ = pictures.shape
    chosen = torch.rand(tasks, count, generator=generator).topk(ways, -1).indices
    order = torch.rand(tasks, ways, faces, generator=generator).topk(shots + queries, -1).indices
    images = pictures[chosen[..., None], order]
    labels = torch.arange(ways, device=pictures.device).expand(tasks, ways)

    def examples(part: slice) -> Examples:
        own = images[:, :, part].transpose(1, 2)  # faces first, so that classes take turns
        return own.reshape(tasks, -1, 1, size, size), labels.repeat(1, own.shape[1])

    return examples(slice(shots)), examples(slice(shots, None))


def _network(seed: int, ways: int, channels: int, size: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for given in (1, channels, channels):
            layers += [nn.Conv2d(given, channels, 3, stride=2, padding=1), nn.GroupNorm(1, channels), nn.ReLU()]
        left = -(-size // 8)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * left * left, ways))
