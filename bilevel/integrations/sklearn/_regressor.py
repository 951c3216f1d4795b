"""What regressors share: how they are fitted; and linear ones, what they predict and report."""

from __future__ import annotations

from abc import ABC
from typing import Any, Self

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from bilevel.integrations.sklearn._base import Tuned
from bilevel.integrations.sklearn._folds import Folds


class Regressor(RegressorMixin, Tuned, ABC):
    """A model of numbers with penalties chosen by cross-validation."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Tune the penalties, then fit all samples.

        Args:
            X: features, `[n, d]`.
            y: targets, `[n]`.
            sample_weight: s, `[n]`, >= 0; 1 for all if None.

        Returns:
            The estimator.

        Raises:
            ValueError: as the class says.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        y = y.astype(np.float64)
        self._tune(X, y, y[:, None], sample_weight, center_targets=True)
        return self


class LinearRegressor(Regressor, ABC):
    """A linear one."""

    def predict(self, X: Any) -> Any:
        """Return predictions `[n]` for features `[n, d]`."""
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_ + self.intercept_

    def _learned(self, y: Tensor, folds: Folds) -> None:
        self.coef_ = (y[0] * folds.target_scale / folds.scale[0]).numpy()
        offset = float(folds.target_center[0, 0]) - float(folds.center[0].numpy() @ self.coef_)
        self.intercept_ = offset if self.fit_intercept else 0.0
