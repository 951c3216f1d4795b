"""Values and derivatives of a problem on flat vectors: the only caller of autograd, and it counts every call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bilevel.data import DataSource
from bilevel.declared import Declared
from bilevel.layout import Layout, named_leaves, rebuild
from bilevel.linearization import Leaves, SecondDerivatives, gradients, join, leaves_of, second_derivatives
from bilevel.problem import Problem
from bilevel.status import DataExhausted, IneffectiveHyperparameter, InvalidProblem

Level: TypeAlias = Literal["upper", "lower"]
Constraint: TypeAlias = Literal["constraint", "equality"]
Function: TypeAlias = Level | Constraint

IDLE = 100
"""Cross products in a row without a leaf of x before that is worth a word."""


class Counts(NamedTuple):
    """Calls made so far. A central-difference product counts as two gradients, any other as one HVP."""

    values: int = 0
    gradients: int = 0
    hvps: int = 0
    crosses: int = 0

    def __sub__(self, other: Counts) -> Counts:
        """Return what was spent since `other`."""
        return Counts(*(a - b for a, b in zip(self, other, strict=True)))


class UpperGradient(NamedTuple):
    """f and its partial gradients, detached: `value []`, `x [p]`, `y [d]` or `[m, d]`."""

    value: Tensor
    x: Tensor
    y: Tensor


class LowerGradient(NamedTuple):
    """g and its partial gradients, detached: `value []`, `x [p]`, `y [d]` or `[m, d]`."""

    value: Tensor
    x: Tensor
    y: Tensor


class ConstraintGradient(NamedTuple):
    """c and the gradients of `<multiplier, c>`, detached: `value [q]` (`[m, q]`), `x [p]`, `y [d]` or `[m, d]`."""

    value: Tensor
    x: Tensor
    y: Tensor


class Oracles:
    """Serve a solver with derivatives of one problem at flat points x `[p]` and y `[d]` (`[m, d]` with blocks).

    Each call names a `step`: it fixes the batch and the random state, so the same call gives the same answer. All
    results are detached. Open one with `bilevel.dry_run.open_oracles`, which also checks the problem.

    Args:
        problem: the statement.
        x_layout: layout of x.
        y_layout: layout of y.
        seed: of batches and of randomness inside the objectives.
        way: how the lower objective is differentiated twice; any `Problem.hvp` but "auto".
        chunk: how many HVPs one batched pass may carry.

    Attributes:
        counts: calls made so far.
        lower_leaves: indices of the leaves of x that the dry run found in the lower objective.
        random_levels: levels whose objective has drawn random numbers so far, in the dry run or since; only they are
            seeded.
    """

    def __init__(
        self, problem: Problem, x_layout: Layout, y_layout: Layout, *, seed: int = 0, way: str = "double_backward",
        chunk: int = 16,
    ) -> None:  # fmt: skip
        self.problem, self.x_layout, self.y_layout = problem, x_layout, y_layout
        self.seed, self.way, self.chunk = seed, way, chunk
        self.counts = Counts()
        self.lower_leaves: frozenset[int] = frozenset()
        self.random_levels: set[Level] = set()
        self._idle: dict[int, int] = {}

    def count(self, values: int = 0, gradients: int = 0, hvps: int = 0, crosses: int = 0) -> None:
        """Add to the counts."""
        old = self.counts
        self.counts = Counts(old[0] + values, old[1] + gradients, old[2] + hvps, old[3] + crosses)

    def watch(self, crosses: Sequence[Tensor | None]) -> None:
        """Warn once of a leaf of x that is one of `lower_leaves`, but that many cross products in a row lack."""
        for leaf in self.lower_leaves:
            self._idle[leaf] = self._idle.get(leaf, 0) + 1 if crosses[leaf] is None else 0
            if self._idle[leaf] == IDLE:
                self.lower_leaves -= {leaf}
                warnings.warn(
                    f"x's leaf '{self.x_layout.names[leaf]}' took no part in the lower objective for the last {IDLE} "
                    "products with its cross derivative, though the dry run found it there: check the lower data.",
                    IneffectiveHyperparameter,
                    stacklevel=2,
                )

    # -- projections ---------------------------------------------------------------------------------------------

    def project_x(self, x: Tensor) -> Tensor:
        """Project x on the upper set."""
        return self._projections[0](x)

    def project_y(self, y: Tensor) -> Tensor:
        """Project y on the lower set, block by block."""
        return self._projections[1](y)

    def project_jointly(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Project (x, y) on the problem's joint set, or on both levels' sets where it has none."""
        joint = self.problem.joint_set
        if joint is None:
            return self.project_x(x), self.project_y(y)
        x_near, y_near = joint(self.x_layout.unflatten(x), self.y_layout.unflatten(y))
        return self.x_layout.flatten(x_near), self.y_layout.flatten(y_near)

    @cached_property
    def _projections(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        upper_set, lower_set = self.problem.upper_set, self.problem.lower_set
        return (
            (lambda x: x) if upper_set is None else upper_set.bind(self.x_layout),
            (lambda y: y) if lower_set is None else lower_set.bind(self.y_layout),
        )

    # -- values and gradients ------------------------------------------------------------------------------------

    def upper_value(self, x: Tensor, y: Tensor, step: int = 0) -> Tensor:
        """Return f(x, y), 0-dim."""
        self.count(values=1)
        with torch.no_grad():
            return self._evaluate("upper", step, self.x_layout.views(x), self.y_layout.views(y)).detach()

    def upper_gradient(self, x: Tensor, y: Tensor, step: int = 0) -> UpperGradient:
        """Return f and its gradients in x and y, by one backward pass."""
        self.count(gradients=1)
        xs, ys = leaves_of(self.x_layout, x), leaves_of(self.y_layout, y)
        with torch.enable_grad():
            value = self._evaluate("upper", step, xs, ys)
            found = gradients([value], [*xs, *ys])
        in_x, in_y = found[: len(xs)], found[len(xs) :]
        return UpperGradient(value.detach(), join(self.x_layout, in_x, (), x), join(self.y_layout, in_y, (), y))

    def lower_value(self, x: Tensor, y: Tensor, step: int = 0) -> Tensor:
        """Return g(x, y) with its regularizer, summed over blocks, 0-dim."""
        self.count(values=1)
        with torch.no_grad():
            value = self._evaluate("lower", step, self.x_layout.views(x), self.y_layout.views(y))
        return value.detach() + self.declared(x).value(y)

    def lower_gradient(self, x: Tensor, y: Tensor, step: int = 0, *, declared: bool = True) -> tuple[Tensor, Tensor]:
        """Return g and its gradient in y; without its regularizer if not `declared`."""
        self.count(gradients=1)
        xs, ys = leaves_of(self.x_layout, x, requires_grad=False), leaves_of(self.y_layout, y)
        with torch.enable_grad():
            value = self._evaluate("lower", step, xs, ys)
            found = gradients([value], ys)
        gradient = join(self.y_layout, found, (), y)
        if not declared or self.problem.regularizer is None:
            return value.detach(), gradient
        term = self.declared(x)
        return value.detach() + term.value(y), term.add_gradient(gradient, y)

    def lower_gradients(self, x: Tensor, y: Tensor, step: int = 0, *, declared: bool = True) -> LowerGradient:
        """Return g and its gradients in x and y, by one backward pass; without its regularizer if not `declared`."""
        self.count(gradients=1)
        xs, ys = leaves_of(self.x_layout, x), leaves_of(self.y_layout, y)
        with torch.enable_grad():
            value = self._evaluate("lower", step, xs, ys)
            found = gradients([value], [*xs, *ys])
        in_x = join(self.x_layout, found[: len(xs)], (), x)
        in_y = join(self.y_layout, found[len(xs) :], (), y)
        if not declared or self.problem.regularizer is None:
            return LowerGradient(value.detach(), in_x, in_y)
        term = self.declared(x)
        total = value.detach() + term.value(y)
        return LowerGradient(total, in_x + term.gradient_x(y), term.add_gradient(in_y, y))

    def constraint(
        self, x: Tensor, y: Tensor, multiplier: Tensor | None = None, step: int = 0, *, name: Constraint = "constraint"
    ) -> ConstraintGradient:
        """Return c(x, y) and the gradients of `<multiplier, c>` (zeros without a multiplier); counts one gradient.

        The constraint, or with `name="equality"` the equality h, sees the lower batch of the step.
        """
        self.count(**({"values": 1} if multiplier is None else {"gradients": 1}))
        xs, ys = leaves_of(self.x_layout, x), leaves_of(self.y_layout, y)
        with torch.enable_grad():
            value = self.call(name, step, xs, ys)
            weights = torch.zeros_like(value) if multiplier is None else multiplier
            found = gradients([value], [*xs, *ys], [weights]) if multiplier is not None else [None] * len([*xs, *ys])
        in_x = join(self.x_layout, found[: len(xs)], (), x)
        return ConstraintGradient(value.detach(), in_x, join(self.y_layout, found[len(xs) :], (), y))

    def linearize_lower(self, x: Tensor, y: Tensor, step: int = 0) -> Linearization:
        """Differentiate g twice at (x, y): one graph for every HVP and the cross product that follow."""
        self.count(gradients=1)
        core = second_derivatives(self.way, self.lower_at(step), self.x_layout, self.y_layout, x, y)
        return Linearization(self, core, self.declared(x), x, y, step)

    def upper_at(self, step: int) -> Callable[[Leaves, Leaves], Tensor]:
        """Return the upper objective of one step as a function of leaves."""
        return lambda xs, ys: self._evaluate("upper", step, xs, ys)

    def lower_at(self, step: int, rows: slice | None = None) -> Callable[[Leaves, Leaves], Tensor]:
        """Return the traced lower objective of one step (on some rows of its batch) as a function of leaves."""
        return lambda xs, ys: self._evaluate("lower", step, xs, ys, rows)

    def sample_gradients(self, x: Tensor, y: Tensor, step: int, k: int) -> Tensor:
        """Return gradients `[k, d]` of the traced lower objective on the first k examples of the batch, one each.

        Raises:
            InvalidProblem: the batch is not made of tensors with a common leading dimension of at least k.
        """
        lengths = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors_in(self.batch("lower", step))}
        if len(lengths) != 1 or max(lengths) < k or self.problem.blocks is not None:
            raise InvalidProblem(
                f"{k} per-example gradients of the lower objective need batches whose tensors share a leading "
                f"dimension of at least that, and no blocks; found lengths {sorted(lengths)}. Use fewer, or another "
                "linear solver."
            )
        self.count(gradients=k)
        rows = []
        for i in range(k):
            xs, ys = leaves_of(self.x_layout, x, requires_grad=False), leaves_of(self.y_layout, y)
            with torch.enable_grad():
                value = self._evaluate("lower", step, xs, ys, rows=slice(i, i + 1))
                rows.append(join(self.y_layout, gradients([value], ys), (), y))
        return torch.stack(rows)

    def declared(self, x: Tensor) -> Declared:
        """Return the declared regularizer at x (a sum of nothing if there is none)."""
        return Declared(self.problem.regularizer, x, self.x_layout, self.y_layout)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def batch(self, level: Level, step: int) -> Any:
        """Return the batch of one step, None without a data source."""
        source: DataSource | None = getattr(self.problem, f"{level}_data")
        # Levels that share a data set must not share its permutations; those of one set of tasks see the same tasks.
        seed = self.seed if source is not None and source.held else self._seed(level)
        try:
            return None if source is None else source.batch(step, seed)
        except StopIteration as end:  # it would end a caller's loop without a word
            raise DataExhausted(f"the {level} data gave no batch for step {step}: its source ran out.") from end

    def _seed(self, *of: str | int) -> int:
        return hash((self.seed, *(part == "upper" if isinstance(part, str) else part for part in of))) & (2**63 - 1)

    def _evaluate(self, level: Level, step: int, xs: Leaves, ys: Leaves, rows: slice | None = None) -> Tensor:
        value = self.call(level, step, xs, ys, rows)
        if self.problem.blocks is None:
            return value
        # Blocks are independent below, so their sum gives every block its own gradient; above, F is their mean.
        return value.sum() if level == "lower" else value.mean()

    def call(self, name: Function, step: int, xs: Leaves, ys: Leaves, rows: slice | None = None) -> Tensor:
        """Return what the user's function returns (of each block, with blocks), with its graph; not counted.

        The constraint sees the batch and the random state of the lower objective.
        """
        level: Level = "upper" if name == "upper" else "lower"
        objective = getattr(self.problem, name)
        batch = self.batch(level, step)
        if rows is not None:
            cut = (leaf[rows] if isinstance(leaf, Tensor) else leaf for _, leaf in named_leaves(batch))
            batch = rebuild(batch, cut)
        x, device = self.x_layout.nest(xs), self.x_layout.device

        def run() -> Tensor:
            if self.problem.blocks is None:
                value: Tensor = objective(x, self.y_layout.nest(ys), batch)
                return value
            each: Tensor = torch.func.vmap(
                lambda y, b: objective(x, self.y_layout.nest(y), b),
                in_dims=(0, None if batch is None else 0),
                randomness="different",
            )(list(ys), batch)
            return each

        if level not in self.random_levels:
            # A compiled graph cannot look: an objective that the dry run saw draw breaks the graph below.
            value, drew = (run(), False) if torch.compiler.is_compiling() else watched(run, device)
            if not drew:
                return value
            self.random_levels.add(level)
        with random_state(self._seed(level, step), device):
            return run()


class Linearization:
    """H and J of the whole lower objective at one (x, y): traced part by graph, declared part by formula.

    Attributes:
        value: g, 0-dim.
        gradient: dg/dy, shaped like y.
        diagonal: the diagonal of the declared part of H, exact, shaped like y; None without a regularizer.
    """

    def __init__(
        self, oracles: Oracles, core: SecondDerivatives, declared: Declared, x: Tensor, y: Tensor, step: int
    ) -> None:
        self._oracles, self._core, self._declared, self._x, self._y, self._step = oracles, core, declared, x, y, step
        self.value = core.value + declared.value(y)
        self.gradient = declared.add_gradient(core.gradient, y)
        self.diagonal = declared.curvature(y)

    def hvp(self, v: Tensor) -> Tensor:
        """Return H v, shaped like y. One HVP."""
        self._count("hvps", 1)
        return self._with_declared(self._core.hvp(v), v)

    def hvps(self, vectors: Tensor) -> Tensor:
        """Return H applied to k vectors `[k, *]`, as many at a time as memory allows. k HVPs."""
        self._count("hvps", len(vectors))
        return self._with_declared(self._core.hvps(vectors, self._oracles.chunk), vectors)

    def _with_declared(self, product: Tensor, v: Tensor) -> Tensor:
        if self.diagonal is None:
            return product
        if self._declared.by_entry:
            return torch.addcmul(product, self.diagonal, v)
        return product + self._declared.hvp(self._y, v)

    def cross(self, v: Tensor) -> Tensor:
        """Return J^T v = d<dg/dy, v>/dx, `[p]`. About one HVP."""
        self._count("crosses", 1)
        traced, declared = self._core.cross(v), self._declared.cross(self._y, v)
        both = [b if a is None else a if b is None else a + b for a, b in zip(traced, declared, strict=True)]
        self._oracles.watch(both)
        return join(self._oracles.x_layout, both, (), self._x)

    def sample_gradients(self, k: int) -> Tensor:
        """Return k per-example gradients `[k, d]` of the traced part. k gradients."""
        return self._oracles.sample_gradients(self._x, self._y, self._step, k)

    def _count(self, kind: str, times: int) -> None:
        each = self._core.gradients_per_product
        self._oracles.count(**({"gradients": each * times} if each else {kind: times}))


@contextmanager
def random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Run with torch's random state seeded on the CPU and `device`, and put the user's back afterwards."""
    generators = _generators(device)
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def watched(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, bool]:
    """Return `run()` and whether it drew random numbers; if so the user's are put back. Cheaper than seeding."""
    generators, drew = _generators(device), False
    states = [generator.get_state() for generator in generators]
    try:
        value = run()
    finally:
        for generator, state in zip(generators, states, strict=True):
            if not torch.equal(generator.get_state(), state):
                drew = True
                generator.set_state(state)
    return value, drew


def _generators(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return [torch.default_generator]
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


def tensors_in(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, in order."""
    return [leaf for _, leaf in named_leaves(batch) if isinstance(leaf, Tensor)]
