"""Search spaces: what a hyperparameter may be, in its own units, and the coordinate in [0, 1] that solvers move.

Every space is a smooth map from coordinates to values with an exact inverse. Coordinates of all spaces lie in [0, 1]:
one upper step length serves them all, and both ends of a range can be reached (a sigmoid would only approach them).
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real as Number
from typing import Any, final

import torch
from torch import Tensor

from bilevel.status import InvalidProblem

MIXED = (
    "Hypergradients need a value that can move by a little. For integers and choices take Optuna: "
    "`study.optimize`, with bilevel.integrations.optuna for a search that mixes both."
)


class Space(ABC):
    """Values that a hyperparameter may take. Implementations are frozen dataclasses."""

    @abstractmethod
    def value(self, coordinate: Tensor) -> Tensor:
        """Return the values at coordinates in [0, 1], of the same shape, differentiable in them."""

    @abstractmethod
    def coordinate(self, value: Tensor) -> Tensor:
        """Return the coordinates of values, the inverse of `value`.

        Raises:
            InvalidProblem: a value is outside the space.
        """

    @abstractmethod
    def start(self, size: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the coordinates where a search starts, of a shape, with the dtype and device of `like`."""


@final
@dataclass(frozen=True)
class Real(Space):
    """One number in a range, linear or logarithmic, with the coordinate u in [0, 1].

        value = low (1 - u) + high u,      with `log`:  value = low^(1 - u) high^u

    Args:
        low: least value; > 0 with `log`.
        high: largest value, > low.
        log: move in the logarithm, for values of unknown magnitude: decays, learning rates.
        initial: where the search starts; None: the middle (with `log`, the geometric one).

    Raises:
        InvalidProblem: an end is not a finite number, the ends are in the wrong order or not positive with `log`, or
            `initial` lies outside.

    Example:
        >>> decay = Real(1e-6, 1e-2, log=True)
        >>> [f"{float(value):.6g}" for value in decay.value(torch.tensor([0.0, 0.5, 1.0]))]
        ['1e-06', '0.0001', '0.01']
        >>> round(float(decay.coordinate(torch.tensor(1e-4))), 6)
        0.5
    """

    low: float
    high: float
    log: bool = False
    initial: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high", "initial"):
            value = getattr(self, name)
            if name == "initial" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Number) or not math.isfinite(value):
                raise InvalidProblem(f"Real({name}=...) must be a finite number, got {value!r}.")
        if not self.low < self.high:
            raise InvalidProblem(f"Real(low={self.low}, high={self.high}): low must be less than high.")
        if self.log and not self.low > 0:
            raise InvalidProblem(f"Real(low={self.low}, log=True): a logarithmic range starts above 0, e.g. 1e-6.")
        if self.initial is not None and not self.low <= self.initial <= self.high:
            raise InvalidProblem(f"Real(initial={self.initial}) lies outside [{self.low}, {self.high}].")

    def value(self, coordinate: Tensor) -> Tensor:
        """Return the values at coordinates."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        mapped = low * (1 - coordinate) + high * coordinate
        values = mapped.exp() if self.log else mapped
        # Rounding may leave the range by a unit in the last place; the derivative is that of the formula.
        return values + (values.detach().clamp(self.low, self.high) - values.detach())

    def coordinate(self, value: Tensor) -> Tensor:
        """Return the coordinates of values.

        Raises:
            InvalidProblem: a value is outside the range.
        """
        if not bool(((value >= self.low) & (value <= self.high)).all()):
            raise InvalidProblem(f"values must lie in [{self.low}, {self.high}], got {_brief(value)}.")
        if self.log:
            return (value.log() - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def start(self, size: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the coordinates of `initial`."""
        if self.initial is None:
            return like.new_full(size, 0.5)
        return self.coordinate(torch.tensor(float(self.initial), dtype=torch.float64)).to(like).expand(size).clone()


@dataclass(frozen=True)
class Repeated(Space):
    """A range taken several times, each with a value of its own. Its subclasses say once for each what.

    Args:
        each: the range.

    Raises:
        InvalidProblem: `each` is no Real.
    """

    each: Real

    def __post_init__(self) -> None:
        if not isinstance(self.each, Real):
            raise InvalidProblem(f"{type(self).__name__} repeats a Real(low, high), got {self.each!r}.")

    def value(self, coordinate: Tensor) -> Tensor:
        """Return the values at coordinates."""
        return self.each.value(coordinate)

    def coordinate(self, value: Tensor) -> Tensor:
        """Return the coordinates of values."""
        return self.each.coordinate(value)

    def start(self, size: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the coordinates of `each.initial`."""
        return self.each.start(size, like)


@final
@dataclass(frozen=True)
class PerLayer(Repeated):
    """A value for each layer: each module that owns trainable parameters, weight and bias together.

    Args:
        each: the range.
        layers: names of modules, as in `model.named_modules()`, for a value each; other layers have none (0).
            None: all of them.
    """

    layers: tuple[str, ...] | None = None


@final
@dataclass(frozen=True)
class PerUnit(Repeated):
    """A value for each unit: for the row of its incoming weights, with its bias."""


@final
@dataclass(frozen=True)
class PerInput(Repeated):
    """A value for each input of each layer: for the column of its outgoing weights; and one for each bias vector."""


@final
@dataclass(frozen=True)
class PerParameter(Repeated):
    """A value for each single trainable number. So many fit a validation set too well unless it is large."""


@final
@dataclass(frozen=True)
class PerExample(Repeated):
    """A value for each training example."""


@final
@dataclass(frozen=True)
class PerStep(Repeated):
    """A schedule: a value for each training step."""


@final
@dataclass(frozen=True)
class Curve(Repeated):
    """A schedule: `count` values at equal distances over training, with straight lines (in coordinates) between.

    Args:
        each: the range.
        count: at least 2.

    Raises:
        InvalidProblem: `each` is no Real, or count is less than 2.
    """

    count: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 2:
            raise InvalidProblem(f"Curve(count=...) must be an int of at least 2, got {self.count!r}.")

    def at(self, coordinate: Tensor, step: int, steps: int) -> Tensor:
        """Return the value at a training step of `steps`, 0-dim, from the coordinates `[count]` of the knots."""
        place = min(step, steps - 1) / max(steps - 1, 1) * (self.count - 1)
        left = min(int(place), self.count - 2)
        return self.value(torch.lerp(coordinate[left], coordinate[left + 1], place - left))


@final
@dataclass(frozen=True)
class Weights(Space):
    """Positive weights with mean 1, none more than `ratio` times another, with coordinates u in [0, 1].

        value_i = ratio^u_i / mean_j ratio^u_j

    Divided by their number they lie on the probability simplex. The name is not Simplex since `bilevel.Simplex` is a
    set, on which solvers project: at its faces a projected weight is 0 and the loss of its class is gone, while here
    all weights stay positive and the map is smooth. Mean 1 keeps the scale of the loss, hence that of its lr.

    Args:
        ratio: > 1.

    Raises:
        InvalidProblem: the ratio is not a finite number > 1.

    Example:
        >>> Weights(ratio=9.0).value(torch.tensor([0.0, 0.5, 0.5, 1.0])).tolist()
        [0.25, 0.75, 0.75, 2.25]
    """

    ratio: float = 100.0

    def __post_init__(self) -> None:
        wrong = isinstance(self.ratio, bool) or not isinstance(self.ratio, Number) or not math.isfinite(self.ratio)
        if wrong or not self.ratio > 1:
            raise InvalidProblem(f"Weights(ratio=...) must be a finite number > 1, got {self.ratio!r}.")

    def value(self, coordinate: Tensor) -> Tensor:
        """Return the weights at coordinates."""
        raised = (coordinate * math.log(self.ratio)).exp()
        return raised / raised.mean()

    def coordinate(self, value: Tensor) -> Tensor:
        """Return coordinates of weights: those, of many that differ by a shift, that are centered in [0, 1].

        Raises:
            InvalidProblem: a weight is not positive, their mean is not 1, or they differ by more than the ratio.
        """
        if not bool((value > 0).all()) or abs(float(value.mean()) - 1) > 1e-4:
            raise InvalidProblem(f"weights must be positive with mean 1, got {_brief(value)}.")
        found = value.log() / math.log(self.ratio)
        span = float(found.max() - found.min())
        if span > 1 + 1e-6:
            raise InvalidProblem(f"weights differ {self.ratio**span:.3g}-fold, more than ratio={self.ratio:g}.")
        return (found + (0.5 - (found.max() + found.min()) / 2)).clamp(0.0, 1.0)

    def start(self, size: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the coordinates of equal weights."""
        return like.new_full(size, 0.5)


def check_space(space: Any, allowed: Mapping[str, tuple[type[Space], ...]]) -> dict[str, Space]:
    """Return a space by name, or refuse what is none.

    Args:
        space: name -> Space.
        allowed: name -> the kinds of space that it takes.

    Raises:
        InvalidProblem: it is empty or no mapping, a name is unknown, or an entry is no space of an allowed kind.
    """
    if not isinstance(space, Mapping) or not space:
        raise InvalidProblem(f"space must name what to tune, e.g. {{'weight_decay': Real(1e-6, 1e-1, log=True)}}, "
                             f"got {space!r}.")  # fmt: skip
    for name, entry in space.items():
        if name not in allowed:
            raise InvalidProblem(
                f"space has no '{name}'.{_nearest(str(name), allowed)} There are {', '.join(allowed)}."
            )
        kinds = " or ".join(kind.__name__ for kind in allowed[name])
        if isinstance(entry, type) and issubclass(entry, Space):
            raise InvalidProblem(f"space['{name}'] is the class {entry.__name__}; give it a range, as in "
                                 f"{entry.__name__}(Real(low, high)).")  # fmt: skip
        if not isinstance(entry, Space):
            raise InvalidProblem(f"space['{name}'] must be {kinds}, got {entry!r}. {MIXED}")
        if not isinstance(entry, allowed[name]):
            raise InvalidProblem(f"space['{name}'] takes {kinds}, not {type(entry).__name__}.")
    return dict(space)


SYNONYMS = {
    "learning_rate": "lr", "step_size": "lr", "schedule": "lr", "wd": "weight_decay", "l2": "weight_decay",
    "decay": "weight_decay", "regularization": "weight_decay", "smoothing": "label_smoothing",
    "class_weights": "class_weight", "loss_weights": "class_weight", "loss_weight": "class_weight",
    "example_weights": "data_weight", "sample_weight": "data_weight", "data_weights": "data_weight",
    "augmentation": "augment", "strength": "augment", "beta": "momentum",
}  # fmt: skip
"""Other names by which hyperparameters are known."""


def _nearest(name: str, allowed: Mapping[str, Any]) -> str:
    plain = name.lower().replace("-", "_")
    known = SYNONYMS.get(plain)
    close = [known] if known in allowed else difflib.get_close_matches(plain, list(allowed), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _brief(value: Tensor) -> str:
    if value.numel() == 1:
        return f"{float(value):.6g}"
    return f"{value.numel()} values from {float(value.min()):.6g} to {float(value.max()):.6g}"
