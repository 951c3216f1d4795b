"""What the estimators share: folds, a scan for a start, the descent, and what scikit-learn wants to be told."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, StratifiedKFold, check_cv
from sklearn.utils.validation import _check_sample_weight
from torch import Tensor

from bilevel.callbacks import Event
from bilevel.integrations.sklearn._descent import Lower, Profile, Strengths
from bilevel.integrations.sklearn._folds import Folds, Split
from bilevel.integrations.sklearn._rprop import Rprop
from bilevel.integrations.sklearn._scoring import Judge, scorer_of, walk
from bilevel.integrations.sklearn._secant import Secant
from bilevel.layout import Layout
from bilevel.loop import solve
from bilevel.optimizers import Optimizer
from bilevel.problem import Problem
from bilevel.status import Status

RESOLUTION = 1e-2
"""Length of steps in log-penalties that ends the descent: one percent of a penalty."""
PATIENCE = 10
"""Steps within which the loss must fall."""
STATIONARY = 1e-2
"""Norm of the hypergradient that ends the descent, in units of `tol` times the loss."""


@dataclass(frozen=True)
class Statement:
    """A model on some folds.

    Args:
        problem: the folds as blocks.
        solve: the solution of the lower level.
        y0: where it starts, `[m, d]`.
        upper: how x moves; None chooses by its size.
    """

    problem: Problem
    solve: Callable[[Strengths, Tensor], Lower]
    y0: Tensor
    upper: Optimizer[Any] | None = None

    def solver(self, x: Strengths) -> Profile:
        """Return what tunes from x: one penalty by secants, many, or kinks, by signs."""
        kinked = self.problem.kinked
        alone = sum(value.numel() for value in x.values()) == 1 and not kinked
        return Profile(self.solve, self.upper or (Secant() if alone else Rprop()), kinks=kinked)

    def losses(self, x: Strengths, y: Tensor) -> Tensor:
        """Return the validation loss of each fold, `[m]`."""
        assert self.problem.upper_data is not None
        with torch.no_grad():
            found: Tensor = torch.func.vmap(self.problem.upper, in_dims=(None, 0, 0))(
                x, y, self.problem.upper_data.batch(0, 0)
            )
        return found

    def moved(self, x: Strengths, by: Strengths) -> Strengths:
        """Return x + by, projected on the set of x."""
        assert self.problem.upper_set is not None
        layout = Layout.of(x)
        moved = layout.flatten(x) + layout.flatten(by)
        found: Strengths = layout.unflatten(self.problem.upper_set.bind(layout)(moved))
        return found


class Evaluated(NamedTuple):
    """One x.

    Args:
        x: logarithms of penalties.
        loss: the mean over folds.
        scores: of each fold, `[m]`, greater is better.
    """

    x: Strengths
    loss: float
    scores: Any


class Record:
    """Every x evaluated, with the score of each fold; as a callback it says when the descent has nothing to gain.

    Args:
        statement: what is evaluated.
        tol: fraction of the loss by which it must fall within `PATIENCE` steps.
        unit: of a loss, in that of the user.
        judge: (x, y) -> scores `[m]`; None: the negative losses.
    """

    def __init__(self, statement: Statement, tol: float, unit: float, judge: Judge | None) -> None:
        self.statement, self.tol, self.unit, self.judge = statement, tol, unit, judge
        self.best: list[float] = []
        self.rows: list[Evaluated] = []
        self.next: Strengths = {}

    def add(self, x: Strengths, y: Tensor) -> float:
        """Record what (x, y) is worth, return its mean loss."""
        losses = self.statement.losses(x, y)
        scores = -losses.numpy() * self.unit if self.judge is None else self.judge(x, y)
        self.rows.append(Evaluated(x, float(losses.mean()), scores))
        return self.rows[-1].loss

    def winner(self) -> Evaluated:
        """Return the row of the best mean score; of equal ones that of the least loss."""
        best = max(float(row.scores.mean()) for row in self.rows)
        equal = [row for row in self.rows if math.isclose(float(row.scores.mean()), best, rel_tol=1e-12)]
        return min(equal, key=lambda row: row.loss)

    def __call__(self, event: Event) -> bool:
        """Record where the last step started."""
        loss = self.add(self.next, event.y)
        self.best.append(min([loss, *self.best[-1:]]))
        idle = len(self.best) > PATIENCE and self.best[-1] > (1 - self.tol) * self.best[-1 - PATIENCE]
        before, self.next = self.next, {name: value.clone() for name, value in event.x.items()}
        moved = torch.cat([(self.next[name] - value).abs().flatten() for name, value in before.items()])
        return idle or bool(moved.max() <= RESOLUTION)


class Tuned(BaseEstimator, ABC):
    """An estimator whose penalties minimize its cross-validated loss.

    Parameters and attributes are told by the classes that users see.
    """

    _stratified = False

    def __init__(
        self,
        penalty: Any = "shared",
        *,
        cv: Any = 5,
        fit_intercept: bool = True,
        max_iter: int = 100,
        tol: float = 1e-4,
        random_state: int | None = None,
        scoring: Any = None,
    ) -> None:
        self.penalty = penalty
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.scoring = scoring

    # -- what a model says of itself -----------------------------------------------------------------------------------

    @abstractmethod
    def _stated(self, folds: Folds, groups: Tensor) -> Statement:
        """State the model on folds; `groups` are the ids of the features' penalties."""

    @abstractmethod
    def _starts(self, folds: Folds, groups: Tensor) -> Sequence[Strengths]:
        """Return what to evaluate first, neighbors next to one another; the best of them starts the descent."""

    @abstractmethod
    def _natural(self, x: Strengths, folds: Folds) -> dict[str, Any]:
        """Return penalties as scikit-learn's estimator takes them (on standardized features)."""

    def _factor(self, x: Strengths, log: float) -> Strengths:
        """Return the change of x that multiplies all penalties by e^log."""
        return {name: torch.full_like(value, log) for name, value in x.items()}

    def _truth(self, y: Any) -> Any:
        """Return targets as the user has them."""
        return y

    def _chosen(self, x: Strengths, folds: Folds) -> None:
        """Set `best_params_`, and each of them by its name."""
        self.best_params_ = self._natural(x, folds)
        for name, value in self.best_params_.items():
            setattr(self, f"{name}_", value)

    @abstractmethod
    def _learned(self, y: Tensor, folds: Folds) -> None:
        """Set the fitted attributes from the solution on all data, in units of the user; the penalties are set."""

    # -- fitting -------------------------------------------------------------------------------------------------------

    def _tune(self, X: Any, y: Any, targets: Any, sample_weight: Any, *, center_targets: bool) -> None:
        """Tune on folds of (X, y), then fit all of it; `targets` `[n, c]` are y as the model takes it."""
        self._check_options()
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        splits = self._splits(X, y)
        self._check_splits(splits, y, weights)
        options = {"center": self.fit_intercept, "center_targets": center_targets}
        folds = Folds.of(X, targets, weights, splits, **options)
        groups = self._groups(X.shape[1])
        statement = self._stated(folds, groups)
        judge = None
        if self.scoring is not None:
            judge = Judge(scorer_of(self), self, X, self._truth(y), splits, folds)
        record = Record(statement, self.tol, self._unit(folds), judge)
        best, tried = np.inf, statement.y0
        for x in self._starts(folds, groups):
            tried = statement.solve(x, tried).y
            loss = record.add(x, tried)
            if loss < best:
                best, start, warm = loss, x, tried
        record.next = start
        self.solution_ = solve(
            statement.problem,
            statement.solver(start),
            start,
            warm,
            steps=self.max_iter,
            tol=STATIONARY * self.tol * best,
            callbacks=[record],
            progress=False,
        )
        if self.solution_.certificate is not None:  # the last point was evaluated for it
            record.add(record.next, self.solution_.y)
        if self.solution_.status not in {Status.CONVERGED, Status.STOPPED}:
            warnings.warn(
                f"the search for penalties ended early: {self.solution_.message}. The best seen is kept; raise "
                "max_iter or tol.",
                ConvergenceWarning,
                stacklevel=3,
            )
        chosen: Any = self.solution_.best_x
        self.best_score_ = -self.solution_.best_value * self._unit(folds)
        if judge is not None:
            self._look_around(statement, record)
            chosen, _, scores = record.winner()
            self.best_score_ = float(scores.mean())
        everything = np.arange(len(X))
        whole = Folds.of(X, targets, weights, [(everything, everything)], **options)
        final = self._stated(whole, groups)
        self._chosen(chosen, whole)
        self.cv_results_ = self._results(record, folds)
        self.n_iter_ = len(self.solution_.history)
        self._learned(final.solve(chosen, final.y0).y, whole)

    def _look_around(self, statement: Statement, record: Record) -> None:
        """Evaluate the best penalties seen times common factors: the best score seldom lies where the loss is least."""
        x = record.winner().x

        def evaluate(log: float, y: Tensor) -> tuple[float, Tensor]:
            near = statement.moved(x, self._factor(x, log))
            y = statement.solve(near, y).y
            record.add(near, y)
            return float(record.rows[-1].scores.mean()), y

        walk(evaluate, self.solution_.best_y)

    def _unit(self, folds: Folds) -> float:
        """Return the factor from losses to those in units of the user."""
        return folds.target_scale**2

    def _results(self, record: Record, folds: Folds) -> dict[str, Any]:
        """Return scikit-learn's table, a row for each x that was evaluated."""
        params = [self._natural(row.x, folds) for row in record.rows]
        scores = np.stack([row.scores for row in record.rows])
        mean = scores.mean(1)
        table: dict[str, Any] = {"params": params}
        table |= {f"param_{name}": np.array([row[name] for row in params]) for name in params[0]}
        table |= {f"split{k}_test_score": scores[:, k] for k in range(scores.shape[1])}
        rank = 1 + (mean[:, None] < mean[None, :]).sum(1)
        if self.scoring is not None:
            table["mean_test_loss"] = np.array([row.loss for row in record.rows]) * self._unit(folds)
        return table | {"mean_test_score": mean, "std_test_score": scores.std(1), "rank_test_score": rank}

    # -- the door ------------------------------------------------------------------------------------------------------

    def _check_options(self) -> None:
        if not isinstance(self.max_iter, Integral) or self.max_iter < 1:
            raise ValueError(f"max_iter must be an int >= 1, got {self.max_iter!r}.")
        if not isinstance(self.tol, Real) or not self.tol > 0:
            raise ValueError(f"tol must be a number > 0, got {self.tol!r}.")

    def _splits(self, X: Any, y: Any) -> list[Split]:
        cv = 5 if self.cv is None else self.cv
        if isinstance(cv, Integral) and self.random_state is not None:
            kind = StratifiedKFold if self._stratified else KFold
            cv = kind(int(cv), shuffle=True, random_state=self.random_state)
        return list(check_cv(cv, y, classifier=self._stratified).split(X, y))

    def _check_splits(self, splits: Sequence[Split], y: Any, weights: Any) -> None:
        if not splits:
            raise ValueError("cv gave no folds.")

    def _groups(self, d: int) -> Tensor:
        """Return the id of each feature's penalty, `[d]`."""
        if isinstance(self.penalty, str):
            if self.penalty not in ("shared", "feature"):
                raise ValueError(
                    f"penalty must be 'shared', 'feature', or an array of one group for each feature, got "
                    f"{self.penalty!r}."
                )
            return torch.zeros(d, dtype=torch.long) if self.penalty == "shared" else torch.arange(d)
        labels = np.asarray(self.penalty)
        if labels.shape != (d,):
            raise ValueError(
                f"penalty has shape {labels.shape}; as groups it must have one entry for each of {d} features."
            )
        return torch.as_tensor(np.unique(labels, return_inverse=True)[1].reshape(-1))


def plain(values: Tensor, penalty: Any) -> Any:
    """Return a penalty as users see it: a number if shared, an array `[n_groups]` otherwise."""
    return float(values) if isinstance(penalty, str) and penalty == "shared" else values.numpy().copy()
