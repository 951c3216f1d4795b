"""Kernel ridge: scikit-learn's own answers at the widths found, weights, irrelevant features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

from bilevel.integrations.sklearn import BilevelKernelRidge

RNG = np.random.default_rng(0)
X = RNG.uniform(-2, 2, (80, 3))
Y = np.sin(2 * X[:, 0]) + X[:, 1] ** 2 + 0.1 * RNG.standard_normal(80)


def theirs(model: Any, train: Any, judge: Any, weights: Any = None) -> Any:
    """Return scikit-learn's predictions on standardized features and centered targets."""
    share = None if weights is None else weights[train]
    scaler = StandardScaler().fit(X[train], sample_weight=share)
    middle = np.average(Y[train], weights=share)
    fitted = KernelRidge(kernel="rbf", alpha=model.alpha_, gamma=model.gamma_)
    fitted.fit(scaler.transform(X[train]), Y[train] - middle, sample_weight=share)
    return fitted.predict(scaler.transform(X[judge])) + middle


@pytest.mark.parametrize("weighted", [False, True])
def test_refit_and_score_are_scikit_learns_at_the_point_found(weighted: bool) -> None:
    weights = RNG.uniform(0.5, 2.0, 80) if weighted else None
    model = BilevelKernelRidge(cv=3).fit(X, Y, sample_weight=weights)
    everything = np.arange(80)
    np.testing.assert_allclose(model.predict(X), theirs(model, everything, everything, weights), rtol=1e-6)
    errors = [
        np.average(
            (theirs(model, train, judge, weights) - Y[judge]) ** 2, weights=None if weights is None else weights[judge]
        )
        for train, judge in KFold(3).split(X)
    ]
    assert -model.best_score_ == pytest.approx(np.mean(errors), rel=1e-6)


def test_a_scale_for_each_feature_finds_the_one_that_does_not_matter() -> None:
    shared, each = BilevelKernelRidge(cv=3).fit(X, Y), BilevelKernelRidge("feature", cv=3).fit(X, Y)
    assert each.best_score_ > shared.best_score_
    assert each.gamma_[2] < 0.1 * each.gamma_[:2].min()
    fresh = np.random.default_rng(1).uniform(-2, 2, (500, 3))
    truth = np.sin(2 * fresh[:, 0]) + fresh[:, 1] ** 2
    assert each.score(fresh, truth) > max(0.95, shared.score(fresh, truth))


def test_samples_of_weight_zero_are_left_out() -> None:
    weights = np.ones(80)
    weights[::4] = 0
    kept = weights > 0
    folds = [(np.arange(40), np.arange(40, 80)), (np.arange(40, 80), np.arange(40))]
    position = np.cumsum(kept) - 1
    fewer = [tuple(position[part[kept[part]]] for part in split) for split in folds]
    one = BilevelKernelRidge(cv=folds).fit(X, Y, sample_weight=weights)
    other = BilevelKernelRidge(cv=fewer).fit(X[kept], Y[kept])
    np.testing.assert_allclose(one.predict(X), other.predict(X), rtol=1e-7)
    assert len(one.dual_coef_) == 60
