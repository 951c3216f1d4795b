"""Lasso and elastic net: scikit-learn's own answers at the strengths found, and grids that are no better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.integrations.sklearn import BilevelElasticNet, BilevelLasso

X, Y = load_diabetes(return_X_y=True)
THEIRS = {BilevelLasso: Lasso, BilevelElasticNet: ElasticNet}
SCORING = "neg_mean_squared_error"


@pytest.mark.parametrize("ours", THEIRS)
@pytest.mark.parametrize("weighted", [False, True])
def test_refit_and_score_are_scikit_learns_at_the_strengths_found(ours: Any, weighted: bool) -> None:
    weights = np.random.default_rng(0).uniform(0.5, 2.0, len(Y)) if weighted else None
    model = ours().fit(X, Y, sample_weight=weights)
    name = THEIRS[ours].__name__.lower()
    theirs = make_pipeline(StandardScaler(), THEIRS[ours](**model.best_params_, tol=1e-10, max_iter=100_000))
    if not weighted:
        again = cross_val_score(theirs, X, Y, cv=5, scoring=SCORING).mean()
        assert model.best_score_ == pytest.approx(again, rel=1e-7)
    theirs.fit(X, Y, **{f"{name}__sample_weight": weights, "standardscaler__sample_weight": weights})
    np.testing.assert_allclose(model.predict(X), theirs.predict(X), rtol=1e-5)
    np.testing.assert_array_equal(model.coef_ == 0, theirs[-1].coef_ == 0)


def test_no_grid_is_better() -> None:
    model = BilevelLasso().fit(X, Y)
    steps = {"lasso__alpha": np.logspace(-2, 2, 25)}
    grid = GridSearchCV(make_pipeline(StandardScaler(), Lasso()), steps, cv=5, scoring=SCORING).fit(X, Y)
    assert model.best_score_ >= grid.best_score_
    assert BilevelElasticNet().fit(X, Y).best_score_ >= model.best_score_ * (1 + 1e-4)  # a lasso is its limit


def test_more_features_than_samples() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((40, 100))
    targets = inputs[:, 0] - 2 * inputs[:, 1] + 0.1 * rng.standard_normal(40)
    model = BilevelLasso().fit(inputs, targets)
    assert model.coef_[0] > 0.7
    assert model.coef_[1] < -1.7
    assert (model.coef_ != 0).sum() < 40
