"""How a computation ended, and what it raises when it cannot answer.

Failure is a value: every solver returns a `Status`, whose text is the advice. Exceptions are for input that cannot be
used and for callers that asked for them (`throw=True`).
"""

from __future__ import annotations

import enum
from typing import Any


class Status(enum.Enum):
    """How a solve ended; the value is what to tell the user."""

    CONVERGED = "converged to the tolerance"
    COMPLETED = "ran all the steps asked for; no tolerance was set"
    MINIMUM_NORM = "the system is singular but consistent: this is its minimum-norm solution, others exist"
    APPROXIMATE = "a fixed approximation, not a solve: its error does not shrink with more steps"
    STEP_LIMIT = "step limit reached before the tolerance: raise max_steps (or steps), precondition, or loosen tol"
    TIME_LIMIT = "time limit reached: raise max_seconds"
    BUDGET_SPENT = "oracle budget spent: raise max_gradients"
    STOPPED = "a callback asked to stop"
    STALLED = "no step length made progress: lower lr, or solve the lower level and the linear system more accurately"
    NEGATIVE_CURVATURE = (
        "negative curvature: y is not a strict minimum of the lower objective; take more lower steps, "
        "add damping, or use MINRES"
    )
    BREAKDOWN = "the recurrence broke down: the preconditioner or the operator is not symmetric positive definite"
    SINGULAR = (
        "the system is singular and inconsistent: add damping, regularize the lower objective, or use a penalty "
        "method; if the lower level has several solutions, BAMM or MEHA find the one that is best for the upper "
        "objective"
    )
    DIVERGED = "diverged: lower the step size below 2 / (largest curvature)"
    NON_FINITE = "a value became infinite or not a number"
    INFEASIBLE = (
        "no lower variables satisfy the constraints at this x: shrink the upper set, or relax the constraints; "
        "feasible is constraint <= 0 and equality = 0"
    )
    CQ_FAILURE = (
        "the multipliers of the lower constraints run away because no constraint qualification holds: restate the "
        "constraints (no squares of equations, no equation as two inequalities), or relax them a little"
    )

    @property
    def ok(self) -> bool:
        """Whether the answer may be used as it stands."""
        return self in {Status.CONVERGED, Status.COMPLETED, Status.MINIMUM_NORM, Status.STOPPED}


class BilevelError(Exception):
    """Base of all errors of this library.

    Args:
        message: what happened, where (level, step, leaf, shape), and what to try.
        last_good: the last finite `(x, y)`, where there is one.
    """

    def __init__(self, message: str, *, last_good: Any = None) -> None:
        super().__init__(message)
        self.last_good = last_good


class InvalidProblem(BilevelError, ValueError):
    """The problem as stated cannot be solved; the message says which part and how to mend it."""


class MissingPackage(InvalidProblem, ImportError):
    """An optional package is not installed; the message holds the line that installs it."""


class UnusedHyperparameter(InvalidProblem):
    """A leaf of x enters neither objective."""


class SecondOrderUnsupported(BilevelError, NotImplementedError):
    """The lower objective cannot be differentiated twice (or is, wrongly)."""


class NonDeterministic(BilevelError):
    """The same call gave two answers."""


class NonFinite(BilevelError, FloatingPointError):
    """A value, gradient or hypergradient is infinite or not a number."""


class Diverged(BilevelError):
    """The lower iterates run away."""


class Infeasible(BilevelError, ValueError):
    """No feasible point was found: at the start, or of the lower level at some x.

    Args:
        message: what is violated, where, and what to try.
        index: of the most violated entry (of the constraint, then of the equality).
        amount: by how much it is violated.
        last_good: the last finite `(x, y)`.
    """

    def __init__(self, message: str, *, index: int, amount: float, last_good: Any = None) -> None:
        super().__init__(message, last_good=last_good)
        self.index, self.amount = index, amount


class MultipliersUnbounded(BilevelError):
    """The multipliers of the lower constraints run away at a feasible point: no constraint qualification holds."""


class DataExhausted(BilevelError):
    """A data source has nothing (more) to give."""


class ReplayMismatch(BilevelError):
    """A training step that was run again gave another state: the gradient would be that of another run.

    Args:
        message: which state differs, where, and what to try.
        step: before which the state stands.
        leaf: the name of the tensor that differs.
        difference: the largest difference seen in it; nan where its structure differs.
    """

    def __init__(self, message: str, *, step: int, leaf: str, difference: float) -> None:
        super().__init__(message)
        self.step, self.leaf, self.difference = step, leaf, difference


class CheckpointError(BilevelError):
    """A stored state cannot be written or is damaged."""


class OutOfMemory(BilevelError, MemoryError):
    """Memory ran out; the message says what was held and which schedule takes less."""


class LinearSolveFailed(BilevelError):
    """The linear system of the implicit hypergradient has no trustworthy solution.

    Args:
        message: what happened, where, and what to try.
        status: the linear solver's status.
        last_good: the last finite `(x, y)`.
    """

    def __init__(self, message: str, *, status: Status, last_good: Any = None) -> None:
        super().__init__(message, last_good=last_good)
        self.status = status


class SolveFailed(BilevelError):
    """`solve(..., throw=True)` ended with a status that is not `ok`."""


class BilevelWarning(UserWarning):
    """Base of all warnings; each names the one option to change."""


class HypergradientInaccurate(BilevelWarning):
    """The hypergradient met the tolerance, but the estimate of its own error does not."""


class SecondOrderFallback(BilevelWarning):
    """Second derivatives are computed in a slower or less exact way than asked for."""


class IneffectiveHyperparameter(BilevelWarning):
    """A leaf of x has no influence here (zero gradient, or unused for many steps)."""


class PrecisionWarning(BilevelWarning):
    """Numbers were promoted or are held in another precision than the user's."""


class Chaotic(BilevelWarning):
    """A cotangent grew so much on its way through training that the gradient holds in a tiny neighborhood only."""


class NotMetasmooth(BilevelWarning):
    """Trained weights do not respond linearly to steps of x, so that gradients through training mislead."""


class MultiplierAtBound(BilevelWarning):
    """A multiplier reached its bound: if the true one is larger, the answer is wrong."""


class InfeasibleStart(BilevelWarning):
    """No lower variables are feasible at x0, so the start was moved in x."""
