"""scikit-learn's own checks of estimators, and what all of ours promise beyond them."""

from __future__ import annotations

import builtins
import importlib
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone, is_classifier
from sklearn.datasets import make_classification, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

import bilevel.integrations.sklearn as door
from bilevel.status import Status

ESTIMATORS = [getattr(door, name)() for name in door.__all__]
NAMES = [type(estimator).__name__ for estimator in ESTIMATORS]


def data(estimator: Any, n: int = 60, d: int = 4) -> tuple[Any, Any]:
    if is_classifier(estimator):
        return make_classification(n, d, n_informative=3, n_redundant=0, flip_y=0.2, random_state=0)  # type: ignore[no-any-return]
    return make_regression(n, d, n_informative=2, noise=20.0, random_state=0)  # type: ignore[no-any-return]


def fitted(estimator: Any, *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(*arguments, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # scikit-learn's checks provoke some
@parametrize_with_checks(
    [*ESTIMATORS, door.BilevelRidge(scoring="r2", cv=2), door.BilevelLogisticRegression(scoring="accuracy")]
)  # type: ignore[untyped-decorator, unused-ignore]
def test_scikit_learn_approves(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=NAMES)
def test_attributes_tell_one_story(estimator: Any) -> None:
    X, y = data(estimator)
    model = fitted(clone(estimator), X, y)
    results = model.cv_results_
    assert results["mean_test_score"].max() == pytest.approx(model.best_score_, rel=1e-9)
    best = results["params"][int(np.argmin(results["rank_test_score"]))]
    assert {k: pytest.approx(v) for k, v in model.best_params_.items()} == best
    splits = np.stack([results[f"split{k}_test_score"] for k in range(5)])
    np.testing.assert_allclose(splits.mean(0), results["mean_test_score"], rtol=1e-12)
    assert results["rank_test_score"].min() == 1
    assert len(model.solution_.history) == model.n_iter_
    assert float(model.solution_.certificate.error_estimate) < 1e-6
    assert model.n_features_in_ == X.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=NAMES)
@pytest.mark.parametrize("penalty", ["feature", ["a", "b", "a", "b"]], ids=["feature", "groups"])
def test_more_penalties_never_fit_the_folds_worse_than_the_best_shared_start(estimator: Any, penalty: Any) -> None:
    X, y = data(estimator)
    model = fitted(clone(estimator).set_params(penalty=penalty), X, y)
    count = len(set(penalty)) if isinstance(penalty, list) else X.shape[1]
    assert all(np.shape(value) in ((), (count,)) for value in model.best_params_.values())
    assert any(np.shape(value) == (count,) for value in model.best_params_.values())
    shared = fitted(clone(estimator), X, y)
    assert model.best_score_ >= shared.cv_results_["mean_test_score"][: -shared.n_iter_ - 1].max()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=NAMES)
def test_predictions_do_not_depend_on_the_units_of_features(estimator: Any) -> None:
    X, y = data(estimator)
    factors = np.array([1e-3, 1.0, 50.0, 1e4])
    shift = np.array([5.0, 0.0, -3.0, 1.0])
    one, other = fitted(clone(estimator), X, y), fitted(clone(estimator), X * factors + shift, y)
    np.testing.assert_allclose(other.predict(X * factors + shift), one.predict(X), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=NAMES)
def test_folds_are_shuffled_by_random_state_alone(estimator: Any) -> None:
    X, y = data(estimator)
    runs = [fitted(clone(estimator).set_params(random_state=seed), X, y).best_score_ for seed in (None, None, 1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[2] == runs[3]
    assert len({runs[0], runs[2], runs[4]}) == 3


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=NAMES)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"penalty": "l2"}, "penalty must be 'shared', 'feature', or an array"),
        ({"penalty": [0, 1]}, "one entry for each of 4 features"),
        ({"max_iter": 0}, "max_iter must be an int >= 1, got 0"),
        ({"tol": 0.0}, "tol must be a number > 0, got 0.0"),
        ({"scoring": ("r2",)}, "scoring must be None .*, a name such as 'accuracy' or 'r2', or a function"),
        ({"cv": 1}, "n_splits=1"),
        ({"cv": []}, "cv gave no folds"),
        ({"cv": [(np.arange(60), np.array([], dtype=int))]}, "Fold 0 has a part without samples"),
    ],
)
def test_bad_options_are_refused_at_fit(estimator: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        clone(estimator).set_params(**options).fit(*data(estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=NAMES)
def test_a_limit_that_comes_first_is_told(estimator: Any) -> None:
    X, y = data(estimator)
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        model = clone(estimator).set_params(max_iter=1, tol=1e-10).fit(X, y)
    assert model.solution_.status is Status.STEP_LIMIT


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if is_classifier(e)], ids=lambda e: type(e).__name__)
def test_a_fold_that_lacks_a_class_is_refused(estimator: Any) -> None:
    X, y = data(estimator)
    ordered = np.argsort(y, kind="stable")
    half = [(np.arange(len(y))[y[ordered] == 0], np.arange(len(y))[y[ordered] == 1])]
    with pytest.raises(ValueError, match="training part of fold 0 has no sample of class 1"):
        clone(estimator).set_params(cv=half).fit(X[ordered], y[ordered])


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "sklearn":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *arguments, **options)

    for name in [name for name in sys.modules if name.startswith("bilevel.integrations.sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[sklearn\]'"):
        importlib.import_module("bilevel.integrations.sklearn")


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=NAMES)
def test_missing_numbers_and_no_samples_are_refused(estimator: Any) -> None:
    X, y = data(estimator)
    hole = X.copy()
    hole[7, 2] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        clone(estimator).fit(hole, y)
    with pytest.raises(ValueError, match="minimum of"):
        clone(estimator).fit(X[:0], y[:0])


@pytest.mark.filterwarnings("ignore:Only one class is present")  # scikit-learn's own
@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if is_classifier(e)], ids=lambda e: type(e).__name__)
def test_one_class_in_all_is_refused_and_in_a_validation_part_only_where_the_score_needs_two(estimator: Any) -> None:
    X, y = data(estimator)
    with pytest.raises(ValueError, match="needs at least 2 classes; the data contain 1 class"):
        clone(estimator).fit(X, 0 * y)
    zeros = np.flatnonzero(y == 0)
    cv = [(np.setdiff1d(np.arange(60), zeros[i::3]), zeros[i::3]) for i in range(3)]  # the loss needs no second class
    assert np.isfinite(fitted(clone(estimator).set_params(cv=cv), X, y).best_score_)
    scored = clone(estimator).set_params(cv=cv, scoring="roc_auc")
    with pytest.raises(ValueError, match=r"on the folds. A fold may lack a class|one class"):
        scored.fit(X, y)
