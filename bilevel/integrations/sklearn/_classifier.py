"""What linear classifiers share: classes, scores, and decays in units of C."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from bilevel.integrations.sklearn._descent import Strengths
from bilevel.integrations.sklearn._folds import Folds, Split
from bilevel.integrations.sklearn._linear import Decayed


class LinearClassifier(ClassifierMixin, Decayed, ABC):
    """A linear classifier with decays chosen by cross-validation."""

    _stratified = True

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LinearClassifier:
        """Tune the decays, then fit all samples.

        Args:
            X: features, `[n, d]`.
            y: classes, `[n]`, of any type.
            sample_weight: `[n]`, >= 0; 1 for all if None.

        Returns:
            The estimator.

        Raises:
            ValueError: data that scikit-learn refuses, less than two classes, or a fold whose training part lacks one.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"{type(self).__name__} needs at least 2 classes; the data contain 1 class.")
        self._tune(X, labels, self._encoded(labels), sample_weight, center_targets=False)
        return self

    def decision_function(self, X: Any) -> Any:
        """Return scores: `[n]` for two classes, positive for `classes_[1]`; `[n, n_classes]` for more."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> Any:
        """Return the class with the largest score, `[n]`."""
        scores = self.decision_function(X)
        index = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)
        return self.classes_[index]

    @abstractmethod
    def _encoded(self, labels: Any) -> Any:
        """Return the targets `[n, c]` of labels that count from 0."""

    def _check_splits(self, splits: Sequence[Split], y: Any, weights: Any) -> None:
        super()._check_splits(splits, y, weights)
        for k, (train, _) in enumerate(splits):
            seen = set(y[train][weights[train] > 0].tolist())
            for label, name in enumerate(self.classes_):
                if label not in seen:
                    raise ValueError(
                        f"The training part of fold {k} has no sample of class {name}; use fewer folds, or "
                        "stratified ones."
                    )

    def _truth(self, y: Any) -> Any:
        return self.classes_[y]

    def _natural(self, x: Strengths, folds: Folds) -> dict[str, Any]:
        return {"C": 1 / self._by_group(x)}

    def _learned(self, y: Tensor, folds: Folds) -> None:
        self.alpha_ = 1 / self.best_params_["C"]
        rows = y[0].view(-1, folds.train.targets.shape[-1]).numpy().T
        d = folds.scale.shape[1]
        self.coef_ = rows[:, :d] / folds.scale[0].numpy()
        center = folds.center[0].numpy()
        self.intercept_ = rows[:, d] - self.coef_ @ center if self.fit_intercept else np.zeros(len(rows))
