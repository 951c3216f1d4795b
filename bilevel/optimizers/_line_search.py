"""A line search for the strong Wolfe conditions that knows how far rounding lets it see."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

_DECREASE = 1e-4
_CURVATURE = 0.9


class Trial(NamedTuple):
    """A point of the line: how far along, value, slope along the direction, and where that is."""

    length: float
    value: float
    slope: float
    y: Tensor
    gradient: Tensor
    gradient_norm: float

    @property
    def finite(self) -> bool:
        """Whether value and gradient are finite."""
        return math.isfinite(self.value) and math.isfinite(self.slope) and math.isfinite(self.gradient_norm)


class Search(NamedTuple):
    """What a search found.

    Args:
        trial: a lower point; None if there was none.
        evaluations: how many trials it took.
        unbounded: the value keeps falling however far it goes.
        finite: whether any trial was finite.
    """

    trial: Trial | None
    evaluations: int
    unbounded: bool
    finite: bool


def strong_wolfe(
    evaluate: Callable[[float], Trial], start: Trial, first: float, noise: float, shortest: float, max_trials: int
) -> Search:
    """Find a length where the strong Wolfe conditions hold.

    With phi(a) the value at length a > 0 they are

        phi(a) <= phi(0) + 1e-4 a phi'(0) + noise   and   |phi'(a)| <= 0.9 |phi'(0)|

    It expands until a minimum is bracketed, then interpolates by cubics, guarded by bisection. Where the values differ
    by less than `noise`, the slopes decide alone, so that the gradient can still be driven down where the value cannot.
    If the trials run out, the last point that satisfies the first condition is returned, if it is lower.

    Args:
        evaluate: a -> the trial at length a.
        start: the trial at length 0, with a negative slope.
        first: the first length to try.
        noise: size of the rounding error of a value.
        shortest: lengths that differ by less are one point after rounding.
        max_trials: at least 1.

    References:
        Nocedal and Wright (2006), Algorithms 3.5 and 3.6; Hager and Zhang (2005), for trusting slopes over values.
    """
    low, high, previous_width = start, None, math.inf
    length, any_finite = first, False
    for count in range(1, max_trials + 1):
        trial = evaluate(length)
        if trial.value == -math.inf:
            return Search(low if low.value < start.value else None, count, unbounded=True, finite=True)
        any_finite = any_finite or trial.finite
        too_far = not trial.finite or trial.value > noise + min(
            low.value, start.value + _DECREASE * length * start.slope
        )
        if not too_far and abs(trial.slope) <= -_CURVATURE * start.slope:
            return Search(trial, count, unbounded=False, finite=True)
        if too_far or trial.slope >= 0:
            high = trial
        else:
            previous, low = low, trial
        if high is None:
            length = _extrapolate(previous, low)
            continue
        width = high.length - low.length
        if width <= shortest or (count >= 3 and -width * start.slope <= noise):
            break
        length = low.length + width * _fraction(low, high, noise, slow=width > 0.5 * previous_width)
        if not low.length < length < high.length:
            break
        previous_width = width
    # Still as steep after a million times the first length: nothing but an infinite fall looks so.
    unbounded = low.length >= 1e6 * first and (high is None or not high.finite)
    return Search(low if low.value < start.value else None, count, unbounded, any_finite)


def _extrapolate(previous: Trial, last: Trial) -> float:
    """Return where the secant of the slopes vanishes, kept within 2 to 10 times the last length."""
    bend = last.slope - previous.slope
    target = last.length - last.slope * (last.length - previous.length) / bend if bend > 0 else math.inf
    return min(max(target, 2 * last.length), 10 * last.length)


def _fraction(low: Trial, high: Trial, noise: float, *, slow: bool) -> float:
    """Return where between low (0) and high (1) to try next: at least a tenth away from both."""
    if not high.finite:
        return 0.1
    if slow:
        return 0.5
    width = high.length - low.length
    left, right = low.slope * width, high.slope * width
    if abs(high.value - low.value) <= noise:
        guess = left / (left - right) if right > 0 else 0.5
    else:
        # Minimizer of the cubic with these end values and slopes, on the unit interval.
        bulge = left + right - 3 * (high.value - low.value)
        square = bulge * bulge - left * right
        root = math.sqrt(square) if square >= 0 else math.nan
        denominator = right - left + 2 * root
        guess = 1 - (right + root - bulge) / denominator if denominator != 0 else math.nan
    return min(max(guess, 0.1), 0.9) if math.isfinite(guess) else 0.5
