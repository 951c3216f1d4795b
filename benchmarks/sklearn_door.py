"""The estimators of `bilevel.integrations.sklearn` beside grids of scikit-learn, and one decay per feature.

Run `python -m benchmarks.sklearn_door --json FILE`. Rows: data, method, folds, fits, cv_score, test_score, seconds and
cpu_seconds.

Every method gets the same five folds and the same standardization (a pipeline for scikit-learn's). Its score is what it
minimizes, the negative squared error or cross-entropy; or, where so named, scikit-learn's default for such models, R^2
or accuracy. Grids have 100 points of one hyperparameter. scikit-learn's logistic regression stops early with its
default tol; further grids solve it exactly. Folds are cut in order, or shuffled with the seeds of `--folds`.

Data with noise features: 10 features that matter and 40 that do not, 400 samples; and 20 that matter and 180 that do
not, 300 samples, where one decay a feature is more than cross-validation can tell apart. Selection is by
cross-validation on these samples alone; `test_score` (R^2, or accuracy) is on 2000 fresh ones. Means over seeds.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import Lasso, LassoCV, LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.integrations.sklearn import (
    BilevelElasticNet,
    BilevelLasso,
    BilevelLogisticRegression,
    BilevelRidge,
)
from bilevel.report import Row, table, write_json

POINTS = 100
SQUARES, ENTROPY = "neg_mean_squared_error", "neg_log_loss"
COLUMNS = ("data", "method", "folds", "fits", "cv_score", "test_score", "seconds", "cpu_seconds")
LOADERS = {"diabetes": load_diabetes, "breast_cancer": load_breast_cancer, "digits": load_digits}
Make = Callable[[], Any]


def grid(model: Any, name: str, values: Any, scoring: str, cv: Any = 5) -> Any:
    """Return scikit-learn's search over one hyperparameter."""
    step = type(model).__name__.lower()
    return GridSearchCV(make_pipeline(StandardScaler(), model), {f"{step}__{name}": values}, cv=cv, scoring=scoring)


def regressors(cv: Any) -> dict[str, Make]:
    """Return ways to choose penalties of a regression."""
    decays, strengths = np.logspace(-4, 4, POINTS), np.logspace(-3, 2, POINTS)
    return {
        "GridSearchCV(Ridge)": lambda: grid(Ridge(), "alpha", decays, SQUARES, cv),
        "RidgeCV, leave one out": lambda: make_pipeline(StandardScaler(), RidgeCV(decays)),
        "BilevelRidge": lambda: BilevelRidge(cv=cv),
        "BilevelRidge('feature')": lambda: BilevelRidge("feature", cv=cv),
        "GridSearchCV(Ridge), R^2": lambda: grid(Ridge(), "alpha", decays, "r2", cv),
        "BilevelRidge, R^2": lambda: BilevelRidge(cv=cv, scoring="r2"),
        "GridSearchCV(Lasso)": lambda: grid(Lasso(), "alpha", strengths, SQUARES, cv),
        "LassoCV": lambda: make_pipeline(StandardScaler(), LassoCV(alphas=POINTS, cv=cv)),
        "BilevelLasso": lambda: BilevelLasso(cv=cv),
        "BilevelElasticNet": lambda: BilevelElasticNet(cv=cv),
    }


def classifiers(cv: Any) -> dict[str, Make]:
    """Return ways to choose penalties of a logistic regression."""
    values, stopped = np.logspace(-4, 4, POINTS), LogisticRegression(max_iter=10_000)
    exact = LogisticRegression(tol=1e-8, max_iter=10_000)
    return {
        "GridSearchCV(LogisticRegression)": lambda: grid(stopped, "C", values, ENTROPY, cv),
        "GridSearchCV(LogisticRegression(tol=1e-8))": lambda: grid(exact, "C", values, ENTROPY, cv),
        "BilevelLogisticRegression": lambda: BilevelLogisticRegression(cv=cv),
        "GridSearchCV(LogisticRegression), accuracy": lambda: grid(stopped, "C", values, "accuracy", cv),
        "GridSearchCV(LogisticRegression(tol=1e-8)), accuracy": lambda: grid(exact, "C", values, "accuracy", cv),
        "BilevelLogisticRegression, accuracy": lambda: BilevelLogisticRegression(cv=cv, scoring="accuracy"),
    }


def real(name: str, seed: int | None, *, exact: bool) -> list[Row]:
    """Return rows of one data set, with folds in order (None) or shuffled; without the exact grids they take less."""
    X, y = LOADERS[name](return_X_y=True)
    ways, kind = (regressors, KFold) if name == "diabetes" else (classifiers, StratifiedKFold)
    cv = kind(5) if seed is None else kind(5, shuffle=True, random_state=seed)
    told_as = "in order" if seed is None else f"seed {seed}"
    return [
        {"folds": told_as} | timed(name, method, make, X, y)[0]
        for method, make in ways(cv).items()
        if exact or "tol=" not in method
    ]


def timed(data: str, method: str, make: Make, X: Any, y: Any) -> tuple[Row, Any]:
    """Fit once; return the row and the fitted model."""
    model, wall, cpu = make(), time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X, y)
    row: Row = {"data": data, "method": method}
    row |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return row | told(model), model


def told(model: Any) -> Row:
    """Return the cross-validated score and the number of points evaluated."""
    last = model[-1] if hasattr(model, "steps") else model
    if isinstance(last, LassoCV):  # its folds share one standardization, so that its score is its own
        return {"cv_score": -float(last.mse_path_.mean(-1).min()), "fits": 5 * len(last.alphas_)}
    if isinstance(last, RidgeCV):
        return {"fits": POINTS}
    return {"cv_score": float(last.best_score_), "fits": 5 * len(last.cv_results_["params"])}


def noise(seed: int, n: int, useful: int, useless: int, *, classes: bool) -> tuple[Any, Any]:
    """Return samples with features that matter and features that do not; a seed has one set of weights."""
    weights = np.random.default_rng(seed).standard_normal(useful)
    rng = np.random.default_rng((seed, n))
    X = rng.standard_normal((n, useful + useless))
    signal = X[:, :useful] @ weights + 2 * rng.standard_normal(n)
    return X, (signal > 0).astype(int) if classes else signal


def noisy(seeds: int, n: int, useful: int, useless: int) -> list[Row]:
    """Return rows of one decay and many on data with noise features, judged on fresh samples."""
    decays = np.logspace(-4, 4, POINTS)
    ways: dict[str, tuple[bool, Make]] = {
        "GridSearchCV(Ridge)": (False, lambda: grid(Ridge(), "alpha", decays, SQUARES)),
        "BilevelRidge": (False, BilevelRidge),
        "BilevelRidge('feature')": (False, lambda: BilevelRidge("feature")),
        "LassoCV": (False, lambda: make_pipeline(StandardScaler(), LassoCV(alphas=POINTS, cv=5))),
        "BilevelLasso": (False, BilevelLasso),
        "BilevelLasso('feature')": (False, lambda: BilevelLasso("feature")),
        "GridSearchCV(LogisticRegression)": (True, lambda: grid(LogisticRegression(), "C", decays, ENTROPY)),
        "BilevelLogisticRegression": (True, BilevelLogisticRegression),
        "BilevelLogisticRegression('feature')": (True, lambda: BilevelLogisticRegression("feature")),
    }
    rows = []
    for name, (classes, make) in ways.items():
        data = f"{useful} + {useless} noise" + (", classes" if classes else "")
        runs = []
        for seed in range(seeds):
            row, model = timed(data, name, make, *noise(seed, n, useful, useless, classes=classes))
            X, y = noise(seed, 2000, useful, useless, classes=classes)
            last = model.best_estimator_ if isinstance(model, GridSearchCV) else model
            runs.append(row | {"test_score": float(last.score(X, y))})
        scores = [run["test_score"] for run in runs]
        numbers = {key: float(np.mean([run[key] for run in runs])) for key in COLUMNS[3:]}
        rows.append({"data": data, "method": name, "test_scores": str(np.round(scores, 4).tolist())} | numbers)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write meta and rows here")
    parser.add_argument(
        "--data", nargs="*", choices=[*LOADERS, "noise"], default=[*LOADERS, "noise"], help="only these"
    )
    parser.add_argument("--folds", type=int, nargs="*", default=[], help="seeds of further, shuffled folds")
    parser.add_argument("--seeds", type=int, default=5, help="of the data with noise features")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    BilevelRidge().fit(*load_diabetes(return_X_y=True))  # the first call loads what torch loads late
    rows: list[Row] = []
    for name in options.data:
        if name == "noise":
            rows += noisy(options.seeds, 400, 10, 40) + noisy(options.seeds, 300, 20, 180)
            continue
        for seed in [None, *options.folds]:
            rows += real(name, seed, exact=seed is None)
    print(table(rows, COLUMNS))
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
