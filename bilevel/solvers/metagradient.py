"""Metagradient descent: train anew, differentiate the run, step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from bilevel.hypergradients._base import Estimate
from bilevel.hypergradients.selection import PoolGradient
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.optimizers import SGD, Adam, Optimizer
from bilevel.oracles import Oracles
from bilevel.replay import Memory, Schedule, Sqrt, Store
from bilevel.solvers._base import Metrics, Solver, check_upper, moved_x


class MetagradientState(NamedTuple):
    """Where the descent stands.

    Args:
        x: upper variables `[p]`.
        y: weights that the last training ended in.
        step: upper steps made.
        upper: state of the upper optimizer.
        estimator: state of the estimator: the start of every training.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    upper: Any
    estimator: Any
    metrics: Metrics | None


@dataclass(frozen=True)
class Metagradient(Solver[MetagradientState]):
    """Minimize `F(x) = f(x, y_T(x))`: y_T is what T lower steps make of the same start, on the same batches each time.

        y_T = T lower steps at x;   h = dF/dx, exact, through all of them;   x = P(upper step along h)

    y need not be near a minimum, and x may act through the lower objective, the optimizer or the start of training.

    Args:
        upper: optimizer of x: `Adam`, `Sign` (the paper's choice), `L1Normalized`, or `CountSteps` for data selection.
        lower: optimizer of y; `SGD(lr=None)` measures its step at the start.
        lower_steps: T.
        fresh: give each training the next T lower batches. If not, all trainings see the first T, so that F is one
            function, and x may come to fit the order of the batches.
        truncate: differentiate through the last so many steps only.
        pool: all training data as one lower batch, for data selection: the gradient is taken as if the weighted pool
            entered one lower step, `truncate` steps before the end, so that examples count that no batch showed.
        schedule: which states to hold; `Sqrt()` by default.
        store: where to hold them.
        microbatches: parts of each batch that are differentiated one by one.

    Raises:
        InvalidProblem: an option is out of range.

    Cost:
        Per step: T lower gradients, T products with the lower Hessian (`truncate` of them with it), and what the
        schedule repeats.

    References:
        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML training with metagradient descent", 2025, arXiv
        2503.13751.

    Example:
        >>> import bilevel, torch
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, batch: y.square(), lower=lambda x, y, batch: 0.5 * y.square())
        >>> sgd = bilevel.SGD(lambda x, step: x)  # learn the rate: the best one is 1
        >>> solver = Metagradient(lower=sgd, lower_steps=3)
        >>> solution = bilevel.solve(problem, solver, torch.tensor(0.5), torch.tensor(2.0), steps=100)
        >>> float(solution.best_value) < 1e-3
        True
    """

    needs_hvp: ClassVar[bool] = True

    upper: Optimizer[Any] = field(default_factory=lambda: Adam(lr=0.1))
    lower: Optimizer[Any] = field(default_factory=lambda: SGD(lr=None))
    lower_steps: int = 50
    fresh: bool = False
    truncate: int | None = None
    pool: Any = None
    schedule: Schedule = field(default_factory=Sqrt)
    store: Store = field(default_factory=Memory)
    microbatches: int = 1

    def __post_init__(self) -> None:
        check_upper(self.upper)
        _ = self.estimator  # which checks the rest

    @property
    def replays(self) -> bool:
        """Whether it differentiates through training steps: yes."""
        return True

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> MetagradientState:
        """Return the state before the first training; every training starts from y, or from `lower_init(x)`."""
        self.refuse(oracles.problem)
        estimator = self.estimator.init(oracles, x, y)
        return MetagradientState(x, y, 0, self.upper.init(x), estimator, None)

    def step(self, oracles: Oracles, state: MetagradientState) -> MetagradientState:
        """Return the state after one training and one upper step.

        Raises:
            NonFinite: a derivative is not finite.
            ReplayMismatch: a lower step run again gave another state.
        """
        estimate, estimator = self._estimate(oracles, state, certify=False)
        x, upper = moved_x(oracles, self.upper, state.x, estimate.gradient, state.upper)
        metrics = Metrics.of(oracles, state.x, estimate)
        return MetagradientState(x, estimate.y, state.step + 1, upper, estimator, metrics)

    def certify(self, oracles: Oracles, state: MetagradientState) -> Estimate:
        """Return the certified metagradient at the state's x."""
        return self._estimate(oracles, state, certify=True)[0]

    def backtracked(self, factor: float) -> Metagradient:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper=self.upper.scaled(factor))

    def _estimate(self, oracles: Oracles, state: MetagradientState, *, certify: bool) -> tuple[Estimate, Any]:
        return self.estimator.estimate(
            oracles, state.x, state.y, state.estimator, upper_step=state.step, certify=certify
        )

    @property
    def estimator(self) -> Unrolled | PoolGradient:
        """The estimator of its metagradients."""
        common: dict[str, Any] = {
            "lower": self.lower, "steps": self.lower_steps, "restart": True, "fresh": self.fresh,
            "schedule": self.schedule, "store": self.store, "microbatches": self.microbatches,
        }  # fmt: skip
        if self.pool is None:
            return Unrolled(truncate=self.truncate, **common)
        return PoolGradient(pool=self.pool, last=1 if self.truncate is None else self.truncate, **common)
