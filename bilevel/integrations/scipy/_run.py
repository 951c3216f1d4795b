"""A run of a SciPy optimizer on F: evaluations, history, and how it ended."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from bilevel.callbacks import Callback, Event
from bilevel.hypergradients._base import Estimate
from bilevel.oracles import Oracles
from bilevel.solution import History, Solution
from bilevel.solvers._base import Metrics, Solver
from bilevel.status import BilevelError, HypergradientInaccurate, InvalidProblem, LinearSolveFailed, NonFinite, Status

RECORDED = 256
"""Largest x of which the history keeps every value."""
FEASIBLE = 1e-8
"""Distance from the upper set, relative to 1 + ‖x‖, up to which a point may be the best."""


class _Stopped(Exception):
    """A callback asked to stop."""


class _Converged(Exception):
    """An evaluation was stationary: SciPy's own tests, which ask for something else, need not see it too."""


class ScipyState(NamedTuple):
    """Where a run stood at its end.

    Args:
        x: upper variables `[p]`.
        y: lower variables.
        step: evaluations made.
        metrics: what the last evaluation saw.
    """

    x: Tensor
    y: Tensor
    step: int
    metrics: Metrics | None


class Run:
    """Evaluations of F, and what they add up to."""

    def __init__(
        self, oracles: Oracles, solver: Solver[Any], state: Any, callbacks: Sequence[Callback], tol: float
    ) -> None:
        self.oracles, self.solver, self.state, self.callbacks, self.tol = oracles, solver, state, callbacks, tol
        self.begin, self.history, self.evaluations = time.perf_counter(), History(), 0
        self.best: tuple[float, Tensor, Tensor] | None = None
        self.last: tuple[Tensor, Estimate] | None = None

    def to_end(self, x: Tensor, **arguments: Any) -> Solution:
        status, message = Status.STALLED, ""
        try:
            with warnings.catch_warnings():
                # SciPy warns of what its result says anyway.
                warnings.filterwarnings("ignore", category=Warning, module=r"scipy\.optimize")
                found = optimize.minimize(self.value_and_gradient, x.cpu().double().numpy(), jac=True, **arguments)
            end, message = self._tensor(found.x), str(found.message)
            if found.nit >= arguments["options"].get("maxiter", math.inf):
                status = Status.STEP_LIMIT
        except _Converged:
            end = self.state.x
        except _Stopped:
            end, status, message = self.state.x, Status.STOPPED, Status.STOPPED.value
        except BilevelError as error:
            end, status, message = self.state.x, _status_of(error), str(error)
            if self.best is None:
                raise
        return self._finished(self.oracles.project_x(end), status, message)

    def value_and_gradient(self, x: Any) -> tuple[float, Any]:
        point = self._tensor(x)
        estimate = self._evaluated(point)
        self._record(point, estimate)
        if self._stationary(point, estimate):
            raise _Converged
        return float(estimate.upper_value), estimate.gradient.cpu().double().numpy()

    def _stationary(self, x: Tensor, estimate: Estimate) -> bool:
        """Return whether x is stationary, also once it is moved into the upper set, which SciPy leaves by a little."""
        if float(Metrics.of(self.oracles, x, estimate).stationarity) > self.tol:
            return False
        near = self.oracles.project_x(x)
        return float(Metrics.of(self.oracles, near, self._evaluated(near)).stationarity) <= self.tol

    def _tensor(self, x: Any) -> Tensor:
        return torch.as_tensor(np.array(x), dtype=self.state.x.dtype, device=self.state.x.device)

    def _evaluated(self, x: Tensor) -> Estimate:
        """Return the certified hypergradient at x; the next lower solve starts where this one ended."""
        if self.last is not None and torch.equal(self.last[0], x):
            return self.last[1]
        estimate = self.solver.certify(self.oracles, self.state._replace(x=x))
        if estimate is None:
            raise InvalidProblem(f"{type(self.solver).__name__} forms no hypergradient that SciPy could follow.")
        if not bool(estimate.gradient.isfinite().all()) or not math.isfinite(estimate.upper_value):
            raise NonFinite(f"F or its hypergradient is not finite at evaluation {self.evaluations}: bound x.")
        self.state, self.last = self.state._replace(x=x, y=estimate.y), (x, estimate)
        return estimate

    def _record(self, x: Tensor, estimate: Estimate) -> None:
        metrics, counts = Metrics.of(self.oracles, x, estimate), self.oracles.counts
        self.evaluations += 1
        row: dict[str, Any] = {name: float(getattr(metrics, name)) for name in metrics._fields if name != "status"}
        row |= {"step": self.evaluations, "linear_status": metrics.status.name.lower()}
        row |= {"gradients": counts.gradients, "hvps": counts.hvps, "crosses": counts.crosses}
        row["seconds"] = time.perf_counter() - self.begin
        self.history.append(row, x if x.numel() <= RECORDED else None)
        self.see(x, estimate)
        nested = self.oracles.x_layout.unflatten(x), self.oracles.y_layout.unflatten(estimate.y)
        state = ScipyState(x, estimate.y, self.evaluations, metrics)
        answers = [callback(Event(self.evaluations, *nested, row, state)) for callback in self.callbacks]
        if any(answers):
            raise _Stopped

    def see(self, x: Tensor, estimate: Estimate) -> None:
        """Remember the best feasible point; SLSQP and trust-constr also evaluate others."""
        value, outside = float(estimate.upper_value), float((x - self.oracles.project_x(x)).norm())
        if outside <= FEASIBLE * (1 + float(x.norm())) and (self.best is None or value < self.best[0]):
            self.best = value, x, estimate.y

    def _finished(self, x: Tensor, status: Status, message: str) -> Solution:
        """Return the solution at x, judged by its own certificate."""
        estimate, metrics = self._last(x)
        y = self.state.y if estimate is None else estimate.y
        if estimate is not None and metrics is not None:
            self.see(x, estimate)
            stationarity, tol = float(metrics.stationarity), self.tol
            if stationarity <= tol and status is not Status.STOPPED:
                status, message = Status.CONVERGED, f"stationarity {stationarity:.3g} <= tol {tol:.3g}"
            elif status in (Status.STALLED, Status.STEP_LIMIT):
                message = f"{status.value} (stationarity {stationarity:.3g} > tol {tol:.3g}; SciPy: {message})"
            _warn_if_inaccurate(estimate, tol)
        value, best_x, best_y = self.best or (math.nan, x, y)
        nested_x, nested_y = self.oracles.x_layout.unflatten, self.oracles.y_layout.unflatten
        return Solution(
            x=nested_x(x.clone()), y=nested_y(y.clone()), best_x=nested_x(best_x.clone()),
            best_y=nested_y(best_y.clone()), best_value=value, status=status, message=message, history=self.history,
            counts=self.oracles.counts, seconds=time.perf_counter() - self.begin,
            certificate=None if estimate is None else estimate.certificate,
            state=ScipyState(x, y, self.evaluations, metrics),
        )  # fmt: skip

    def _last(self, x: Tensor) -> tuple[Estimate | None, Metrics | None]:
        try:
            estimate = self._evaluated(x)
        except BilevelError:  # the run has a status of its own, which says more
            return None, None
        return estimate, Metrics.of(self.oracles, x, estimate)


def _status_of(error: BilevelError) -> Status:
    if isinstance(error, LinearSolveFailed):
        return error.status
    return Status.NON_FINITE if isinstance(error, NonFinite) else Status.DIVERGED


def _warn_if_inaccurate(estimate: Estimate, tol: float) -> None:
    error = estimate.certificate.error_estimate
    if error is not None and not float(error) <= tol:
        warnings.warn(
            f"the error of the last hypergradient is estimated at {float(error):.3g}, more than tol={tol:.3g}: SciPy "
            "steps along noise there. Solve the lower level and the linear system more tightly (solver=...), use "
            "float64, or raise tol.",
            HypergradientInaccurate,
            stacklevel=5,
        )
