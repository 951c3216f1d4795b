"""Write a solver of your own in one file: it runs by `bilevel.solve`, and beside the others in `compare`."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bilevel
from bilevel.compare import compare
from bilevel.report import table


class OneLoopState(NamedTuple):
    """Where the method stands. Any NamedTuple of tensors and numbers with x, y, step and metrics will do."""

    x: Tensor
    y: Tensor
    w: Tensor
    upper: Any
    step: int
    metrics: bilevel.Metrics | None


@dataclass(frozen=True)
class OneLoop(bilevel.Solver[OneLoopState]):
    """Make one step each on y, on the linear system `H w = df/dy`, and on x.

    Args:
        upper: optimizer of x.
        lower_lr: of y and of w, below 2 / (largest curvature of the lower objective).
    """

    upper: bilevel.Optimizer = field(default_factory=lambda: bilevel.Adam(lr=0.02))
    lower_lr: float = 0.1

    def init(self, oracles: bilevel.Oracles, x: Tensor, y: Tensor) -> OneLoopState:
        """Return the state before the first step; what this method cannot treat is refused here."""
        self.refuse(oracles.problem)
        return OneLoopState(x, y, torch.zeros_like(y), self.upper.init(x), 0, None)

    def step(self, oracles: bilevel.Oracles, state: OneLoopState) -> OneLoopState:
        """Return the state after one step. Vectors are flat; the oracles give derivatives, and count them."""
        x, y, w = state.x, state.y, state.w
        lower = oracles.linearize_lower(x, y, state.step)
        upper = oracles.upper_gradient(x, y, state.step)
        residual = lower.hvp(w) - upper.y
        hypergradient = upper.x - lower.cross(w)
        moved, memory = self.upper.update(x, hypergradient, state.upper, oracles.x_layout.unflatten(x))
        unsolved = [hypergradient, lower.gradient, residual]
        return OneLoopState(
            x=oracles.project_x(moved),
            y=y - self.lower_lr * lower.gradient,
            w=w - self.lower_lr * residual,
            upper=memory,
            step=state.step + 1,
            metrics=bilevel.Metrics.unsolved(upper.value, lower.value, lower.gradient, unsolved),
        )

    def backtracked(self, factor: float) -> "OneLoop":
        """Return this solver with upper steps `factor` times as long: the loop asks for it where a step ran away."""
        return replace(self, upper=self.upper.scaled(factor))


task = bilevel.problems.scalar()
solution = bilevel.solve(task.problem, OneLoop(), task.x0, task.y0, steps=400)
print(solution)

# The same start, counted alike: yours is a row beside the published ones.
rows = compare(
    lambda seed: bilevel.problems.scalar(),
    {"mine": OneLoop(), "implicit": bilevel.implicit(), "F2SA": bilevel.F2SA()},
    steps=400,
)
print(table(rows, ["solver", "x_error", "upper_value", "gradients", "hvps", "crosses", "status"]))
assert rows[0]["x_error"] < 0.05
