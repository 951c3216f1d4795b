"""A score of the user's own: what is chosen by it is what scikit-learn would say of the same penalties."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.datasets import load_breast_cancer, load_diabetes, make_classification, make_regression
from sklearn.linear_model import Lasso, LogisticRegression, Ridge
from sklearn.metrics import make_scorer, median_absolute_error
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import bilevel.integrations.sklearn as door
from bilevel.integrations.sklearn import BilevelLasso, BilevelLogisticRegression, BilevelRidge
from bilevel.integrations.sklearn._scoring import HALVINGS, LONGEST, PATIENCE, STEP, walk

ESTIMATORS = [getattr(door, name)() for name in door.__all__]
MEDIAN = make_scorer(median_absolute_error, greater_is_better=False)


def data(estimator: Any) -> tuple[Any, Any]:
    if is_classifier(estimator):
        return make_classification(90, 4, n_informative=3, n_redundant=0, flip_y=0.2, random_state=0)  # type: ignore[no-any-return]
    return make_regression(90, 4, n_informative=2, noise=20.0, random_state=0)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("penalty", ["shared", "feature"])
def test_the_best_of_the_points_seen_is_chosen(estimator: Any, penalty: str) -> None:
    X, y = data(estimator)
    scoring = "roc_auc" if is_classifier(estimator) else MEDIAN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, model = (clone(estimator).set_params(penalty=penalty, scoring=s).fit(X, y) for s in (None, scoring))
    results = model.cv_results_
    assert model.best_score_ == results["mean_test_score"].max()
    first = int(np.argmin(results["rank_test_score"]))
    assert results["rank_test_score"][first] == 1
    chosen = [i for i, row in enumerate(results["params"]) if _same(row, model.best_params_)]
    assert model.best_score_ == pytest.approx(results["mean_test_score"][chosen[0]], rel=1e-12)
    # The descent is the same, and what comes after it brings at least what it brought.
    seen = len(plain.cv_results_["params"])
    assert len(results["params"]) >= seen + 2 * PATIENCE + 2 * HALVINGS + 1
    np.testing.assert_allclose(results["mean_test_loss"][:seen], -plain.cv_results_["mean_test_score"], rtol=1e-12)
    assert model.best_score_ >= results["mean_test_score"][:seen].max()


def _same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("scoring", ["accuracy", "roc_auc", "f1"])
def test_scores_are_scikit_learns(scoring: str) -> None:
    X, labels = load_breast_cancer(return_X_y=True)
    names = np.array(["benign", "malignant"])[labels] if scoring != "f1" else labels
    cv = StratifiedKFold(4, shuffle=True, random_state=3)
    model = BilevelLogisticRegression(cv=cv, scoring=scoring).fit(X, names)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=model.C_, tol=1e-9, max_iter=10_000))
    again = cross_val_score(theirs, X, names, cv=cv, scoring=scoring)
    found = [model.cv_results_[f"split{k}_test_score"] for k in range(4)]
    best = int(np.argmax(model.cv_results_["mean_test_score"]))
    np.testing.assert_allclose([scores[best] for scores in found], again, atol=2e-4)
    assert model.best_score_ == pytest.approx(again.mean(), abs=1e-4)
    smooth = BilevelLogisticRegression(cv=cv).fit(X, names)
    theirs.set_params(logisticregression__C=smooth.C_)
    assert model.best_score_ >= cross_val_score(theirs, X, names, cv=cv, scoring=scoring).mean()


def test_scores_of_regressions_and_functions_are_scikit_learns() -> None:
    X, y = load_diabetes(return_X_y=True)
    ways: list[tuple[Any, Any]] = [(BilevelRidge, Ridge), (BilevelLasso, Lasso)]
    for ours, theirs in ways:
        for scoring in ("r2", MEDIAN):
            model = ours(scoring=scoring, fit_intercept=True).fit(X, y)
            same = make_pipeline(StandardScaler(), theirs(alpha=model.alpha_))
            assert model.best_score_ == pytest.approx(
                cross_val_score(same, X, y, cv=5, scoring=scoring).mean(), rel=1e-3
            )


def test_no_grid_is_more_accurate_on_two_classes() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    for seed in range(2):
        cv = StratifiedKFold(5, shuffle=True, random_state=seed)
        grid = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression()),
            {"logisticregression__C": np.logspace(-2, 2, 21)}, cv=cv, scoring="accuracy",
        ).fit(X, y)  # fmt: skip
        assert BilevelLogisticRegression(cv=cv, scoring="accuracy").fit(X, y).best_score_ >= grid.best_score_


def test_names_of_columns_and_weights_of_samples_do_no_harm() -> None:
    X, y = load_breast_cancer(return_X_y=True, as_frame=True)
    assert isinstance(X, pd.DataFrame)
    weights = np.ones(len(y))
    weights[::7] = 0.0
    model = BilevelLogisticRegression(scoring="accuracy", random_state=0).fit(X, y, sample_weight=weights)
    assert model.feature_names_in_.tolist() == list(X.columns)
    assert 0.95 < model.best_score_ <= 1.0


@pytest.mark.parametrize(
    ("scoring", "text"),
    [
        (["accuracy"], "a name such as 'accuracy' or 'r2'"),
        (3, "a name such as 'accuracy' or 'r2'"),
        ("exactness", "exactness"),
        (lambda estimator, X, y: math.nan, "gave .*nan.* on the folds"),
    ],
)
def test_what_is_no_score_is_refused(scoring: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BilevelRidge(scoring=scoring).fit(*data(BilevelRidge()))


@pytest.mark.parametrize("place", [0.0, 0.9, -1.7, 50.0])
def test_a_walk_goes_as_far_as_scores_get_better(place: float) -> None:
    seen: list[float] = []

    def evaluate(t: float, y: torch.Tensor) -> tuple[float, torch.Tensor]:
        seen.append(t)
        assert abs(float(y) - t) < 1.01 * STEP  # it starts from a neighbor
        return -abs(t - place), torch.tensor(t, dtype=torch.float64)

    walk(evaluate, torch.zeros((), dtype=torch.float64))
    best = min(seen, key=lambda t: abs(t - place))
    if place < LONGEST * STEP:
        assert abs(best - place) <= STEP / 2**HALVINGS
        assert len(seen) == 1 + 2 * PATIENCE + 2 * HALVINGS + round(abs(place) / STEP)
    else:
        assert best == pytest.approx((LONGEST + 1 - 0.5**HALVINGS) * STEP)
    assert len(seen) == len(set(seen))
