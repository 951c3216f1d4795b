"""What each example of a pool would do, had it entered one training step: the gradient for data selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.hypergradients._base import Certificate, Estimate
from bilevel.hypergradients._trained import Trained, TrainedState, rounding
from bilevel.hypergradients.unrolled import visit
from bilevel.layout import named_leaves, rebuild
from bilevel.linearization import gradients, join, leaves_of
from bilevel.oracles import Oracles, tensors_in
from bilevel.replay import Memory, Schedule, Sqrt, Store
from bilevel.status import InvalidProblem, Status
from bilevel.training import Training, TrainingState


@dataclass(frozen=True)
class PoolGradient(Trained):
    """Differentiate as if the whole pool entered one lower step, k steps before the end; x are weights of its examples.

        h = df/dx + d<dg/dy(x, y_k; pool), u> / dx,    u the cotangent of the lower gradient in that step

    The training itself runs on the problem's own batches at x; only the last k steps are visited. It is the derivative
    of f in weights that would be added to that one step, for examples that no batch may have shown.

    Args:
        lower: see `Unrolled`.
        steps: T, see `Unrolled`.
        restart: see `Unrolled`.
        fresh: see `Unrolled`.
        pool: a lower batch of all examples, such as `(images, labels, index)`.
        last: k, in [1, T].
        schedule: see `Unrolled`.
        store: see `Unrolled`.
        microbatches: parts of the pool, and of each batch, that are differentiated one by one.

    Raises:
        InvalidProblem: an option is out of range.

    Cost:
        T lower gradients; k products with the lower Hessian; one gradient of the pool with its cross derivative.

    References:
        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML training with metagradient descent", 2025, arXiv
        2503.13751, on data selection.
    """

    pool: Any = None
    last: int = 1
    schedule: Schedule = field(default_factory=Sqrt)
    store: Store = field(default_factory=Memory)
    microbatches: int = 1

    def __post_init__(self) -> None:
        self.check()
        if self.pool is None:
            raise InvalidProblem("PoolGradient(pool=...) needs a lower batch of all examples.")
        if not 1 <= self.last <= self.steps:
            raise InvalidProblem(f"PoolGradient(last=...) must be in [1, steps={self.steps}], got {self.last}.")
        if self.microbatches < 1:
            raise InvalidProblem(f"PoolGradient(microbatches=...) must be at least 1, got {self.microbatches}.")

    def training(self, oracles: Oracles, x: Tensor, first: int, state: TrainedState) -> Training:
        """Return the lower steps at x, the first on the lower batch `first`."""
        return replace(super().training(oracles, x, first, state), microbatches=self.microbatches)

    def estimate(
        self,
        oracles: Oracles,
        x: Tensor,
        y: Tensor,
        state: TrainedState,
        *,
        upper_step: int = 0,
        lower_step: int = 0,
        step_diagonal: Callable[[], Tensor] | None = None,
        certify: bool = False,
    ) -> tuple[Estimate, TrainedState]:
        """Return the gradient in the pool's weights, and the next state."""
        before = oracles.counts
        training, now, after = self.begin(oracles, x, y, state, upper_step, lower_step)
        for step in range(self.steps - self.last):
            now = training.advance(step, now)
        entered, at = now, self.steps - self.last
        now = training.advance(at, now)
        found = visit(
            training, now, self.last - 1, first=at + 1, upper_step=upper_step, schedule=self.schedule, store=self.store
        )
        u = training.cotangent_of_gradient(at, entered, found.initial)
        gradient = found.upper.x + self._through_pool(oracles, x, entered, u)
        lower_value, lower_gradient = oracles.lower_gradient(x, found.last.y, training.batch_after(self.steps))
        certificate = Certificate.unsolved(
            Status.CONVERGED,
            lower_gradient.norm(),
            oracles.counts - before,
            error_estimate=rounding(gradient, self.last) * found.growth.clamp_min(1.0),
            growth=found.growth,
        )
        estimate = Estimate(gradient, found.upper.value, lower_value, found.last.y, certificate)
        return estimate, after._replace(optimizer=found.last.optimizer)

    def _through_pool(self, oracles: Oracles, x: Tensor, state: TrainingState, u: Tensor) -> Tensor:
        lengths = {t.shape[0] for t in tensors_in(self.pool) if t.dim()}
        length = min(lengths)
        parts = min(self.microbatches, length)
        total = torch.zeros_like(x)
        for i in range(parts):
            rows = slice(i * length // parts, (i + 1) * length // parts)
            share = (rows.stop - rows.start) / length
            leaves = (t[rows] if isinstance(t, Tensor) and t.dim() else t for _, t in named_leaves(self.pool))
            batch = self.pool if parts == 1 else rebuild(self.pool, leaves)
            xs, ys = leaves_of(oracles.x_layout, x), leaves_of(oracles.y_layout, state.y)
            with torch.enable_grad():
                value = oracles.problem.lower(oracles.x_layout.nest(xs), oracles.y_layout.nest(ys), batch)
                slopes = gradients([value], ys, create_graph=True)
            kept = [(g, v) for g, v in zip(slopes, oracles.y_layout.views(u), strict=True) if g is not None]
            found = gradients([g for g, _ in kept], xs, [v for _, v in kept])
            total = total + share * join(oracles.x_layout, found, (), x)
        oracles.count(gradients=1, crosses=1)
        return total
