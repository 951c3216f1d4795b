"""A linear support vector machine with one C, one for each feature, or one for each group."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from bilevel.integrations.sklearn._base import Statement
from bilevel.integrations.sklearn._classifier import LinearClassifier
from bilevel.integrations.sklearn._folds import Folds
from bilevel.integrations.sklearn._linear import scored
from bilevel.integrations.sklearn._newton import SquaredHinge

INTERCEPT = 1e-6
"""Decay of the intercept, in units of the mean loss: it decides where no sample is within the margin."""


class BilevelLinearSVC(LinearClassifier):
    """Linear support vector machine whose C minimize the cross-validated squared hinge, all at once.

        min_w sum_i s_i max(1 - t_i (<w, z_i> + b), 0)^2 + sum_j w_j^2 / (2 C_j),   t = -1 or 1

    For more than two classes one machine a class, against the others; their weights of one feature share C_j. z are the
    features standardized on the samples fitted. With `C_j = C` this is scikit-learn's `LinearSVC(C=C)` behind a
    `StandardScaler`, but that b is hardly decayed (by 1e-6 in units of the mean loss, where scikit-learn decays it like
    a weight). The folds are the blocks of one bilevel problem, solved by Newton's method.

    Args:
        penalty: as in `BilevelRidge`.
        cv: likewise; a number makes stratified folds.
        fit_intercept: learn b, and center the features.
        max_iter: as in `BilevelRidge`.
        tol: likewise.
        random_state: likewise.
        scoring: likewise.

    Attributes:
        C_: a number or `[n_groups]`; on standardized features.
        alpha_: `1 / C_`.
        best_params_: `{"C": C_}`.
        best_score_: the negative squared hinge, summed over machines, mean over the samples of a fold and over folds;
            or the mean score.
        cv_results_: as in `BilevelRidge`.
        classes_: the classes, sorted.
        coef_: weights of the features as given, `[1, d]` for two classes, `[n_classes, d]` for more.
        intercept_: `[1]` or `[n_classes]`.
        solution_: as in `BilevelRidge`; likewise `n_iter_` and `n_features_in_`.

    Raises:
        ValueError: at `fit`, as in `BilevelLogisticRegression`.

    Cost:
        That of `BilevelLogisticRegression`.

    Notes:
        The squared hinge has no second derivative where a sample lies on the margin: the hypergradient is right between
        such C, of which there are finitely many.

    References:
        Fan, Chang, Hsieh, Wang, Lin, "LIBLINEAR: a library for large linear classification", JMLR 9, 2008 (the loss).
        Keerthi, DeCoste, "A modified finite Newton method for fast solution of large scale linear SVMs", JMLR 6, 2005.

    Example:
        >>> from sklearn.datasets import load_breast_cancer
        >>> model = BilevelLinearSVC().fit(*load_breast_cancer(return_X_y=True))
        >>> round(model.score(*load_breast_cancer(return_X_y=True)), 2)
        0.99
    """

    def _encoded(self, labels: Any) -> Any:
        """Return targets -1 and 1, one column a machine."""
        count = len(self.classes_)
        return np.where(labels[:, None] == (np.arange(count) if count > 2 else np.ones(1)), 1.0, -1.0)

    def _stated(self, folds: Folds, groups: Tensor) -> Statement:
        return scored(folds, groups, SquaredHinge(), INTERCEPT if self.fit_intercept else None)
