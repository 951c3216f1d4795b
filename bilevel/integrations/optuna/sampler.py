"""A sampler that steps along reported hypergradients: quasi-Newton descent, one trial an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from bilevel.status import InvalidProblem

GRADIENT = "hypergradient"
"""The user attribute that holds {parameter: dF/dparameter}."""

BASE = "hypergradient:base"
"""The system attribute that holds the trial from which a trial's step was taken."""

Array = NDArray[np.float64]


def report_hypergradient(trial: Trial, gradient: Mapping[str, Any]) -> None:
    """Store `dF/dparameter` of a trial's value, for `HypergradientSampler`.

    Args:
        trial: the running trial.
        gradient: parameter's name -> derivative of the value in the parameter itself (not its logarithm), a number or
            a 0-dim tensor.

    Raises:
        InvalidProblem: a name is none of the trial's parameters, or a derivative is not finite.
    """
    numbers = {name: float(value) for name, value in gradient.items()}
    for name, number in numbers.items():
        if name not in trial.params:
            raise InvalidProblem(f"'{name}' is no parameter of trial {trial.number}; suggested: {list(trial.params)}.")
        if not math.isfinite(number):
            raise InvalidProblem(f"the hypergradient of '{name}' is {number} in trial {trial.number}.")
    trial.set_user_attr(GRADIENT, numbers)


@final
class HypergradientSampler(BaseSampler):
    """Propose steps of a projected quasi-Newton descent (L-BFGS) over the float parameters that have a hypergradient.

    Each proposal starts at the best trial, in coordinates that map each range (of logarithms where `log=True`) to
    [0, 1], and halves its length each time a trial from there did not improve. It is rebuilt from the study's trials
    every time, so that it works across processes and goes on after a restart. Parameters without a hypergradient
    (categories, integers, floats with a step) come from the independent sampler, and so does everything before the
    first hypergradient and after convergence, which explores further.

    It descends one smooth function. Where categories matter too, let each trial tune the floats itself:
    `BilevelObjective`.

    Args:
        independent: sampler of all else; None: TPE, each parameter by itself.
        radius: longest step, as a share of the ranges, > 0.
        tol: converged where the projected hypergradient is this small, in units of the value per range, > 0.
        memory: pairs of the curvature model, >= 1.
        seed: of the default independent sampler.

    Raises:
        InvalidProblem: an option is out of its range.

    Cost:
        One pass over the study's trials for each proposal.

    References:
        Nocedal and Wright (2006), Algorithm 7.4; bounds as in the projected methods of its section 16.7.

    Example:
        >>> import optuna
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> def objective(trial):
        ...     rate = trial.suggest_float("rate", 1e-4, 1.0, log=True)
        ...     report_hypergradient(trial, {"rate": 2 * math.log(rate / 0.01) / rate})
        ...     return math.log(rate / 0.01) ** 2
        >>> study = optuna.create_study(sampler=HypergradientSampler(seed=0))
        >>> study.optimize(objective, n_trials=6)
        >>> f"{study.best_params['rate']:.4f}"
        '0.0100'
    """

    def __init__(
        self,
        independent: BaseSampler | None = None,
        *,
        radius: float = 0.25,
        tol: float = 1e-6,
        memory: int = 10,
        seed: int | None = None,
    ) -> None:
        if not radius > 0 or not tol > 0 or memory < 1:
            raise InvalidProblem(
                f"HypergradientSampler needs radius > 0, tol > 0, memory >= 1, got {radius}, {tol}, {memory}."
            )
        self.independent = TPESampler(multivariate=False, seed=seed) if independent is None else independent
        self.radius, self.tol, self.memory = radius, tol, memory

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters that have a hypergradient at the best trial; none where the descent has converged."""
        sign = _sign(study)
        best = min(_usable(study), key=lambda found: sign * _value(found), default=None)
        if best is None:
            return {}
        space: dict[str, BaseDistribution] = {
            name: best.distributions[name] for name in sorted(best.user_attrs[GRADIENT]) if _moves(best, name)
        }
        return space if space and _Point.of(best, space, sign).stationarity > self.tol else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the next step from the best trial."""
        if not search_space:
            return {}
        points = [_Point.of(found, search_space, _sign(study)) for found in _usable(study, search_space)]
        best = min(points, key=lambda point: point.value)
        tried = sum(other.system_attrs.get(BASE) == best.number for other in study.get_trials(deepcopy=False))
        # Public samplers record their state this way too; there is no public call for system attributes.
        study._storage.set_trial_system_attr(trial._trial_id, BASE, best.number)
        direction = _direction(best, points, self.memory)
        length = float(np.linalg.norm(direction))
        longest = self.radius * math.sqrt(len(direction))
        scale = min(1.0, longest / length) * 0.5**tried
        u = np.clip(best.u + scale * direction, 0.0, 1.0)
        return {name: _natural(entry, search_space[name]) for name, entry in zip(search_space, u, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return what the independent sampler says."""
        return self.independent.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Give the independent sampler a new seed."""
        self.independent.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Tell the independent sampler."""
        self.independent.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Tell the independent sampler."""
        self.independent.after_trial(study, trial, state, values)


@dataclass(frozen=True)
class _Point:
    """A trial in unit coordinates, as one to minimize."""

    u: Array
    value: float
    slope: Array
    number: int

    @classmethod
    def of(cls, trial: FrozenTrial, space: Mapping[str, BaseDistribution], sign: float) -> _Point:
        pairs = [_unit(trial.params[name], distribution) for name, distribution in space.items()]
        reported = [trial.user_attrs[GRADIENT][name] for name in space]
        u, stretch = np.array(pairs).T
        return cls(u, sign * _value(trial), sign * np.array(reported) * stretch, trial.number)

    @property
    def stationarity(self) -> float:
        return float(np.linalg.norm(self.u - np.clip(self.u - self.slope, 0.0, 1.0)))

    @property
    def free(self) -> NDArray[np.bool_]:
        return ~((self.u <= 0) & (self.slope > 0) | (self.u >= 1) & (self.slope < 0))


def _direction(best: _Point, points: Sequence[_Point], memory: int) -> Array:
    """Return the L-BFGS direction over the entries that may move; the negative slope, unscaled in radius, before."""
    free = best.free
    pairs = []
    for one, other in pairwise(points):
        s, z = (other.u - one.u) * free, (other.slope - one.slope) * free
        if s @ z > 1e-10 * np.linalg.norm(s) * np.linalg.norm(z) > 0:
            pairs.append((s, z))
    q, weights = best.slope * free, []
    if not pairs:  # no curvature seen: as far as the radius lets it
        return -q / np.linalg.norm(q) * len(q)
    for s, z in reversed(pairs[-memory:]):
        weights.append((s @ q) / (s @ z))
        q = q - weights[-1] * z
    s, z = pairs[-1]
    q = q * (s @ z) / (z @ z)
    for (s, z), weight in zip(pairs[-memory:], reversed(weights), strict=True):
        q = q + s * (weight - (z @ q) / (s @ z))
    return -q * free


def _usable(study: Study, space: Mapping[str, BaseDistribution] | None = None) -> list[FrozenTrial]:
    """Return the completed trials with a hypergradient (of all parameters of a space), by number."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = [trial for trial in trials if trial.user_attrs.get(GRADIENT) and math.isfinite(_value(trial))]
    if space is None:
        return found
    return [t for t in found if all(name in t.user_attrs[GRADIENT] and t.distributions[name] == d
                                    for name, d in space.items())]  # fmt: skip


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def _sign(study: Study) -> float:
    if len(study.directions) > 1:
        raise InvalidProblem("HypergradientSampler descends one objective; the study has several.")
    return -1.0 if study.direction is StudyDirection.MAXIMIZE else 1.0


def _moves(trial: FrozenTrial, name: str) -> bool:
    distribution = trial.distributions.get(name)
    return isinstance(distribution, FloatDistribution) and distribution.step is None and not distribution.single()


def _unit(value: float, distribution: BaseDistribution) -> tuple[float, float]:
    """Return the coordinate in [0, 1], and the derivative of the value in it."""
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    if not distribution.log:
        return (value - low) / (high - low), high - low
    width = math.log(high / low)
    return math.log(value / low) / width, value * width


def _natural(u: float, distribution: BaseDistribution) -> float:
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    value = low * (high / low) ** u if distribution.log else low + u * (high - low)
    return float(min(max(value, low), high))
