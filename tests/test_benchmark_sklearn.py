"""The benchmark of the scikit-learn door: fresh samples are fresh, and scores are those of the methods."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import Ridge

from benchmarks import sklearn_door
from bilevel.integrations.sklearn import BilevelLogisticRegression, BilevelRidge


def test_samples_share_weights_but_no_rows() -> None:
    X, y = sklearn_door.noise(0, 400, 5, 5, classes=False)
    fresh, wanted = sklearn_door.noise(0, 401, 5, 5, classes=False)
    assert not np.isin(X, fresh).any()
    fits = [np.linalg.lstsq(a, b)[0] for a, b in ((X, y), (fresh, wanted))]
    np.testing.assert_allclose(fits[0], fits[1], atol=0.6)
    assert np.abs(fits[0][:5]).max() > 0.6 > np.abs(fits[0][5:]).max()
    assert set(sklearn_door.noise(0, 50, 5, 5, classes=True)[1]) == {0, 1}


def test_a_row_says_what_the_fit_says() -> None:
    X, y = load_diabetes(return_X_y=True)
    row, model = sklearn_door.timed("diabetes", "ours", BilevelRidge, X, y)
    assert row["cv_score"] == model.best_score_
    assert row["fits"] == 5 * len(model.cv_results_["params"])
    search = sklearn_door.grid(Ridge(), "alpha", np.logspace(-1, 1, 5), sklearn_door.SQUARES)
    row, _ = sklearn_door.timed("diabetes", "theirs", lambda: search, X, y)
    assert row["fits"] == 25
    assert row["cv_score"] == pytest.approx(model.best_score_, rel=1e-3)


def test_folds_are_in_order_or_shuffled_and_the_same_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sklearn_door, "POINTS", 3)
    ordered, shuffled = (sklearn_door.real("breast_cancer", seed, exact=False) for seed in (None, 0))
    assert {row["folds"] for row in ordered} == {"in order"}
    assert {row["folds"] for row in shuffled} == {"seed 0"}
    scores = [{row["method"]: row["cv_score"] for row in rows} for rows in (ordered, shuffled)]
    assert list(scores[0]) == [
        "GridSearchCV(LogisticRegression)", "BilevelLogisticRegression",
        "GridSearchCV(LogisticRegression), accuracy", "BilevelLogisticRegression, accuracy",
    ]  # fmt: skip
    assert all(scores[0][method] != scores[1][method] for method in scores[0])
    X, y = load_breast_cancer(return_X_y=True)
    assert scores[1]["BilevelLogisticRegression"] == pytest.approx(
        BilevelLogisticRegression(random_state=0).fit(X, y).best_score_, rel=1e-12
    )
