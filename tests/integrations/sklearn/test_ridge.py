"""Ridge: scikit-learn's own answers at the decays found, slopes against differences, noise features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.integrations.sklearn import BilevelRidge

X, Y = load_diabetes(return_X_y=True)


def pipeline(**options: Any) -> Any:
    return make_pipeline(StandardScaler(), Ridge(**options))


@pytest.mark.parametrize("weighted", [False, True])
def test_refit_is_scikit_learns_ridge_at_the_decay_found(weighted: bool) -> None:
    weights = np.random.default_rng(0).uniform(0.5, 2.0, len(Y)) if weighted else None
    model = BilevelRidge().fit(X, Y, sample_weight=weights)
    theirs = pipeline(alpha=model.alpha_).fit(X, Y, ridge__sample_weight=weights, standardscaler__sample_weight=weights)
    np.testing.assert_allclose(model.predict(X), theirs.predict(X), rtol=1e-9)


def test_score_is_that_of_cross_validation_and_no_grid_is_better() -> None:
    model = BilevelRidge().fit(X, Y)
    scoring = "neg_mean_squared_error"
    again = cross_val_score(pipeline(alpha=model.alpha_), X, Y, cv=5, scoring=scoring).mean()
    assert model.best_score_ == pytest.approx(again, rel=1e-10)
    grid = GridSearchCV(pipeline(), {"ridge__alpha": np.logspace(-2, 2, 20)}, cv=5, scoring=scoring).fit(X, Y)
    assert model.best_score_ >= grid.best_score_


def test_one_decay_a_feature_beats_one_for_all_where_features_are_noise() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((400, 40))
    targets = inputs[:, :5] @ np.array([3.0, -2.0, 1.0, 1.0, -1.0]) + 2 * rng.standard_normal(400)
    train, test = slice(0, 100), slice(100, None)
    shared, each = (BilevelRidge(p).fit(inputs[train], targets[train]) for p in ("shared", "feature"))
    assert each.best_score_ > shared.best_score_
    assert each.score(inputs[test], targets[test]) > shared.score(inputs[test], targets[test])
    assert np.median(each.alpha_[5:]) > 10 * each.alpha_[:5].max()


def test_the_slope_is_that_of_scikit_learns_scores() -> None:
    """The hypergradient in log(alpha) against differences of cross-validated errors, at two step lengths."""
    splits = list(KFold(5).split(X))
    start = BilevelRidge(cv=splits, max_iter=1, tol=1e-15)
    with pytest.warns(Warning, match="max_iter"):
        start.fit(X, Y)
    x = float(start.solution_.x["alpha"])
    for step in (1e-2, 1e-3):
        errors = [
            -cross_val_score(
                pipeline(alpha=np.exp(x + side * step)), X, Y, cv=splits, scoring="neg_mean_squared_error"
            ).mean()
            for side in (1, -1)
        ]
        difference = (errors[0] - errors[1]) / (2 * step)
        own = _hypergradient(start, splits, x)
        assert own == pytest.approx(difference, rel=10 * step**2 + 1e-5)


def _hypergradient(model: BilevelRidge, splits: Any, x: float) -> float:
    from bilevel.hypergradients import Implicit, hypergradient
    from bilevel.integrations.sklearn._folds import Folds
    from bilevel.linear import Dense

    folds = Folds.of(X, Y[:, None], np.ones(len(Y)), splits, center=True, center_targets=True)
    statement = model._stated(folds, torch.zeros(X.shape[1], dtype=torch.long))
    point = {"alpha": torch.tensor([x], dtype=torch.float64)}
    y = statement.solve(point, statement.y0).y
    found = hypergradient(statement.problem, point, y, estimator=Implicit(linear=Dense()))
    gradient: Any = found.gradient
    return float(gradient["alpha"]) * folds.target_scale**2


def test_constant_features_and_no_intercept() -> None:
    inputs = np.column_stack([X, np.full(len(X), 7.0)])
    model = BilevelRidge().fit(inputs, Y)
    np.testing.assert_allclose(model.predict(inputs), BilevelRidge().fit(X, Y).predict(X), rtol=1e-8)
    through_zero = BilevelRidge(fit_intercept=False).fit(X, Y)
    assert through_zero.intercept_ == 0
    np.testing.assert_allclose(through_zero.predict(0 * X), 0)
