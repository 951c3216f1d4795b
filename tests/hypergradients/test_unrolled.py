"""Gradients through training against one autograd graph of all steps, written out, and against closed forms."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel
from bilevel import SGD, Adam, AdamW, Full, Problem, Shuffled
from bilevel.dry_run import open_oracles
from bilevel.hypergradients import Unrolled, metagradient
from bilevel.hypergradients.unrolled import visit
from bilevel.layout import named_leaves
from bilevel.optimizers.adam import AdamState
from bilevel.optimizers.sgd import SGDState
from bilevel.replay import Binomial, Disk, KAry, Schedule, Sqrt, StoreAll
from bilevel.status import Chaotic, InvalidProblem, NonFinite, ReplayMismatch, Status, UnusedHyperparameter
from bilevel.training import Training, TrainingState

EXAMPLES = 24
BATCH = 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS, LABELS = draw(EXAMPLES, 5), torch.arange(EXAMPLES) % 3
HELD_OUT = (draw(9, 5, seed=1), torch.arange(9) % 3)
NET = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
START = {
    "0.weight": 0.5 * draw(6, 5, seed=2), "0.bias": 0.1 * draw(6, seed=3),
    "2.weight": 0.5 * draw(3, 6, seed=4), "2.bias": 0.1 * draw(3, seed=5),
}  # fmt: skip


def forward(y: dict[str, Tensor], inputs: Tensor) -> Tensor:
    return torch.tanh(inputs @ y["0.weight"].T + y["0.bias"]) @ y["2.weight"].T + y["2.bias"]


def weighted(x: dict[str, Tensor], y: dict[str, Tensor], batch: Any) -> Tensor:
    inputs, labels, index = batch
    losses = F.cross_entropy(forward(y, inputs), labels, reduction="none")
    return (x["weights"][index].exp() * losses).mean()


def held_out(x: Any, y: dict[str, Tensor], batch: Any) -> Tensor:
    return F.cross_entropy(forward(y, HELD_OUT[0]), HELD_OUT[1]) + 0.01 * x["weights"].square().sum()


DATA = Shuffled((INPUTS, LABELS), batch_size=BATCH, with_index=True)
PROBLEM = Problem(upper=held_out, lower=weighted, lower_data=DATA)


def upper_variables(steps: int) -> dict[str, Tensor]:
    return {"weights": 0.3 * draw(EXAMPLES, seed=6), "rates": 0.1 * draw(steps, seed=7)}


class Case(NamedTuple):
    """An optimizer of ours, and the same update written out: (y, g, buffers, rate, step) -> (y, buffers)."""

    name: str
    make: Callable[[Any], Any]
    update: Callable[..., tuple[Tensor, list[Tensor]]]
    state: Callable[[int, list[Tensor]], Any]
    buffers: int


def sgd(momentum: float, decay: float, nesterov: bool) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    def update(y: Tensor, g: Tensor, buffers: list[Tensor], rate: Tensor, step: int) -> tuple[Tensor, list[Tensor]]:
        g = g + decay * y
        if momentum == 0:
            return y - rate * g, buffers
        b = g if step == 0 else momentum * buffers[0] + g
        return y - rate * (g + momentum * b if nesterov else b), [b]

    return update


def adam(decay: float, decoupled: bool) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    def update(y: Tensor, g: Tensor, buffers: list[Tensor], rate: Tensor, step: int) -> tuple[Tensor, list[Tensor]]:
        if decoupled:
            y = y * (1 - rate * decay)
        else:
            g = g + decay * y
        m, v = 0.9 * buffers[0] + 0.1 * g, 0.99 * buffers[1] + 0.01 * g * g
        t = step + 1
        return y - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8), [m, v]

    return update


def sgd_state(step: int, buffers: list[Tensor]) -> SGDState:
    return SGDState(step, buffers[0] if buffers else torch.zeros(0, dtype=torch.float64))


def adam_state(step: int, buffers: list[Tensor]) -> AdamState:
    return AdamState(step, *buffers, torch.zeros(0, dtype=torch.float64))


def scheduled(base: float) -> Callable[[Any, int], Tensor]:
    return lambda x, step: base * x["rates"][step].exp()


CASES = [
    Case("SGD", lambda lr: SGD(lr), sgd(0, 0, False), sgd_state, 0),
    Case("momentum", lambda lr: SGD(lr, 0.9), sgd(0.9, 0, False), sgd_state, 1),
    Case("Nesterov with decay", lambda lr: SGD(lr, 0.8, nesterov=True, weight_decay=0.05), sgd(0.8, 0.05, True), sgd_state, 1),
    Case("Adam", lambda lr: Adam(lr, betas=(0.9, 0.99), weight_decay=0.05), adam(0.05, False), adam_state, 2),
    Case("AdamW", lambda lr: AdamW(lr, betas=(0.9, 0.99), weight_decay=0.1), adam(0.1, True), adam_state, 2),
]  # fmt: skip
BASE = {"SGD": 0.3, "momentum": 0.05, "Nesterov with decay": 0.05, "Adam": 0.02, "AdamW": 0.02}
SCHEDULES: list[Schedule] = [
    StoreAll(),
    StoreAll(graphs=False),
    Sqrt(),
    Sqrt(graphs=False),
    KAry(2),
    KAry(4),
    Binomial(3),
]


class Answer(NamedTuple):
    value: Tensor
    x: list[Tensor]
    y0: list[Tensor]
    buffers: list[Tensor]
    y: Tensor


def one_graph(case: Case, steps: int, batches: Any, buffers: list[Tensor], first: int = 0) -> Answer:
    """The whole training as one autograd graph."""
    x = {name: leaf.clone().requires_grad_() for name, leaf in upper_variables(first + steps).items()}
    y0 = {name: leaf.clone().requires_grad_() for name, leaf in START.items()}
    shapes, sizes = [leaf.shape for leaf in y0.values()], [leaf.numel() for leaf in y0.values()]
    start = [b.clone().requires_grad_() for b in buffers]
    y, moments = torch.cat([leaf.flatten() for leaf in y0.values()]), list(start)
    for step in range(first, first + steps):
        nested = dict(zip(START, (p.view(s) for p, s in zip(y.split(sizes), shapes, strict=True)), strict=True))
        (g,) = (
            torch.autograd.grad(weighted(x, nested, batches(step - first)), y, create_graph=True)
            if y.requires_grad
            else (y,)
        )
        y, moments = case.update(y, g, moments, BASE[case.name] * x["rates"][step].exp(), step)
    nested = dict(zip(START, (p.view(s) for p, s in zip(y.split(sizes), shapes, strict=True)), strict=True))
    value = held_out(x, nested, None)
    inputs = [*x.values(), *y0.values(), *start]
    found = torch.autograd.grad(value, inputs, materialize_grads=True)
    return Answer(value.detach(), list(found[:2]), list(found[2:6]), list(found[6:]), y.detach())


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal to 1e-12 of the size of each leaf."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm()) <= 1e-12 * max(float(other.norm()), 1e-12)


def batches(step: int) -> Any:
    return DATA.batch(step, hash((0, "upper" if False else "lower")) & (2**63 - 1))


@pytest.fixture
def lower_batches() -> Callable[[int], Any]:
    oracles, _, _ = open_oracles(PROBLEM, upper_variables(1), START, trains=True)
    return lambda step: oracles.batch("lower", step)


def check(case: Case, steps: int, schedule: Schedule, lower_batches: Callable[[int], Any], **options: Any) -> None:
    lower = case.make(scheduled(BASE[case.name]))
    x = upper_variables(steps)
    h = metagradient(PROBLEM, x, START, lower=lower, steps=steps, schedule=schedule, **options)
    count = sum(leaf.numel() for leaf in START.values())
    expected = one_graph(case, steps, lower_batches, [torch.zeros(count, dtype=torch.float64)] * case.buffers)
    assert h.run is not None
    assert_same([h.run.value], [expected.value])
    assert_same([leaf for _, leaf in named_leaves(h.gradient)], expected.x)
    assert_same([leaf for _, leaf in named_leaves(h.run.initial)], expected.y0)
    torch.testing.assert_close(
        torch.cat([leaf.flatten() for leaf in h.run.y.values()]), expected.y, rtol=1e-12, atol=1e-12
    )
    assert h.run.visited.advances <= schedule.advances(steps)
    assert h.run.visited.peak_states <= schedule.peak(steps)
    assert h.certificate.status is Status.CONVERGED


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 16])
def test_equals_one_graph(case: Case, steps: int, lower_batches: Any) -> None:
    for schedule in SCHEDULES:
        check(case, steps, schedule, lower_batches)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_graph_of_64_steps(case: Case, lower_batches: Any) -> None:
    check(case, 64, Sqrt(), lower_batches)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("steps", [64, 1024])
@pytest.mark.parametrize("schedule", SCHEDULES[2:6], ids=str)
def test_equals_one_graph_of_many_steps(case: Case, steps: int, schedule: Schedule, lower_batches: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Chaotic)
        check(case, steps, schedule, lower_batches)
