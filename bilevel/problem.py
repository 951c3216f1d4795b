"""The statement of a bilevel problem: what is minimized over what. It knows no solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from bilevel.data import DataSource
from bilevel.layout import Variables
from bilevel.regularizers import Regularizer
from bilevel.sets import Set
from bilevel.status import InvalidProblem

Objective: TypeAlias = Callable[[Variables, Variables, Any], Tensor]
JointSet: TypeAlias = Callable[[Variables, Variables], tuple[Variables, Variables]]
SecondOrder: TypeAlias = Literal["auto", "double_backward", "math_attention", "forward_over_reverse", "differences"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """State `minimize f(x, y) over x in X, subject to y in argmin g(x, .) over y in Y with c(x, y) <= 0`.

    Every function takes the same three arguments `(x, y, batch)`; x and y are a Tensor each, or nested dicts, lists and
    tuples of Tensors, and `batch` is what the level's data source gives (None without one).

    Args:
        upper: f, returns a 0-dim tensor.
        lower: g without its regularizer, returns a 0-dim tensor.
        upper_data: source of the upper batches.
        lower_data: source of the lower batches.
        upper_set: X, on which x is projected.
        lower_set: Y, on which y is projected (solvers that handle constraints).
        constraint: c, returns `[q]`, feasible where <= 0 (solvers that handle constraints).
        equality: h, returns `[r]`, feasible where = 0 (solvers that handle constraints).
        joint_set: (x, y) -> the projection on `{(x, y) in X x Y: c <= 0, h = 0}`, for solvers that project on it.
        regularizer: a declared separable term of g in y, so that its gradient, curvature and prox are formulas.
        lower_init: x -> y, where the lower start depends on x.
        blocks: m, if the lower level consists of m independent problems that share x. Every leaf of y, and every tensor
            of a batch, then has a leading dimension m; the objectives are written for one block and vectorized. The
            lower objective is the sum over blocks, the upper one their mean.
        hvp: how second derivatives of g are computed. "auto" takes the first that works of double backward,
            forward over reverse, double backward with plain attention kernels, and central differences (with a
            warning); any other value insists on that way and raises SecondOrderUnsupported where it fails.
        lower_solution: x -> y*(x), where known; for tests.
        reference: x*, where known, structured like x; for tests and for the error column of comparisons.

    Raises:
        InvalidProblem: a field has the wrong kind of value.

    Example:
        >>> import torch
        >>> problem = Problem(
        ...     upper=lambda x, y, batch: (y - 1.0).square().sum(),
        ...     lower=lambda x, y, batch: (y - x).square().sum())
        >>> float(problem.upper(torch.zeros(()), torch.zeros(()), None))
        1.0
    """

    upper: Objective
    lower: Objective
    upper_data: DataSource | None = None
    lower_data: DataSource | None = None
    upper_set: Set | None = None
    lower_set: Set | None = None
    constraint: Objective | None = None
    equality: Objective | None = None
    joint_set: JointSet | None = None
    regularizer: Regularizer | None = None
    lower_init: Callable[[Variables], Variables] | None = None
    blocks: int | None = None
    hvp: SecondOrder = "auto"
    lower_solution: Callable[[Variables], Variables] | None = None
    reference: Variables | None = None

    def __post_init__(self) -> None:
        for name in ("upper", "lower", "constraint", "equality", "joint_set", "lower_init", "lower_solution"):
            value = getattr(self, name)
            if not callable(value) and not (value is None and name not in ("upper", "lower")):
                raise InvalidProblem(f"Problem({name}=...) must be a function, got {type(value).__name__}.")
        kinds = {
            "upper_data": DataSource, "lower_data": DataSource,
            "upper_set": Set, "lower_set": Set, "regularizer": Regularizer,
        }  # fmt: skip
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                hint = " Wrap tensors in bilevel.Full(...)." if kind is DataSource else ""
                raise InvalidProblem(
                    f"Problem({name}=...) must be a {kind.__name__}, got {type(value).__name__}.{hint}"
                )
        if self.blocks is not None and (not isinstance(self.blocks, int) or self.blocks < 1):
            raise InvalidProblem(f"Problem(blocks=...) must be a positive int, got {self.blocks!r}.")
        if self.hvp not in get_args(SecondOrder):
            raise InvalidProblem(f"Problem(hvp=...) must be one of {get_args(SecondOrder)}, got {self.hvp!r}.")

    @property
    def deterministic_lower(self) -> bool:
        """Whether every lower step sees the same batch."""
        return self.lower_data is None or self.lower_data.deterministic

    @property
    def kinked(self) -> bool:
        """Whether the lower level has a regularizer with kinks."""
        return self.regularizer is not None and not self.regularizer.smooth

    @property
    def proximal(self) -> bool:
        """Whether lower steps need a prox or a projection: for kinks or a lower set."""
        return self.kinked or self.lower_set is not None

    @property
    def constrained(self) -> bool:
        """Whether the lower level has constraints, c or h."""
        return self.constraint is not None or self.equality is not None

    @property
    def beyond_smooth(self) -> tuple[str, ...]:
        """The fields by which the lower level is more than a smooth, unconstrained objective."""
        fields = {
            "lower_set": self.lower_set is not None,
            "constraint": self.constraint is not None,
            "equality": self.equality is not None,
            "regularizer": self.kinked,
        }
        return tuple(name for name, present in fields.items() if present)
