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
    Case(
        "Nesterov with decay", lambda lr: SGD(lr, 0.8, nesterov=True, weight_decay=0.05), sgd(0.8, 0.05, True),
        sgd_state, 1,
    ),
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
        (g,) = torch.autograd.grad(weighted(x, nested, batches(step)), y, create_graph=True)
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


@pytest.fixture
def lower_batches() -> Callable[[int], Any]:
    oracles, _, _ = open_oracles(PROBLEM, upper_variables(1), START, trains=True)
    return lambda step: oracles.batch("lower", step)


KNOWN: dict[tuple[str, int], Answer] = {}


def check(case: Case, steps: int, schedule: Schedule, lower_batches: Callable[[int], Any], **options: Any) -> None:
    lower = case.make(scheduled(BASE[case.name]))
    x = upper_variables(steps)
    h = metagradient(PROBLEM, x, START, lower=lower, steps=steps, schedule=schedule, **options)
    count = sum(leaf.numel() for leaf in START.values())
    if (case.name, steps) not in KNOWN:
        zeros = [torch.zeros(count, dtype=torch.float64)] * case.buffers
        KNOWN[case.name, steps] = one_graph(case, steps, lower_batches, zeros)
    expected = KNOWN[case.name, steps]
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
@pytest.mark.parametrize("schedule", [*SCHEDULES[:6], Binomial(24)], ids=str)
def test_equals_one_graph_of_many_steps(case: Case, steps: int, schedule: Schedule, lower_batches: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Chaotic)
        check(case, steps, schedule, lower_batches)


# -- what else may vary ------------------------------------------------------------------------------------------------


def opened(problem: Problem, x: Any, y: Any = START) -> tuple[Any, Tensor, Tensor]:
    return open_oracles(problem, x, y, trains=True)


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_gradients_in_initial_moments(case: Case, lower_batches: Any) -> None:
    """The training goes on from a state in mid-flight, whose moments are not zero."""
    count = sum(leaf.numel() for leaf in START.values())
    moments = [0.1 * draw(count, seed=8), 0.01 + 0.1 * draw(count, seed=9).square()][: case.buffers]
    expected = one_graph(case, 5, lower_batches, moments, first=2)
    oracles, x, y = opened(PROBLEM, upper_variables(7))
    training = Training(oracles, case.make(scheduled(BASE[case.name])), x)
    found = visit(training, TrainingState(y, case.state(2, moments)), 5, first=2, schedule=KAry(2))
    assert_same(oracles.x_layout.views(found.x), expected.x)
    assert_same(oracles.y_layout.views(found.initial.y), expected.y0)
    assert_same(list(found.initial.optimizer)[: case.buffers], expected.buffers)


def test_a_dropped_momentum_cotangent_is_far_off(lower_batches: Any) -> None:
    """What the tests above would see if the buffers' cotangent got lost between steps."""
    oracles, x, y = opened(PROBLEM, upper_variables(16))
    training = Training(oracles, CASES[1].make(scheduled(BASE["momentum"])), x)
    count = sum(leaf.numel() for leaf in START.values())
    expected = one_graph(CASES[1], 16, lower_batches, [torch.zeros(count, dtype=torch.float64)])

    class Forgetful(Training):
        def linearize(self, step: int, state: TrainingState) -> Any:
            after, pull = super().linearize(step, state)
            return after, lambda a: pull(a._replace(optimizer=tuple(torch.zeros_like(b) for b in a.optimizer)))

    mutant = Forgetful(oracles, training.optimizer, x)
    right, wrong = (visit(each, each.start(y), 16).x for each in (training, mutant))
    exact = torch.cat(expected.x)
    assert float((right - exact).norm()) < 1e-12 * float(exact.norm())
    assert float((wrong - exact).norm()) > 0.1 * float(exact.norm())


DECAYED = Problem(
    upper=held_out,
    lower=lambda x, y, b: F.cross_entropy(forward(y, b[0]), b[1]) + 0 * x["weights"].sum(),
    lower_data=DATA,
    regularizer=bilevel.L2(weight=lambda x: x["decay"].exp()),
)
WRITTEN = Problem(
    upper=held_out,
    lower=lambda x, y, b: (
        DECAYED.lower(x, y, b) + 0.5 * x["decay"].exp() * sum(leaf.square().sum() for leaf in y.values())
    ),
    lower_data=DATA,
)


@pytest.mark.parametrize("options", [{}, {"microbatches": 3}], ids=str)
def test_declared_terms_are_those_written_out(options: dict[str, int]) -> None:
    x = {"weights": torch.zeros(EXAMPLES, dtype=torch.float64), "decay": torch.tensor(-2.0, dtype=torch.float64)}
    found = [metagradient(p, x, START, lower=SGD(0.2, 0.5), steps=6, **options) for p in (DECAYED, WRITTEN)]
    for name in x:
        torch.testing.assert_close(found[0].gradient[name], found[1].gradient[name], rtol=1e-11, atol=1e-14)
    assert found[0].gradient["decay"].abs() > 1e-3


@pytest.mark.parametrize("parts", [2, 3, 8, 50])
def test_microbatches_change_nothing(parts: int) -> None:
    x = upper_variables(9)
    lower = SGD(scheduled(0.05), 0.9)
    whole, split = (metagradient(PROBLEM, x, START, lower=lower, steps=9, microbatches=m) for m in (1, parts))
    for name in x:
        torch.testing.assert_close(split.gradient[name], whole.gradient[name], rtol=1e-12, atol=1e-15)


def test_microbatches_need_batches_with_rows() -> None:
    problem = Problem(upper=lambda x, y, b: (y - 1).square(), lower=lambda x, y, b: (y - x).square())
    with pytest.raises(InvalidProblem, match="microbatches=2 needs lower batches"):
        metagradient(problem, torch.ones(()), torch.zeros(()), lower=SGD(0.1), microbatches=2)


@pytest.mark.parametrize("way", ["forward_over_reverse", "math_attention", "differences"])
def test_other_ways_to_second_derivatives(way: Any) -> None:
    x = upper_variables(6)
    lower = SGD(scheduled(0.05), 0.9)
    smooth = Problem(upper=held_out, lower=weighted, lower_data=DATA, hvp=way)
    found = metagradient(smooth, x, START, lower=lower, steps=6)
    expected = metagradient(PROBLEM, x, START, lower=lower, steps=6)
    tolerance = 1e-7 if way == "differences" else 1e-12
    for name in x:
        torch.testing.assert_close(found.gradient[name], expected.gradient[name], rtol=tolerance, atol=tolerance)


def test_random_numbers_inside_the_objective_are_replayed() -> None:
    """Dropout: the steps that are run again draw what they drew."""

    def lower(x: Any, y: Any, b: Any) -> Tensor:
        inputs = F.dropout(b[0], 0.5)
        losses = F.cross_entropy(forward(y, inputs), b[1], reduction="none")
        return (x["weights"][b[2]].exp() * losses).mean()

    problem = Problem(upper=held_out, lower=lower, lower_data=DATA)
    x = upper_variables(12)
    before = torch.get_rng_state()
    found = [
        metagradient(problem, x, START, lower=SGD(scheduled(0.3)), steps=12, schedule=s).gradient
        for s in (StoreAll(), Sqrt(), Binomial(2))
    ]
    assert torch.equal(before, torch.get_rng_state())
    for other in found[1:]:
        assert torch.equal(other["weights"], found[0]["weights"])
    other = metagradient(PROBLEM, x, START, lower=SGD(scheduled(0.3)), steps=12).gradient
    assert not torch.equal(other["weights"], found[0]["weights"])


class CountingSource(bilevel.DataSource):
    """A loader whose order depends on how often it was asked, as an iterator's does."""

    calls = 0
    deterministic = False

    def batch(self, step: int, seed: int) -> Any:
        self.calls += 1
        return DATA.batch(self.calls, seed)


@pytest.mark.parametrize("schedule", [Sqrt(), KAry(2), Binomial(3), StoreAll(graphs=False)], ids=str)
def test_batches_tied_to_a_call_count_are_a_mismatch(schedule: Schedule) -> None:
    problem = Problem(upper=held_out, lower=weighted, lower_data=CountingSource())
    oracles, x, y = opened(PROBLEM, upper_variables(12))
    oracles.problem = problem
    training = Training(oracles, SGD(0.3), x)
    with pytest.raises(ReplayMismatch, match=r"before step \d+ .* 'y' .* DataSource"):
        visit(training, training.start(y), 12, schedule=schedule)
    visit(training, training.start(y), 12, schedule=schedule, verify=False)  # no one else notices


def test_noise_from_elsewhere_is_a_mismatch() -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Any, y: Any, b: Any) -> Tensor:
        return weighted(x, y, b) * (1 + 1e-9 * torch.rand((), generator=generator, dtype=torch.float64))

    problem = Problem(upper=held_out, lower=noisy, lower_data=DATA)
    with pytest.raises(ReplayMismatch, match="deterministic"):
        metagradient(problem, upper_variables(12), START, lower=SGD(scheduled(0.3)), steps=12)


# -- x in the start of training ----------------------------------------------------------------------------------------


def quadratic(t: Tensor) -> tuple[Problem, Tensor]:
    """y_T = P y0 + (I - P) x with P = (I - eta H)^T: everything is known."""
    h = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - t).square().sum(),
        lower=lambda x, y, b: 0.5 * (h * (y - x["target"]).square()).sum(),
        lower_init=lambda x: 2.0 * x["start"],
    )
    return problem, h


def test_the_start_of_training_has_its_closed_form() -> None:
    t = draw(3, seed=3)
    problem, h = quadratic(t)
    x = {"target": draw(3, seed=1), "start": draw(3, seed=2)}
    p = (1 - 0.3 * h) ** 7
    y = p * 2 * x["start"] + (1 - p) * x["target"]
    found = metagradient(problem, x, lower=SGD(0.3), steps=7)
    assert found.run is not None
    torch.testing.assert_close(found.run.y, y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.gradient["start"], 2 * p * (y - t), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.gradient["target"], (1 - p) * (y - t), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.run.initial, p * (y - t), rtol=1e-12, atol=1e-14)
    with pytest.raises(UnusedHyperparameter, match="'start' enters neither"):
        metagradient(problem, x, torch.zeros(3, dtype=torch.float64), lower=SGD(0.3), steps=7)


def test_implicit_solvers_send_the_start_of_training_here() -> None:
    problem, _ = quadratic(draw(3, seed=3))
    x = {"target": draw(3, seed=1), "start": draw(3, seed=2)}
    with pytest.raises(InvalidProblem, match=r"implicit gradient is zero by definition.*unroll"):
        bilevel.solve(problem, bilevel.implicit(), x, steps=1)
    solution = bilevel.solve(problem, bilevel.unrolled(SGD(0.3), 3), x, steps=300)
    assert solution.best_value < 1e-3


def test_blocks_are_trained_each() -> None:
    t, h = draw(4, 3, seed=3), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - b[0]).square().sum(),
        lower=lambda x, y, b: 0.5 * (h * (y - x - b[0]).square()).sum(),
        upper_data=Full((t,)), lower_data=Full((t,)), blocks=4,
    )  # fmt: skip
    x, p = draw(3, seed=1), (1 - 0.3 * h) ** 5
    found = metagradient(problem, x, torch.zeros(4, 3, dtype=torch.float64), lower=SGD(0.3), steps=5)
    y = (1 - p) * (x + t)
    torch.testing.assert_close(found.gradient, ((1 - p) * (y - t)).mean(0), rtol=1e-12, atol=1e-14)


# -- estimates and their errors ----------------------------------------------------------------------------------------


def test_a_truncated_gradient_errs_by_a_geometric_series() -> None:
    """Strongly convex: the error falls by the factor (1 - eta mu) with each step kept, and the certificate knows."""
    t = draw(3, seed=3)
    problem, _ = quadratic(t)
    problem = Problem(upper=problem.upper, lower=problem.lower)
    x, y0 = {"target": draw(3, seed=1)}, torch.zeros(3, dtype=torch.float64)
    exact = metagradient(problem, x, y0, lower=SGD(0.3), steps=40).gradient["target"]
    errors = []
    for kept in (5, 10, 20, 39):
        h_k = metagradient(problem, x, y0, lower=SGD(0.3), steps=40, truncate=kept)
        error = float((h_k.gradient["target"] - exact).norm())
        assert h_k.certificate.status is Status.APPROXIMATE
        assert h_k.certificate.error_estimate is not None
        assert 0.3 * error < float(h_k.certificate.error_estimate) < 30 * error
        errors.append(error)
    assert errors[1] / errors[0] == pytest.approx(0.85**5, rel=0.2)
    assert errors[2] / errors[1] == pytest.approx(0.85**10, rel=0.2)
    full = metagradient(problem, x, y0, lower=SGD(0.3), steps=40, truncate=40)
    assert torch.equal(full.gradient["target"], exact)
    assert full.certificate.status is Status.CONVERGED


def test_training_on_is_certified_against_its_limit() -> None:
    task = bilevel.problems.quadratic()
    assert task.problem.lower_solution is not None
    x = torch.ones(4, dtype=torch.float64).requires_grad_()
    (exact,) = torch.autograd.grad(task.problem.upper(x, task.problem.lower_solution(x), None), x)
    y = task.problem.lower_solution(x.detach()) + 0.01
    for steps in (3, 6, 12, 24):
        h = bilevel.hypergradient(task.problem, x.detach(), y, estimator=Unrolled(lower=SGD(0.3), steps=steps))
        error = float((h.gradient - exact).norm())
        assert h.certificate.error_estimate is not None
        assert 0.5 * error < float(h.certificate.error_estimate) < 5 * error


def test_rates_of_steps_add_up_to_the_rate_of_all() -> None:
    each = metagradient(PROBLEM, upper_variables(10) | {"rates": torch.zeros(10).double()}, START,
                        lower=SGD(scheduled(0.3)), steps=10).gradient["rates"]  # fmt: skip
    x = {"weights": upper_variables(10)["weights"], "rates": torch.zeros(()).double()}
    whole = metagradient(PROBLEM, x, START, lower=SGD(lambda x, step: 0.3 * x["rates"].exp()), steps=10)
    torch.testing.assert_close(each.sum(), whole.gradient["rates"], rtol=1e-12, atol=1e-15)


def test_examples_no_batch_showed_have_no_gradient() -> None:
    found = metagradient(PROBLEM, upper_variables(2), START, lower=SGD(scheduled(0.3)), steps=2)
    direct = 0.02 * upper_variables(2)["weights"]
    oracles, _, _ = opened(PROBLEM, upper_variables(2))
    shown = torch.cat([oracles.batch("lower", step)[2] for step in range(2)])
    moved = (found.gradient["weights"] - direct).abs() > 1e-9
    assert set(moved.nonzero().flatten().tolist()) == set(shown.tolist())


def test_finite_differences_agree() -> None:
    x, v = upper_variables(20), draw(EXAMPLES, seed=11)
    lower = Adam(scheduled(0.05))

    def value(shift: float) -> Tensor:
        moved = {**x, "weights": x["weights"] + shift * v}
        run = metagradient(PROBLEM, moved, START, lower=lower, steps=20).run
        assert run is not None
        return run.value

    slope = metagradient(PROBLEM, x, START, lower=lower, steps=20).gradient["weights"] @ v
    for step in (1e-4, 1e-5):
        torch.testing.assert_close((value(step) - value(-step)) / (2 * step), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
def test_agrees_with_higher(settings: dict[str, Any], lower_batches: Any) -> None:
    """Where it is right: SGD that minimizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        higher = pytest.importorskip("higher")
    x = {"weights": upper_variables(8)["weights"].clone().requires_grad_()}
    leaves = [leaf.clone().requires_grad_() for leaf in START.values()]
    theirs, now = higher.optim.DifferentiableSGD(torch.optim.SGD(leaves, lr=0.1, **settings), leaves), list(leaves)
    for step in range(8):
        now = theirs.step(weighted(x, dict(zip(START, now, strict=True)), lower_batches(step)), params=now)
    value = held_out(x, dict(zip(START, now, strict=True)), None)
    expected = torch.autograd.grad(value, [x["weights"], *leaves])
    found = metagradient(PROBLEM, {"weights": x["weights"].detach()}, START, lower=SGD(0.1, **settings), steps=8)
    assert found.run is not None
    torch.testing.assert_close(found.gradient["weights"], expected[0], rtol=1e-11, atol=1e-14)
    for one, other in zip(found.run.initial.values(), expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_adam_with_a_gradient_of_zero_stays_finite() -> None:
    """An input that is always zero: its weights have gradient 0, where the root of the second moment has none."""
    inputs = INPUTS.clone()
    inputs[:, 0] = 0.0
    data = Shuffled((inputs, LABELS), batch_size=BATCH, with_index=True)
    problem = Problem(upper=held_out, lower=weighted, lower_data=data)
    found = metagradient(problem, upper_variables(8), START, lower=Adam(scheduled(0.02)), steps=8)
    assert all(bool(leaf.isfinite().all()) for _, leaf in named_leaves(found.gradient))
    assert found.run is not None
    assert all(bool(leaf.isfinite().all()) for _, leaf in named_leaves(found.run.initial))


class Steps(bilevel.DataSource):
    """The batch of a step is its number."""

    deterministic = False

    def batch(self, step: int, seed: int) -> Tensor:
        return torch.tensor(float(step), dtype=torch.float64)


def test_a_derivative_that_is_not_finite_is_located() -> None:
    """|gap|^1.5 has slope 0 and an infinite curvature at gap 0, which step 4 alone sees."""

    def spiked(x: Any, y: Any, b: Tensor) -> Tensor:
        gap = y["b"] - x
        return (gap.abs() ** 1.5 if int(b) == 4 else gap * gap) + (y["a"] - x).square()

    problem = Problem(upper=lambda x, y, b: y["a"] + y["b"], lower=spiked, lower_data=Steps(), hvp="double_backward")
    one = torch.ones((), dtype=torch.float64)
    oracles, x, y = open_oracles(problem, one, {"a": 0 * one, "b": one.clone()}, trains=True)
    training = Training(oracles, SGD(0.1), x)
    with pytest.raises(NonFinite, match=r"not finite from lower step 4 down, first in leaf 'b'"):
        visit(training, training.start(y), 9)


def test_chaotic_training_is_told() -> None:
    """The logistic map as steps of gradient descent: errors double at every step."""
    problem = Problem(
        upper=lambda x, y, b: y,
        lower=lambda x, y, b: (1 - x) * y**2 / 2 + x * y**3 / 3,  # y - 1 dg/dy = x y (1 - y)
    )
    x, y0 = torch.tensor(4.0, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    with pytest.warns(Chaotic, match="-fold on its way through 40 lower steps"):
        found = metagradient(problem, x, y0, lower=SGD(1.0), steps=40)
    assert found.certificate.growth is not None
    assert float(found.certificate.growth) > 1e6
    assert "cotangent growth" in str(found.certificate)
    y, slope = 0.3, 0.0
    for _ in range(40):
        y, slope = 4 * y * (1 - y), y * (1 - y) + 4 * (1 - 2 * y) * slope
    torch.testing.assert_close(float(found.gradient), slope, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 0}, "steps"),
        ({"truncate": 0}, "truncate"),
        ({"microbatches": 0}, "microbatches"),
        ({"lower": bilevel.LBFGS()}, "must be an Optimizer"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidProblem, match=text):
        Unrolled(**options)


def test_what_training_steps_would_ignore_is_refused() -> None:
    parts: list[dict[str, Any]] = [
        {"lower_set": bilevel.NonNegative()}, {"constraint": lambda x, y, b: y}, {"regularizer": bilevel.L1(0.1)},
    ]  # fmt: skip
    for part in parts:
        problem = Problem(upper=lambda x, y, b: y.sum(), lower=lambda x, y, b: (y - x).square().sum(), **part)
        with pytest.raises(InvalidProblem, match="does not handle"):
            metagradient(problem, torch.ones(2), torch.ones(2), lower=SGD(0.1))


def test_a_killed_visit_resumes_from_its_files(tmp_path: Any) -> None:
    """The states of a real training on disk: what an interrupt leaves behind is used, and gives the same bits."""
    oracles, x, y = opened(PROBLEM, upper_variables(16))
    lower = SGD(scheduled(0.05), 0.9)
    expected = visit(Training(oracles, lower, x), TrainingState(y, lower.init(y)), 16)

    class Stopping(Training):
        def linearize(self, step: int, state: TrainingState) -> Any:
            if step == 5:
                raise KeyboardInterrupt
            return super().linearize(step, state)

    with pytest.raises(KeyboardInterrupt):
        visit(Stopping(oracles, lower, x), TrainingState(y, lower.init(y)), 16, store=Disk(tmp_path))
    spent = oracles.counts
    found = visit(Training(oracles, lower, x), TrainingState(y, lower.init(y)), 16, store=Disk(tmp_path))
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.initial.y, expected.initial.y)
    assert torch.equal(found.upper.value, expected.upper.value)
    assert (oracles.counts - spent).hvps <= 8


def test_float32_keeps_its_dtype() -> None:
    problem = Problem(upper=lambda x, y, b: (y - 1).square().sum(), lower=lambda x, y, b: (y - x).square().sum())
    found = metagradient(problem, torch.ones(2), torch.zeros(2), lower=Adam(0.1), steps=5)
    assert found.gradient.dtype == torch.float32
