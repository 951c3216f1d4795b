"""The loop around a solver: budgets, tolerance, progress, history, and what to do when a step fails."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from bilevel.callbacks import Callback, Event
from bilevel.dry_run import open_oracles
from bilevel.hypergradients._base import Estimate
from bilevel.layout import Variables, named_leaves, rebuild
from bilevel.oracles import Oracles
from bilevel.plan import Auto, plan
from bilevel.problem import Problem
from bilevel.progress import Bar
from bilevel.solution import History, Solution
from bilevel.solvers._base import Solver
from bilevel.status import (
    BilevelError,
    Diverged,
    HypergradientInaccurate,
    Infeasible,
    InvalidProblem,
    LinearSolveFailed,
    MultipliersUnbounded,
    NonFinite,
    SolveFailed,
    Status,
)

OnNonFinite: TypeAlias = Literal["raise", "skip", "backtrack"]
BACKTRACKS = 10
RUNAWAY = 1e3
LOST = 1e8
RECORDED = 256


def solve(
    problem: Problem,
    solver: Solver[Any] | Auto,
    x0: Variables,
    y0: Variables | None = None,
    *,
    steps: int = 100,
    tol: float = 0.0,
    max_seconds: float = math.inf,
    max_gradients: float = math.inf,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    seed: int = 0,
    on_nonfinite: OnNonFinite = "raise",
    resume: Solution | None = None,
    throw: bool = False,
) -> Solution:
    """Minimize `F(x) = f(x, y*(x))` with a solver.

    Args:
        problem: what to minimize.
        solver: how; "auto" takes what `plan` recommends, and says so in the message of the solution.
        x0: upper start, a Tensor or nested Tensors; never changed.
        y0: lower start; `problem.lower_init(x0)` if None.
        steps: upper steps to make, >= 0.
        tol: stop when `‖x - P(x - h)‖ <= tol`, h the hypergradient, P the projection on the upper set. 0: never.
        max_seconds: stop after the step that exceeds this wall time.
        max_gradients: stop after the step at which gradients + HVPs + cross products exceed this.
        callbacks: called after each step with an `Event`; one that returns True stops the solve.
        progress: show a bar; None shows one on a terminal only.
        seed: of batches and of randomness inside the objectives.
        on_nonfinite: what a value that is not finite does: "raise" NonFinite, "skip" the upper step (the next one sees
            the next batch), or "backtrack": go back to the last good point and repeat its step at half the length, at
            most ten times in a row (also where the lower level diverges, or the stationarity grows a thousandfold).
            What is not finite never replaces the last good x and y.
        resume: go on from a solution of the same problem and solver; x0 and y0 then only give structure.
        throw: raise the failure instead of returning it as a status.

    Returns:
        A `Solution`. Statuses that end it early are values, not exceptions, unless `throw`.

    Raises:
        InvalidProblem: and relatives, from the dry run at the door.
        NonFinite: a step gave a value that is not finite, and `on_nonfinite="raise"`; carries `last_good`.
        SolveFailed: `throw` and the status is not ok; carries `last_good`.
    """
    begin, planned = time.perf_counter(), ""
    if solver == "auto":
        if resume is not None:
            raise InvalidProblem("resume needs the solver of the solution: print(bilevel.plan(...)) names it.")
        found = plan(problem, x0, y0, seed=seed)
        solver, planned = found.solver(), f"auto took {found.recommended}; "
    _check_arguments(solver, steps, tol, on_nonfinite)
    oracles, x, y = open_oracles(problem, x0, y0, seed=seed, needs_hvp=solver.needs_hvp, trains=solver.replays)
    state = solver.init(oracles, x, y) if resume is None else _resumed(resume, x, y)
    if resume is not None:
        oracles.counts = resume.counts
    size = 1 + math.hypot(float(state.x.norm()), float(state.y.norm()))
    run, last = _Run(oracles, begin, size), state.step + steps
    previous, halvings = None, 0
    with Bar(steps, progress) as bar:
        while state.step < last and run.status is None:
            after, trouble = None, None
            try:
                after = solver.step(oracles, state)
                trouble = _trouble(oracles, after)
                if trouble is None:
                    solver.inspect(oracles, after)
                    trouble = run.runaway(after, on_nonfinite)
                run.check_size(after)
            except LinearSolveFailed as error:
                run.end(error.status, str(error))
                break
            except MultipliersUnbounded as error:
                run.end(Status.CQ_FAILURE, str(error))
                break
            except (NonFinite, Diverged, Infeasible) as error:
                if not isinstance(error, NonFinite) and on_nonfinite != "backtrack":
                    run.end(Status.DIVERGED if isinstance(error, Diverged) else Status.INFEASIBLE, str(error))
                    break
                trouble = str(error)
            if trouble and on_nonfinite == "backtrack":
                # What is bad where it was evaluated was reached by too long a step: take that step again, shorter.
                state = state if _left(after) or previous is None else previous
                if halvings < BACKTRACKS:
                    solver, halvings = solver.backtracked(0.5), halvings + 1
                else:
                    run.end(Status.STALLED, f"{Status.STALLED.value}; after {halvings} halvings: {trouble}")
            elif trouble and on_nonfinite == "skip":
                state = solver.skipped(state)
            elif trouble:
                hint = "on_nonfinite='skip' or 'backtrack' would go on."
                raise NonFinite(f"{trouble} (upper step {state.step}); {hint}", last_good=run.nested(previous or state))
            elif after is not None:
                previous, state = state, after
                if state.step > run.furthest:  # a step taken again was seen, and shown, when it was first taken
                    halvings, row = 0, run.record(previous, state)
                    bar.show(row)
                    event = Event(state.step, *run.nested(state), row, state)
                    answers = [callback(event) for callback in callbacks]
                    run.judge(row, tol, max_seconds, max_gradients, stopped=any(answers))
    solution = run.finish(solver, state, tol, throw)
    return replace(solution, message=planned + solution.message) if planned else solution


def _left(after: Any) -> bool:
    """Return whether a step left a point where all was finite for one that is not."""
    if after is None or not all(math.isfinite(value) for value in after.metrics[:3]):
        return False
    return not (_finite(after.x) and _finite(after.y))


def _finite(flat: Tensor) -> bool:
    """Return whether all entries are finite. One pass where their sum is, as nearly always: ten times faster."""
    return math.isfinite(flat.sum()) or bool(flat.isfinite().all())


def _trouble(oracles: Oracles, after: Any) -> str | None:
    """Say what is not finite after a step, None if all is well."""
    metrics = after.metrics
    checks = {
        "the upper objective is": metrics.upper_value,
        "the norm of the hypergradient is": metrics.stationarity,
        "the lower objective is": metrics.lower_value,
    }
    for what, value in checks.items():
        if not math.isfinite(value):
            return f"{what} {float(value)}"
    for name, layout, flat in (("x", oracles.x_layout, after.x), ("y", oracles.y_layout, after.y)):
        if not _finite(flat):
            bad = (~flat.isfinite()).reshape(-1, layout.size).any(0).nonzero()
            return f"{name}'s leaf '{layout.name_of(int(bad[0]))}' is not finite after the step"
    return None


def _check_arguments(solver: Any, steps: int, tol: float, on_nonfinite: str) -> None:
    if not isinstance(solver, Solver):
        hint = " Call it: solver()." if callable(solver) else ""
        raise InvalidProblem(f"expected a Solver or 'auto', got {solver!r}.{hint}")
    if steps < 0 or not tol >= 0:
        raise InvalidProblem(f"steps and tol must be >= 0, got {steps} and {tol}.")
    if on_nonfinite not in get_args(OnNonFinite):
        raise InvalidProblem(f"on_nonfinite must be one of {get_args(OnNonFinite)}, got {on_nonfinite!r}.")


def _resumed(resume: Solution, x: Tensor, y: Tensor) -> Any:
    state = resume.state
    for name, now, then in (("x", x, state.x), ("y", y, state.y)):
        if now.shape != then.shape or now.dtype != then.dtype:
            raise InvalidProblem(
                f"cannot resume: {name} has shape {tuple(now.shape)} and {now.dtype}, the solution's "
                f"{tuple(then.shape)} and {then.dtype}."
            )
    return state


class _Run:
    """What the loop accumulates."""

    def __init__(self, oracles: Oracles, begin: float, size: float) -> None:
        self.oracles, self.begin, self.size, self.history = oracles, begin, size, History()
        self.best: tuple[float, Tensor, Tensor] | None = None
        self.status: Status | None = None
        self.message = ""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def nested(self, state: Any) -> tuple[Variables, Variables]:
        return self.oracles.x_layout.unflatten(state.x), self.oracles.y_layout.unflatten(state.y)

    @property
    def furthest(self) -> int:
        return self.history["step"][-1] if len(self.history) else -1

    def runaway(self, after: Any, on_nonfinite: OnNonFinite) -> str | None:
        if on_nonfinite != "backtrack" or len(self.history) == 0:
            return None
        first, now = self.history["stationarity"][0], float(after.metrics.stationarity)
        return f"the stationarity went from {first:.3g} to {now:.3g}" if now > RUNAWAY * first > 0 else None

    def check_size(self, after: Any) -> None:
        """Raise where x or y has left the scale of its start far behind, and will overflow only much later."""
        for name, point in (("x", after.x), ("y", after.y)):
            size = float(point.norm())
            if LOST * self.size < size < math.inf:
                raise Diverged(
                    f"{name} ran away at step {after.step}, to a norm of {size:.3g}; take shorter steps, or bound the "
                    "problem (upper_set, a regularizer)."
                )

    def end(self, status: Status, message: str) -> None:
        self.status, self.message = status, message

    def record(self, before: Any, after: Any) -> dict[str, Any]:
        metrics, counts = after.metrics, self.oracles.counts
        row = {name: float(getattr(metrics, name)) for name in metrics._fields if name != "status"}
        row |= {
            "step": after.step,
            "linear_status": metrics.status.name.lower(),
            "gradients": counts.gradients,
            "hvps": counts.hvps,
            "crosses": counts.crosses,
            "seconds": self.seconds,
        }
        self.history.append(row, before.x if before.x.numel() <= RECORDED else None)
        self.see(row["upper_value"], before.x, after.y)
        return row

    def see(self, value: float, x: Tensor, y: Tensor) -> None:
        if math.isfinite(value) and (self.best is None or value < self.best[0]):
            self.best = (value, x, y)

    def judge(
        self, row: dict[str, Any], tol: float, max_seconds: float, max_gradients: float, *, stopped: bool
    ) -> None:
        spent = row["gradients"] + row["hvps"] + row["crosses"]
        if tol > 0 and row["stationarity"] <= tol:
            self.end(Status.CONVERGED, f"stationarity {row['stationarity']:.3g} <= tol {tol:.3g}")
        elif stopped:
            self.end(Status.STOPPED, Status.STOPPED.value)
        elif row["seconds"] > max_seconds:
            self.end(Status.TIME_LIMIT, f"{Status.TIME_LIMIT.value} ({row['seconds']:.1f} s)")
        elif spent > max_gradients:
            self.end(Status.BUDGET_SPENT, f"{Status.BUDGET_SPENT.value} ({spent} calls)")

    def finish(self, solver: Solver[Any], state: Any, tol: float, throw: bool) -> Solution:
        if self.status is None:
            limit = Status.STEP_LIMIT if tol > 0 else Status.COMPLETED
            last = f" (stationarity {self.history['stationarity'][-1]:.3g})" if len(self.history) else ""
            self.end(limit, limit.value + last)
        assert self.status is not None
        estimate, y = self._certified(solver, state), state.y
        if estimate is not None:
            self.see(float(estimate.upper_value), state.x, estimate.y)
            y = estimate.y
        if self.status is Status.CONVERGED and estimate is not None:
            _warn_if_inaccurate(estimate, tol)
        value, best_x, best_y = self.best or (math.nan, state.x, y)
        unflatten_x, unflatten_y = self.oracles.x_layout.unflatten, self.oracles.y_layout.unflatten
        solution = Solution(
            x=_copied(unflatten_x(state.x)),
            y=_copied(unflatten_y(y)),
            best_x=_copied(unflatten_x(best_x)),
            best_y=_copied(unflatten_y(best_y)),
            best_value=value,
            status=self.status,
            message=self.message,
            history=self.history,
            counts=self.oracles.counts,
            seconds=self.seconds,
            certificate=None if estimate is None else estimate.certificate,
            state=state,
        )
        if throw and not self.status.ok and self.status not in {Status.TIME_LIMIT, Status.BUDGET_SPENT}:
            raise SolveFailed(f"{self.status.name.lower()}: {self.message}", last_good=(solution.x, solution.y))
        return solution

    def _certified(self, solver: Solver[Any], state: Any) -> Estimate | None:
        if len(self.history) == 0:
            return None
        try:
            estimate = solver.certify(self.oracles, state)
        except BilevelError:  # the run has a status of its own by now, which says more
            return None
        finite = estimate is not None and bool(estimate.gradient.isfinite().all() & estimate.y.isfinite().all())
        return estimate if finite else None


def _warn_if_inaccurate(estimate: Estimate, tol: float) -> None:
    error = estimate.certificate.error_estimate
    if error is not None and not float(error) <= tol:
        warnings.warn(
            f"the hypergradient fell below tol={tol:.3g}, but its own error is estimated at {float(error):.3g}: x may "
            "be farther from stationary than it seems. Raise lower_steps, or lower the linear solver's tol or damping.",
            HypergradientInaccurate,
            stacklevel=4,
        )


def _copied(variables: Variables) -> Variables:
    return rebuild(variables, iter([leaf.clone() for _, leaf in named_leaves(variables)]))
