"""Choose by a score of the user's own: it need not have a slope, so points are compared, one by one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.metrics import check_scoring
from torch import Tensor

from bilevel.integrations.sklearn._descent import Strengths
from bilevel.integrations.sklearn._folds import Folds, Split

STEP, PATIENCE, LONGEST, HALVINGS = math.log(10) / 12, 6, 24, 2
"""A walk along log-factors: its step, that of a grid of 100 points over eight decades; how many steps without a better
score end it; how many there are at most; how often the step is halved around the best."""


@dataclass(frozen=True, eq=False)
class Judge:
    """A score of scikit-learn's on the validation part of each fold.

    Args:
        scorer: `(estimator, X, y) -> float`, greater is better.
        model: the estimator, not yet fitted, that knows what came before the folds (its classes).
        X: features of all samples, `[n, d]`.
        y: targets as the user has them, `[n]`.
        splits: of the folds.
        folds: the same, cut and standardized.
    """

    scorer: Any
    model: Any
    X: Any
    y: Any
    splits: list[Split]
    folds: Folds

    def __call__(self, x: Strengths, y: Tensor) -> Any:
        """Return the score of each fold, `[m]`, at penalties x and weights y `[m, d]`.

        Raises:
            ValueError: a score is no finite number.
        """
        scores = np.array([self._score(k, x, y[k : k + 1]) for k in range(len(self.splits))])
        if not np.isfinite(scores).all():
            raise ValueError(
                f"scoring={self.model.scoring!r} gave {scores.tolist()} on the folds. A fold may lack a class or vary "
                "too little for this score: use fewer folds, or another score."
            )
        return scores

    def _score(self, k: int, x: Strengths, y: Tensor) -> float:
        fitted, fold = copy.copy(self.model), _fold(self.folds, k)
        vars(fitted).pop("feature_names_in_", None)  # rows come as arrays
        fitted._chosen(x, fold)
        fitted._learned(y, fold)
        rows = self.splits[k][1]
        return float(self.scorer(fitted, self.X[rows], self.y[rows]))


def scorer_of(model: Any) -> Any:
    """Return the scorer that `model.scoring` names.

    Raises:
        ValueError: it is none of scikit-learn's scores, nor a function `(estimator, X, y) -> float`.
    """
    if not (isinstance(model.scoring, str) or callable(model.scoring)):
        raise ValueError(
            f"scoring must be None (the loss that is descended), a name such as 'accuracy' or 'r2', or a function "
            f"(estimator, X, y) -> float, got {model.scoring!r}."
        )
    return check_scoring(model, model.scoring)


def walk(evaluate: Callable[[float, Tensor], tuple[float, Tensor]], y: Tensor) -> None:
    """Look for the best score along a line, where scores are noisy steps: to both sides, then closer to the best.

    Args:
        evaluate: `(t, y) -> (score, y)`: the score at t, and the weights there, from weights at a neighbor.
        y: weights at or near t = 0.

    Cost:
        `2 PATIENCE + 2 HALVINGS + 1` points or more, each near one that is known.

    Example:
        >>> import torch
        >>> seen = []
        >>> def evaluate(t: float, y: Tensor) -> tuple[float, Tensor]:
        ...     seen.append(t)
        ...     return -abs(round(t, 1) - 0.7), y
        >>> walk(evaluate, torch.zeros(1))
        >>> any(round(t, 1) == 0.7 for t in seen)
        True
    """
    known = {0.0: evaluate(0.0, y)}  # the first of equal ones is the best

    def best() -> float:
        return max(known, key=lambda t: known[t][0])

    for side in (-STEP, STEP):
        k = idle = 0
        while k < LONGEST and idle < PATIENCE:
            k += 1
            known[k * side] = evaluate(k * side, known[(k - 1) * side][1])
            idle = 0 if best() == k * side else idle + 1
    for k in range(1, HALVINGS + 1):
        middle = best()
        for side in (-STEP, STEP):
            known[middle + side / 2**k] = evaluate(middle + side / 2**k, known[middle][1])


def _fold(folds: Folds, k: int) -> Folds:
    """Return one fold of several."""
    own = slice(k, k + 1)
    parts = {
        name: replace(part, inputs=part.inputs[own], targets=part.targets[own], weights=part.weights[own])
        for name, part in (("train", folds.train), ("validation", folds.validation))
    }
    names = ("total", "center", "scale", "target_center")
    return replace(folds, **parts, **{name: getattr(folds, name)[own] for name in names})  # type: ignore[arg-type]
