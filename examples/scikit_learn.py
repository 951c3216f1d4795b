"""One decay for each feature, by cross-validation, with the habits of scikit-learn."""

import time
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.integrations.sklearn import BilevelLasso, BilevelRidge
from bilevel.report import table

# Ten features that matter, more or less, and 40 columns of noise: 400 samples choose penalties by cross-validation and
# train, 2000 fresh ones judge. Means over five draws. Many penalties can fit the folds too well: with fewer samples, or
# where one lasso penalty drops the noise as well, one decay a feature need not win.


def samples(seed: int, count: int) -> tuple[Any, Any]:
    """Draw samples; a seed has one set of weights."""
    weights = np.random.default_rng(seed).standard_normal(10)
    rng = np.random.default_rng((seed, count))
    X = rng.standard_normal((count, 50))
    return X, X[:, :10] @ weights + 2 * rng.standard_normal(count)


def grid() -> Any:
    """Return scikit-learn's search over 100 decays."""
    pipeline, decays = make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": np.logspace(-4, 4, 100)}
    return GridSearchCV(pipeline, decays, cv=5, scoring="neg_mean_squared_error")


def run(make: Any, seed: int) -> tuple[dict[str, float], Any]:
    """Fit on one split and judge."""
    test, wanted = samples(seed, 2000)
    start = time.perf_counter()
    model = make().fit(*samples(seed, 400))
    seconds = time.perf_counter() - start
    error = float(np.square(model.predict(test) - wanted).mean())
    points = len(model.cv_results_["params"])
    return {"points": points, "seconds": seconds, "cv_mse": -model.best_score_, "test_mse": error}, model


ways = {
    "grid of 100 decays": grid,
    "one decay": BilevelRidge,
    "one decay a feature": lambda: BilevelRidge("feature"),
    "one lasso penalty": BilevelLasso,
}
rows: list[dict[str, Any]] = []
for name, make in ways.items():
    runs = [run(make, seed)[0] for seed in range(5)]
    rows.append({"chosen": name} | {key: float(np.mean([row[key] for row in runs])) for key in runs[0]})
print(table(rows))

_, model = run(ways["one decay a feature"], 0)
useful, useless = np.median(model.alpha_[:10]), np.median(model.alpha_[10:])
print(f"\nmedian decay of features that matter {useful:.2g}, of noise {useless:.2g}")
print("hypergradient at the end:", model.solution_.certificate)

# The show: better on samples that chose nothing.
assert rows[2]["test_mse"] < min(rows[0]["test_mse"], rows[1]["test_mse"])
