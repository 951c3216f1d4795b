"""Accelerated proximal gradients: minimize a smooth function plus one with a prox, with exact zeros."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from bilevel.optimizers._base import Minimum
from bilevel.optimizers._hyperparameters import check_count, is_number
from bilevel.optimizers.lbfgs import Objective
from bilevel.status import InvalidProblem, Status

Prox: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(v, step) -> `argmin_y r(y) + ‖y - v‖² / (2 step)`, step a 0-dim tensor."""

PROBES = 4
NOISE = 8.0


@final
@dataclass(frozen=True)
class ProximalGradient:
    """FISTA with a measured step, backtracking and restarts, for `s(y) + r(y)`: s smooth and convex, r with a prox.

        y+ = prox_{a r}(z - a ds/dy(z));   z+ = y+ + (t - 1) / t+ (y+ - y),   t+ = (1 + sqrt(1 + 4 t²)) / 2

    t starts again at 1 where the steps point uphill, `<z - y+, y+ - y> > 0`. The step a is at most 1 / (largest ratio
    of a change of the gradient to a change of z): a first value comes from power iterations on differences, and
    wherever a larger ratio shows up the step shrinks and t starts again.

    It has converged where `‖z - y+‖ / a <= tol`; y+ is returned, so its zeros (and other kinks and bounds) are exact,
    and its own residual is not larger. A run ends STALLED where rounding keeps the residual above `tol`, or where it
    has not fallen by a tenth in `patience` steps. Rows of `[m, d]` are one point: their values are added. Not meant to
    be differentiated through.

    Args:
        max_steps: >= 0.
        tol: > 0, in units of the gradient.
        step: the first a, > 0; None measures it at each start.
        patience: >= 1.

    Raises:
        InvalidProblem: an option is out of its range.

    Cost:
        One gradient and one prox a step, `PROBES` + 1 gradients to measure the first; about 8 vectors of memory.

    Notes:
        Linear convergence where s + r is strongly convex, or once the support is found and s is so on it. `value` of
        the result is s (without r) where it was last evaluated.

    References:
        Beck and Teboulle (2009), "A fast iterative shrinkage-thresholding algorithm", SIAM J. Imaging Sciences 2(1).
        O'Donoghue and Candes (2015), "Adaptive restart for accelerated gradient schemes", Found. Comput. Math. 15.

    Example:
        >>> b = torch.tensor([3.0, 0.5])
        >>> soft = lambda v, step: v.sign() * (v.abs() - step).clamp_min(0)
        >>> minimum = ProximalGradient().minimize(lambda y: ((y - b).square().sum() / 2, y - b), soft, torch.zeros(2))
        >>> minimum.y, minimum.status.name
        (tensor([2., 0.]), 'CONVERGED')
    """

    max_steps: int = 1000
    tol: float = 1e-8
    step: float | None = None
    patience: int = 500

    def __post_init__(self) -> None:
        check_count("max_steps", self.max_steps, 0)
        check_count("patience", self.patience, 1)
        _check_positive("tol", self.tol)
        if self.step is not None:
            _check_positive("step", self.step)

    def minimize(
        self, fun: Objective, prox: Prox, y0: Tensor, *, tol: float | None = None, max_steps: int | None = None
    ) -> Minimum:
        """Minimize s + r from y0.

        Args:
            fun: y -> (value, gradient) of s; called with y detached, also at points between two of r's domain.
            prox: (v, step) -> the prox of `step r` at v.
            y0: where to start, `[d]` or `[m, d]`; not changed.
            tol: replaces `self.tol`.
            max_steps: replaces `self.max_steps`.

        Returns:
            The point of the least residual, detached; `gradient_norm` is that residual. CONVERGED, STEP_LIMIT, STALLED,
            DIVERGED (s falls without end) or NON_FINITE.

        Raises:
            InvalidProblem: `tol` or `max_steps` is out of range.
        """
        tol = self.tol if tol is None else tol
        max_steps = self.max_steps if max_steps is None else max_steps
        _check_positive("tol", tol)
        check_count("max_steps", max_steps, 0)
        with torch.no_grad():
            return _Run(self, fun, prox, y0.detach().clone(), tol).to_end(max_steps)


def _check_positive(name: str, value: float) -> None:
    if not is_number(value) or not 0 < value < math.inf:
        raise InvalidProblem(f"{name}={value!r} must be a number above 0")


class _Run:
    """One minimization: where it is, how long its steps are, and what it has cost."""

    def __init__(self, options: ProximalGradient, fun: Objective, prox: Prox, y: Tensor, tol: float) -> None:
        self.options, self.fun, self.prox, self.tol = options, fun, prox, tol
        self.eps = torch.finfo(y.dtype).eps
        self.y, self.z, self.t = y, y, 1.0
        self.steps = self.evaluations = self.idle = 0
        self.value, self.gradient = self.evaluate(y)
        self.first = self.value
        self.curvature = 1 / options.step if options.step is not None else self.measured()
        self.best, self.least, self.mark = y, math.inf, math.inf

    def to_end(self, max_steps: int) -> Minimum:
        """Step until something ends it."""
        status = None if math.isfinite(self.value) and math.isfinite(self.curvature) else Status.NON_FINITE
        while status is None:
            status = Status.STEP_LIMIT if self.steps >= max_steps else self.advance()
        if self.least == math.inf and status is Status.STEP_LIMIT:  # no step was allowed
            self.keep(self.prox(self.z - self.gradient / self.curvature, self.z.new_tensor(1 / self.curvature)))
        number = self.y.new_tensor
        return Minimum(self.best, number(self.value), number(self.least), status, self.steps, self.evaluations)

    def advance(self) -> Status | None:
        """Take one step from z and evaluate at the next z; return a status if that ends the run."""
        step = self.z.new_tensor(1 / self.curvature)
        y = self.prox(self.z - step * self.gradient, step)
        self.steps += 1
        residual, rounding = self.keep(y)
        if residual <= self.tol:
            return Status.CONVERGED
        if residual <= rounding or self.idle >= self.options.patience:
            return Status.STALLED
        uphill = bool(((self.z - y) * (y - self.y)).sum() > 0)
        t = 1.0 if uphill else self.t
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
        z = y + ((t - 1) / t_next) * (y - self.y)
        value, gradient = self.evaluate(z)
        if not math.isfinite(value):
            return self.shorten(4 * self.curvature)
        if value < -max(1.0, abs(self.first)) / self.eps**2:
            return Status.DIVERGED
        change, moved, size = torch.stack(
            [(gradient - self.gradient).norm(), (z - self.z).norm(), gradient.norm()]
        ).tolist()
        ratio = change / moved if moved > 0 and change > 1e3 * self.eps * size else 0.0
        self.y, self.z, self.t, self.value, self.gradient = y, z, t_next, value, gradient
        if ratio > self.curvature * (1 + 1e-6):
            self.curvature, self.t = 1.2 * ratio, 1.0
        return None

    def keep(self, y: Tensor) -> tuple[float, float]:
        """Remember y if it is the best; return the residual of the step to it, and what rounding makes of it."""
        moved, size, gradient = torch.stack([(self.z - y).norm(), self.z.norm(), self.gradient.norm()]).tolist()
        residual = moved * self.curvature
        if residual < self.least:
            self.best, self.least = y, residual
        self.idle = 0 if residual < 0.9 * self.mark else self.idle + 1
        self.mark = residual if residual < 0.9 * self.mark else self.mark
        return residual, self.eps / NOISE * (size * self.curvature + gradient)

    def shorten(self, curvature: float) -> Status | None:
        """Go back to y and take shorter steps from there."""
        self.curvature, self.z, self.t = curvature, self.y, 1.0
        self.value, self.gradient = self.evaluate(self.z)
        hopeless = not math.isfinite(self.value) or not math.isfinite(curvature)
        return Status.NON_FINITE if hopeless else None

    def measured(self) -> float:
        """Estimate the largest curvature at the start by power iterations on differences of gradients."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.y.shape, generator=generator, dtype=self.y.dtype).to(self.y.device)
        reach = self.eps ** (1 / 3) * (1 + float(self.y.norm()))
        curvature = 0.0
        for _ in range(PROBES):
            v = v * (reach / v.norm().clamp_min(torch.finfo(v.dtype).tiny))
            product = self.evaluate(self.y + v)[1] - self.gradient
            curvature = max(curvature, float(product.norm()) / reach)
            v = product
        # A linear s has no curvature: any step will do, and a later ratio shortens it.
        return curvature if curvature != 0 else 1.0

    def evaluate(self, y: Tensor) -> tuple[float, Tensor]:
        self.evaluations += 1
        value, gradient = self.fun(y)
        if gradient.shape != y.shape or gradient.dtype != y.dtype:
            raise InvalidProblem(
                f"the objective returned a gradient of shape {tuple(gradient.shape)} and {gradient.dtype} for y of "
                f"shape {tuple(y.shape)} and {y.dtype}"
            )
        gradient = gradient.detach().clone()
        total, size = torch.stack([value.detach().double().sum(), gradient.double().sum()]).tolist()
        return (total if math.isfinite(size) else math.nan), gradient
