"""Hypergradients through training in forward mode: exact for few upper variables, unbiased along random directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.data._seeding import mixed
from bilevel.hypergradients._base import Certificate, Estimate
from bilevel.hypergradients._trained import Trained, TrainedState, rounding
from bilevel.oracles import Oracles
from bilevel.status import InvalidProblem, Status
from bilevel.training import Tangent, tensors_of

LARGEST = 256
"""Upper variables up to which every direction is followed."""


@dataclass(frozen=True)
class ForwardMode(Trained):
    """Carry derivatives along with training: `Z' = A_t Z + B_t V` for directions V of x; nothing is stored or repeated.

    With all unit vectors as V, `h = df/dx + Z^T df/dy` is the exact gradient of the training run. With k random
    directions `v ~ N(0, I)`, `h = df/dx + mean_k (df/dy . Z v) v` is unbiased, with a variance of (p + 1) / k times
    its squared length.

    Args:
        lower: see `Unrolled`.
        steps: see `Unrolled`.
        restart: see `Unrolled`; without restarts the derivative of the last start is forgotten, unless `carry`.
        fresh: see `Unrolled`.
        directions: k random directions, drawn anew for each upper step; None follows each entry of x, at most 256.
        carry: go on with the derivatives Z of the last training, as training itself goes on: real-time hyperparameter
            optimization. h then sees the effect of x on the whole past, though Z was in part formed at older x, whose
            distance from the present one biases it. Needs `restart=False`, and no `directions`.

    Raises:
        InvalidProblem: an option is out of range, or x is too long to follow each entry.

    Cost:
        Memory: k copies of the state (p of them without `directions`), whatever the number of steps. Time: one
        product with the lower Hessian a step and direction.

    References:
        Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based hyperparameter optimization", ICML
        2017 (Algorithm 2, and its real-time form for `carry`). Silver et al., "Learning by directional gradient
        descent", ICLR 2022, for random directions.

    Example:
        >>> import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, batch: y, lower=lambda x, y, batch: 0.5 * (y - x).square())
        >>> estimator = ForwardMode(lower=bilevel.SGD(0.5), steps=2)
        >>> float(bilevel.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), estimator=estimator).gradient)
        0.75
    """

    directions: int | None = None
    carry: bool = False

    def __post_init__(self) -> None:
        self.check()
        if self.carry and (self.restart is not False or self.directions is not None):
            raise InvalidProblem(
                "ForwardMode(carry=True) goes on with the derivatives of the last training: it needs restart=False, "
                "and directions=None, as random ones are drawn anew each time."
            )
        if self.directions is not None and self.directions < 1:
            raise InvalidProblem(f"ForwardMode(directions=...) must be at least 1 or None, got {self.directions}.")

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> TrainedState:
        """Return the state before the first training."""
        if self.directions is None and len(x) > LARGEST:
            raise InvalidProblem(
                f"ForwardMode follows each of {len(x)} entries of x, at the price of as many states; use Unrolled, or "
                "ForwardMode(directions=...)."
            )
        return super().init(oracles, x, y)

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
        """Return the hypergradient after training from y (or from the start), and the next state."""
        before = oracles.counts
        training, now, after = self.begin(oracles, x, y, state, upper_step, lower_step)
        directions = self._directions(oracles, x, upper_step)
        tangents = list(state.memory) if self.carry and state.memory is not None else []
        for v in directions[len(tangents) :]:
            zeros = tuple(torch.zeros_like(t) for t in tensors_of(now.optimizer))
            tangents.append(Tangent(self.start_along(oracles, x, y, v), zeros, v))
        for step in range(self.steps):
            now, tangents = training.push(step, now, tangents)
        upper = oracles.upper_gradient(x, now.y, upper_step)
        slopes = torch.stack([(upper.y * t.y).sum() for t in tangents])
        through: Tensor = slopes @ directions
        error = None if self.carry else rounding(upper.x + through, self.steps)
        if self.directions is not None:
            through = through / self.directions
            # The mean squared slope estimates the squared length of what is estimated.
            error = ((len(x) + 1) / self.directions * slopes.square().mean()).sqrt()
        gradient = upper.x + through
        lower_value, lower_gradient = oracles.lower_gradient(x, now.y, training.batch_after(self.steps))
        certificate = Certificate.unsolved(
            Status.CONVERGED if self.directions is None and not self.carry else Status.APPROXIMATE,
            lower_gradient.norm(),
            oracles.counts - before,
            error_estimate=error,
        )
        estimate = Estimate(gradient, upper.value, lower_value, now.y, certificate)
        return estimate, after._replace(optimizer=now.optimizer, memory=tuple(tangents) if self.carry else None)

    def _directions(self, oracles: Oracles, x: Tensor, upper_step: int) -> Tensor:
        """Return directions `[k, p]`."""
        if self.directions is None:
            return torch.eye(len(x), dtype=x.dtype, device=x.device)
        generator = torch.Generator().manual_seed(mixed("directions", oracles.seed, upper_step))
        return torch.randn(self.directions, len(x), generator=generator, dtype=x.dtype).to(x.device)

    def start_along(self, oracles: Oracles, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Return the derivative of the start of training along v."""
        if not self.through_start(oracles):
            return torch.zeros_like(y)
        assert oracles.problem.lower_init is not None
        init, layout = oracles.problem.lower_init, oracles.x_layout

        def start(*xs: Tensor) -> tuple[Tensor, ...]:
            return tuple(oracles.y_layout.leaves(init(layout.nest(xs))))

        xs = tuple(leaf.detach() for leaf in layout.views(x))
        along = tuple(layout.views(v))
        moved = torch.autograd.functional.jvp(start, xs, along)[1]
        return oracles.y_layout.concat(moved)
