"""Schedules: functions of `(x, step)` that serve wherever a hyperparameter does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, final

from torch import Tensor

from bilevel.optimizers._base import Hyperparameter, at
from bilevel.optimizers._hyperparameters import check, check_count, check_flag, is_number
from bilevel.status import InvalidProblem


@final
@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` to `end`, then `end` for ever.

        end + (start - end) (1 + cos(pi min(step, steps) / steps)) / 2

    Up to `steps` these are the values of `torch.optim.lr_scheduler.CosineAnnealingLR`, which climbs again afterwards.

    Args:
        start: value at step 0; a number, a tensor or a function of `(x, step)`, so it may be learned.
        end: value from `steps` on; likewise.
        steps: at least 1.

    Raises:
        InvalidProblem: an option is of a wrong type or not finite, or steps is less than 1.

    References:
        Loshchilov and Hutter (2017), arXiv 1608.03983, without restarts.

    Example:
        >>> Cosine(1.0, steps=4)(None, 2)
        0.5
    """

    start: Hyperparameter
    end: Hyperparameter = 0.0
    _: KW_ONLY
    steps: int

    def __post_init__(self) -> None:
        check("start", self.start, -math.inf, math.inf)
        check("end", self.end, -math.inf, math.inf)
        check_count("steps", self.steps, 1)

    def __call__(self, x: Any, step: int) -> float | Tensor:
        """Return the value at `step` >= 0."""
        start, end = at(self.start, x, step), at(self.end, x, step)
        return end + (start - end) * ((1 + math.cos(math.pi * min(step, self.steps) / self.steps)) / 2)


@final
@dataclass(frozen=True)
class StepDecay:
    """A value multiplied by `factor` after every `every` steps.

        start factor^floor(step / every)

    These are the values of `torch.optim.lr_scheduler.StepLR`.

    Args:
        start: value at step 0; a number, a tensor or a function of `(x, step)`, so it may be learned.
        factor: >= 0; likewise.
        every: at least 1.

    Raises:
        InvalidProblem: an option is of a wrong type or out of its range.

    Example:
        >>> [StepDecay(8.0, factor=0.5, every=2)(None, step) for step in range(5)]
        [8.0, 8.0, 4.0, 4.0, 2.0]
    """

    start: Hyperparameter
    factor: Hyperparameter
    every: int

    def __post_init__(self) -> None:
        check("start", self.start, -math.inf, math.inf)
        check("factor", self.factor, 0.0, math.inf)
        check_count("every", self.every, 1)

    def __call__(self, x: Any, step: int) -> float | Tensor:
        """Return the value at `step` >= 0."""
        return at(self.start, x, step) * at(self.factor, x, step) ** (step // self.every)


@final
@dataclass(frozen=True)
class Power:
    """A value that grows or decays like a power of the step, up to a limit.

        start ((step + offset) / offset)^exponent,  never beyond `limit`

    Args:
        start: value at step 0.
        exponent: positive to grow, negative to decay.
        offset: > 0; up to about this step the value stays near its start.
        limit: largest value of a growing schedule, smallest of a decaying one; None: no limit.

    Raises:
        InvalidProblem: an option is of a wrong type or out of its range.

    Example:
        >>> [Power(2.0, 1.0, limit=6.0)(None, step) for step in range(4)]
        [2.0, 4.0, 6.0, 6.0]
    """

    start: float
    exponent: float
    _: KW_ONLY
    offset: float = 1.0
    limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("start", "exponent", "offset"):
            value = getattr(self, name)
            if not is_number(value) or not math.isfinite(value) or (name == "offset" and not value > 0):
                wanted = "a finite number" + (" > 0" if name == "offset" else "")
                raise InvalidProblem(f"Power({name}=...) must be {wanted}, got {value!r}")
        if self.limit is not None:
            check("limit", self.limit, -math.inf, math.inf)

    def __call__(self, x: Any, step: int) -> float:
        """Return the value at `step` >= 0."""
        value: float = self.start * ((step + self.offset) / self.offset) ** self.exponent
        if self.limit is None:
            return value
        return min(value, self.limit) if self.exponent > 0 else max(value, self.limit)


@final
@dataclass(frozen=True)
class Knots:
    """A learned curve: straight lines between k values of x, spread evenly over the steps.

        v_i + (v_{i+1} - v_i) w,   i + w = (k - 1) step / (steps - 1);  its exponential if `log`

    Beyond the last step it stays at the last value. With as many knots as steps, every step has a value of its own.

    Args:
        knots: function of x that returns the values `[k]`; None: x is that tensor itself.
        steps: at least 1.
        log: the values are logarithms, as suits rates: steps of one size then change a rate by one factor.

    Raises:
        InvalidProblem: an option is of a wrong type or out of its range, or the values are no tensor `[k]`.

    Cost:
        A few numbers a step.

    References:
        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML training with metagradient descent", 2025, arXiv
        2503.13751, on learning-rate schedules.

    Example:
        >>> import torch
        >>> schedule = Knots(steps=5, log=False)
        >>> [float(schedule(torch.tensor([0.0, 1.0, 0.0]), step)) for step in range(6)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    knots: Callable[[Any], Tensor] | None = None
    _: KW_ONLY
    steps: int
    log: bool = True

    def __post_init__(self) -> None:
        if self.knots is not None and not callable(self.knots):
            raise InvalidProblem(f"Knots(knots=...) must be a function of x or None, got {self.knots!r}")
        check_count("steps", self.steps, 1)
        check_flag("log", self.log)

    def __call__(self, x: Any, step: int) -> Tensor:
        """Return the value at `step` >= 0, 0-dim."""
        values = x if self.knots is None else self.knots(x)
        if not isinstance(values, Tensor) or values.dim() != 1 or len(values) == 0:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InvalidProblem(f"Knots needs a tensor [k] of values, got {shape}; name them by knots=lambda x: ...")
        last = len(values) - 1
        place = last * min(step / max(self.steps - 1, 1), 1.0)
        left = min(int(place), max(last - 1, 0))
        value = values[left] + (values[min(left + 1, last)] - values[left]) * (place - left)
        return value.exp() if self.log else value
