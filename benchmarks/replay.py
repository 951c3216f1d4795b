"""What the gradient of a training run costs, in time and memory, beside one autograd graph written in plain torch.

    python -m benchmarks.replay --json FILE [--quick] [--long]

784-300-10 with tanh, SGD with momentum, batches of 100 of 5,000 digits; gradients in 5,000 example weights, in the rate
and in the initial weights. `ratio` is to plain torch's graph of all steps, `plain_steps` to as many steps of training
without any derivative. `--long` adds 10,000 steps, which no graph of all steps could hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import added_mb, compare, seconds
from benchmarks.tasks import digits
from bilevel import SGD, Full, Problem, Shuffled
from bilevel.dry_run import open_oracles
from bilevel.hypergradients import Unrolled
from bilevel.hypergradients.unrolled import Visit, visit
from bilevel.oracles import Oracles
from bilevel.replay import Binomial, KAry, Schedule, Sqrt, StoreAll
from bilevel.report import Row, table, write_json
from bilevel.training import Training

COLUMNS = ("schedule", "steps", "ratio", "plain_steps", "added_mb", "peak_states", "recomputed", "error", "seconds")
RATE, MOMENTUM = 0.02, 0.9
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """A training run: data, starts, and the number of steps."""

    images: Tensor
    labels: Tensor
    data: Shuffled
    y0: dict[str, Tensor]
    steps: int

    @property
    def x0(self) -> dict[str, Tensor]:
        """Log weights of the examples, and the log of the rate over `RATE`."""
        return {"weights": torch.zeros(len(self.labels)), "rate": torch.zeros(())}

    def loss(self, y: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each example."""
        inside = F.linear(images, y["first"], y["first bias"]).tanh()
        return F.cross_entropy(F.linear(inside, y["last"], y["last bias"]), labels, reduction="none")

    @property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """The first examples, in place of a validation set."""
        return self.images[:500], self.labels[:500]

    def problem(self) -> Problem:
        """Return the run as a problem."""

        def lower(x: Any, y: Any, batch: Any) -> Tensor:
            images, labels, index = batch
            return (x["weights"][index].exp() * self.loss(y, images, labels)).mean()

        def upper(x: Any, y: Any, batch: Any) -> Tensor:
            return self.loss(y, *batch).mean()

        return Problem(upper=upper, lower=lower, upper_data=Full(self.held_out), lower_data=self.data)

    def optimizer(self) -> SGD:
        """Return the lower optimizer, whose rate is learned."""
        return SGD(lambda x, step: RATE * x["rate"].exp(), MOMENTUM)


def run_of(steps: int, *, quick: bool = False) -> Run:
    """Return a run of so many steps."""
    images, labels = digits(quick)
    hidden, pixels = 30 if quick else 300, images.shape[1]
    generator = torch.Generator().manual_seed(2)
    y0 = {
        "first": torch.randn(hidden, pixels, generator=generator) / pixels**0.5,
        "first bias": torch.zeros(hidden),
        "last": torch.randn(10, hidden, generator=generator) / hidden**0.5,
        "last bias": torch.zeros(10),
    }
    return Run(images, labels, Shuffled((images, labels), batch_size=100, with_index=True), y0, steps)


def one_graph(run: Run, batch: Callable[[int], Any]) -> list[Tensor]:
    """Differentiate the run as plain torch does it: one graph of all steps, leaf by leaf. Returns weights, rate, y0."""
    weights, rate = (leaf.requires_grad_() for leaf in run.x0.values())
    start = [leaf.clone().requires_grad_() for leaf in run.y0.values()]
    leaves, buffers = start, [torch.zeros(())] * len(start)
    lr = RATE * rate.exp()
    for step in range(run.steps):
        images, labels, index = batch(step)
        loss = (weights[index].exp() * run.loss(dict(zip(run.y0, leaves, strict=True)), images, labels)).mean()
        slopes = torch.autograd.grad(loss, leaves, create_graph=True)
        buffers = [g if step == 0 else MOMENTUM * b + g for g, b in zip(slopes, buffers, strict=True)]
        leaves = [p - lr * b for p, b in zip(leaves, buffers, strict=True)]
    value = run.loss(dict(zip(run.y0, leaves, strict=True)), *run.held_out).mean()
    return list(torch.autograd.grad(value, [weights, rate, *start]))


def train(run: Run, batch: Callable[[int], Any]) -> None:
    """Train without any derivative, in place."""
    weights = run.x0["weights"]
    leaves = [leaf.clone().requires_grad_() for leaf in run.y0.values()]
    optimizer = torch.optim.SGD(leaves, RATE, MOMENTUM)
    for step in range(run.steps):
        images, labels, index = batch(step)
        optimizer.zero_grad()
        loss = (weights[index].exp() * run.loss(dict(zip(run.y0, leaves, strict=True)), images, labels)).mean()
        loss.backward()
        optimizer.step()


def schedules(steps: int) -> dict[str, Schedule]:
    """Return the schedules of the table; the last two hold as many states."""
    k = 2 if steps < 50 else 4
    return {"store-all": StoreAll(), "sqrt": Sqrt(), "k-ary": KAry(k), "binomial": Binomial(KAry(k).peak(steps))}


def ours(oracles: Oracles, run: Run, schedule: Schedule, x: Tensor, y: Tensor) -> Callable[[], list[Tensor]]:
    """Return a function that differentiates the run by a schedule; it returns weights and rate."""
    estimator = Unrolled(lower=run.optimizer(), steps=run.steps, restart=True, schedule=schedule)
    state = estimator.init(oracles, x, y)

    def work() -> list[Tensor]:
        estimate, _ = estimator.estimate(oracles, x, y, state)
        return oracles.x_layout.views(estimate.gradient)

    return work


def visited(oracles: Oracles, run: Run, schedule: Schedule, x: Tensor, y: Tensor) -> Any:
    """Return what a visit takes."""
    training = Training(oracles, run.optimizer(), x)
    return visit(training, training.start(y), run.steps, schedule=schedule).visited


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the relative distance of two lists of tensors."""
    pairs = list(zip(found, expected, strict=True))
    apart = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return (apart / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


def measure(steps: int, pairs: int, *, quick: bool = False) -> list[Row]:
    """Return the rows of all schedules, and that of plain torch."""
    run = run_of(steps, quick=quick)
    oracles, x, y = open_oracles(run.problem(), run.x0, run.y0, trains=True)

    def batch(step: int) -> Any:
        return oracles.batch("lower", step)

    def plain() -> list[Tensor]:
        return one_graph(run, batch)

    expected = plain()[:2]
    bare = compare(lambda: train(run, batch), plain, pairs, CPU).ratio
    rows: list[Row] = [
        {
            "schedule": "plain torch", "steps": steps, "ratio": 1.0, "plain_steps": 1 / bare,
            "added_mb": added_mb(plain, CPU), "peak_states": steps, "recomputed": 0, "error": 0.0,
        }
    ]  # fmt: skip
    for name, schedule in schedules(steps).items():
        work = ours(oracles, run, schedule, x, y)
        timing, took = compare(work, plain, pairs, CPU), visited(oracles, run, schedule, x, y)
        rows.append(
            {
                "schedule": name, "steps": steps, "ratio": timing.ratio, "plain_steps": timing.ratio / bare,
                "added_mb": added_mb(work, CPU), "peak_states": took.peak_states, "recomputed": took.advances,
                "error": distance(work(), expected), "seconds": timing.seconds,
            }
        )  # fmt: skip
    return rows


def measure_long(steps: int, *, quick: bool = False) -> list[Row]:
    """Return rows of a run that no graph could hold; the error is the distance to the first row."""
    run = run_of(steps, quick=quick)
    oracles, x, y = open_oracles(run.problem(), run.x0, run.y0, trains=True)
    bare = seconds(lambda: train(run, lambda step: oracles.batch("lower", step)), CPU)
    training = Training(oracles, run.optimizer(), x)
    rows: list[Row] = []
    first: list[Tensor] = []
    for name, schedule in {"sqrt": Sqrt(), "binomial": Binomial(60)}.items():
        found: list[Visit] = []
        spent = seconds(
            lambda schedule=schedule, found=found: found.append(
                visit(training, training.start(y), steps, schedule=schedule)
            ),
            CPU,
        )
        gradient, took = oracles.x_layout.views(found[0].x), found[0].visited
        first = first or gradient
        rows.append(
            {
                "schedule": name, "steps": steps, "plain_steps": spent / bare, "peak_states": took.peak_states,
                "recomputed": took.advances, "error": distance(gradient, first), "seconds": spent,
            }
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="where to write the rows")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions: does it run?")
    parser.add_argument("--long", action="store_true", help="10,000 steps, too: some ten minutes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = measure(16 if options.quick else 100, 1 if options.quick else 7, quick=options.quick)
    if options.long:
        rows += measure_long(200 if options.quick else 10_000, quick=options.quick)
    write_json(options.json, rows)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
