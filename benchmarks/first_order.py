"""What one step of a first-order solver costs, beside the gradients that it makes, taken in plain torch.

    python -m benchmarks.first_order --json FILE [--quick] [--compiled]

Rows: task, method, ratio, gradients, hvps, seconds. Plain torch takes the same derivatives of the same objectives on
the same batches, at two points in turn as y and z are, leaf by leaf and with nothing else: no updates, no metrics, no
random state to keep, no counts. So a ratio of 1 cannot be reached. "F2SA by hand" is what an expert's whole step costs
beside the same gradients. With `--compiled` (it needs a C++ compiler, and half a minute or more for each) there is a
second row of every first-order method, its step compiled as one graph; plain torch is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import compare
from benchmarks.tasks import Leaves, digits, network
from bilevel import Full, Problem, Solver, solvers
from bilevel.dry_run import open_oracles
from bilevel.oracles import Oracles
from bilevel.report import Row, table, write_json

COLUMNS = ("task", "method", "ratio", "gradients", "hvps", "seconds")
PAIRS = 60
WEIGHTS = 4000
LR, MOMENTUM, PENALTY = 1e-4, 0.9, 10.0

SOLVERS: dict[str, Solver[Any]] = {
    "F2SA": solvers.F2SA(),
    "F3SA": solvers.F3SA(),
    "F2BA": solvers.F2BA(),
    "ProxF2SA": solvers.ProxF2SA(),
    "VPBGD": solvers.VPBGD(),
    "BOME": solvers.BOME(),
    "MEHA": solvers.MEHA(),
    "LVHBA": solvers.LVHBA(),
    "BAMM": solvers.BAMM(measure_every=0),
    "GPBGD": solvers.GPBGD(measure_every=0),
}
HAND = "F2SA by hand"


class Call(NamedTuple):
    """A derivative by the name of the oracle that gives it, and at which of two points it is taken."""

    kind: str
    at: int = 0


RECORDED = ("upper_gradient", "lower_gradient", "lower_gradients", "upper_value")
SECOND = {
    "BAMM": [Call("upper_gradient"), Call("aggregated"), Call("hvp"), Call("cross")],
    "GPBGD": [Call("upper_gradient"), Call("linearize"), Call("cross"), Call("hvp")],
}
"""What steps with second derivatives take; of all others it is recorded."""


class Work(NamedTuple):
    """A problem with its start, as the library and as plain torch see it; f does not depend on x.

    Args:
        name: for the rows.
        problem: whose objectives and batches plain torch uses too.
        x: start.
        y: start.
    """

    name: str
    problem: Problem
    x: Any
    y: Leaves


def decays(batch: int, *, quick: bool) -> Work:
    """784-300-10 with a log decay for each of 238,510 weights, near a minimum; 128 digits above."""
    task = network(batch, quick=quick)
    return Work(f"decays, batch {batch}", task.generic(), task.x, task.y)


def weights(batch: int, *, quick: bool) -> Work:
    """784-300-10 with a weight for each of 4,000 training digits, as in data cleaning; the same batch size above."""
    images, labels = digits(quick)
    net = network(batch, quick=quick)

    def lower(x: Tensor, y: Leaves, b: Any) -> Tensor:
        return (x[b[2]].sigmoid() * F.cross_entropy(net.logits(y, b[0]), b[1], reduction="none")).mean()

    problem = Problem(
        upper=lambda x, y, b: net.loss(y, b),
        lower=lower,
        upper_data=Full((images[-batch:], labels[-batch:])),
        lower_data=Full((images[:batch], labels[:batch], torch.arange(batch))),
    )
    return Work(f"weights, batch {batch}", problem, torch.zeros(WEIGHTS), net.y)


class Plain:
    """Derivatives in plain torch at two points; each method is named like an oracle."""

    def __init__(self, work: Work) -> None:
        self.x, self.f, self.g = work.x, work.problem.upper, work.problem.lower
        self.points = [{name: leaf.clone() for name, leaf in work.y.items()} for _ in range(2)]
        self.batches = [data.batch(0, 0) for data in (work.problem.upper_data, work.problem.lower_data) if data]

    def run(self, calls: Sequence[Call]) -> None:
        """Take one derivative after the other."""
        for call in calls:
            getattr(self, call.kind)(call.at)

    def upper_gradient(self, at: int) -> Sequence[Tensor]:
        """Differentiate f in y."""
        return self._gradient(self.f, self.batches[0], at, in_x=False)

    def lower_gradient(self, at: int) -> Sequence[Tensor]:
        """Differentiate g in y."""
        return self._gradient(self.g, self.batches[1], at, in_x=False)

    def lower_gradients(self, at: int) -> Sequence[Tensor]:
        """Differentiate g in x and y."""
        return self._gradient(self.g, self.batches[1], at, in_x=True)

    def upper_value(self, at: int) -> Tensor:
        """Evaluate f."""
        with torch.no_grad():
            value: Tensor = self.f(self.x, self.points[at], self.batches[0])
        return value

    def linearize(self, at: int) -> None:
        """Build the graph of dg/dy."""
        self._graph(lambda x, y: self.g(x, y, self.batches[1]), at)

    def aggregated(self, at: int) -> None:
        """Build the graph of the gradient of an average of f and g."""
        self._graph(lambda x, y: 0.3 * self.f(x, y, self.batches[0]) + 0.7 * self.g(x, y, self.batches[1]), at)

    def hvp(self, at: int) -> Sequence[Tensor]:
        """Multiply by the Hessian in y."""
        return torch.autograd.grad(self.outputs, self.ys, _leaves(self.points[at]), retain_graph=True)

    def cross(self, at: int) -> Sequence[Tensor]:
        """Multiply by the cross derivative."""
        return torch.autograd.grad(self.outputs, self.xs, _leaves(self.points[at]), retain_graph=True)

    def _graph(self, value: Callable[[Any, Any], Tensor], at: int) -> None:
        (x, self.xs), (y, self.ys) = _variables(self.x, True), _variables(self.points[at], True)
        self.outputs = torch.autograd.grad(value(x, y), self.ys, create_graph=True)

    def _gradient(self, objective: Any, batch: Any, at: int, *, in_x: bool) -> Sequence[Tensor]:
        (x, xs), (y, ys) = _variables(self.x, in_x), _variables(self.points[at], True)
        return torch.autograd.grad(objective(x, y, batch), [*(xs if in_x else ()), *ys])


class Hand(Plain):
    """The whole step of F2SA as an expert writes it for one problem: leaves, in place, SGD on x, no diagnosis."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.lower_steps = solvers.F2SA().lower_steps
        self.velocities = [[torch.zeros_like(leaf) for leaf in work.y.values()] for _ in range(2)]
        self.moving = [leaf.clone() for leaf in _leaves(work.x)]

    @property
    def calls(self) -> list[Call]:
        """The derivatives of a step."""
        inside = [Call("lower_gradient", 0), Call("lower_gradient", 1), Call("upper_gradient", 1)]
        outside = [Call("upper_gradient", 1), Call("lower_gradients", 1), Call("lower_gradients", 0)]
        return inside * self.lower_steps + outside

    def step(self) -> None:
        """Take T steps of z and y with momentum, and one of x."""
        for _ in range(self.lower_steps):
            self._descend(0, self.lower_gradient(0))
            both = self.lower_gradient(1)
            torch._foreach_add_(both, self.upper_gradient(1), alpha=1 / PENALTY)
            self._descend(1, both)
        self.upper_gradient(1)
        count = len(self.moving)
        torch._foreach_add_(self.moving, self.lower_gradients(1)[:count], alpha=-LR * PENALTY)
        torch._foreach_add_(self.moving, self.lower_gradients(0)[:count], alpha=LR * PENALTY)

    def _descend(self, at: int, gradient: Sequence[Tensor]) -> None:
        velocity, point = self.velocities[at], _leaves(self.points[at])
        torch._foreach_mul_(velocity, MOMENTUM)
        torch._foreach_add_(velocity, gradient)
        torch._foreach_add_(gradient, velocity, alpha=MOMENTUM)
        torch._foreach_add_(point, gradient, alpha=-LR)


def _leaves(of: Any) -> list[Tensor]:
    return list(of.values()) if isinstance(of, dict) else [of]


def _variables(of: Any, required: bool) -> tuple[Any, list[Tensor]]:
    leaves = [leaf.detach().requires_grad_(required) for leaf in _leaves(of)]
    return (dict(zip(of, leaves, strict=True)) if isinstance(of, dict) else leaves[0]), leaves


def recorded(oracles: Oracles, step: Callable[[], Any]) -> list[Call]:
    """Return the derivatives that a step takes, in order; every new point is given the other place of two."""
    calls: list[Call] = []
    points: list[Tensor] = []

    def watch(kind: str) -> Callable[..., Any]:
        taken = getattr(oracles, kind)

        def call(x: Tensor, y: Tensor, *args: Any, **options: Any) -> Any:
            if not any(y is point for point in points):
                points.append(y)
            calls.append(Call(kind, next(i for i, point in enumerate(points) if point is y) % 2))
            return taken(x, y, *args, **options)

        return call

    for kind in RECORDED:
        setattr(oracles, kind, watch(kind))
    try:
        step()
    finally:
        for kind in RECORDED:
            delattr(oracles, kind)
    return calls


def cost(work: Work, name: str, pairs: int, *, backend: str | None = None) -> Row:
    """Return the row of one method on one task; its step compiled by a backend of `torch.compile`, if one is named."""
    if name == HAND:
        hand = Hand(work)
        step, calls, spent = hand.step, hand.calls, (len(hand.calls), 0)
    else:
        solver = SOLVERS[name]
        oracles, x, y = open_oracles(work.problem, work.x, work.y, needs_hvp=solver.needs_hvp)
        state, steps = solver.step(oracles, solver.init(oracles, x, y)), solver.step

        def step() -> None:
            steps(oracles, state)

        before = oracles.counts
        calls = SECOND.get(name) or recorded(oracles, step)
        if name in SECOND:
            step()
        change = oracles.counts - before
        spent = (change.gradients, change.hvps + change.crosses)
        if backend is not None:
            steps = torch.compile(solver.step, backend=backend, fullgraph=True)
    plain = Plain(work)
    timing = compare(step, lambda: plain.run(calls), pairs, torch.device("cpu"))
    method = name if backend is None else f"{name}, compiled"
    row: Row = {"task": work.name, "method": method, "ratio": timing.ratio, "gradients": spent[0], "hvps": spent[1]}
    return row | {"seconds": timing.seconds}


def measure(*, quick: bool = False, only: Sequence[str] = (*SOLVERS, HAND), backend: str | None = None) -> list[Row]:
    """Return all rows; with a backend a second one for each method that can be compiled."""
    rows, pairs = [], 2 if quick else PAIRS
    for make in (weights, decays):
        for batch in (16,) if quick else (128, 16):
            work = make(batch, quick=quick)
            for name in only:
                rows.append(cost(work, name, pairs))
                if backend is not None and name in SOLVERS and name not in SECOND:
                    torch._dynamo.reset()
                    with torch._dynamo.config.patch(trace_autograd_ops=True):
                        rows.append(cost(work, name, pairs, backend=backend))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="where to write the rows")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions: does it run?")
    parser.add_argument("--methods", nargs="*", choices=[*SOLVERS, HAND], default=[*SOLVERS, HAND], help="only these")
    parser.add_argument("--compiled", action="store_true", help="also with compiled steps")
    options = parser.parse_args(arguments)
    # One thread: the ratio of two programs must not depend on who else uses the other cores.
    torch.set_num_threads(1)
    rows = measure(quick=options.quick, only=options.methods, backend="inductor" if options.compiled else None)
    write_json(options.json, rows)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
