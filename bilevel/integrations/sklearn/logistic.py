"""Logistic regression with one decay, one for each feature, or one for each group."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.integrations.sklearn._base import Statement
from bilevel.integrations.sklearn._classifier import LinearClassifier
from bilevel.integrations.sklearn._folds import Folds
from bilevel.integrations.sklearn._linear import scored
from bilevel.integrations.sklearn._newton import Logistic, Softmax

GAUGE = 1e-9
"""Decay of the intercepts of a softmax, in units of the mean cross-entropy."""


class BilevelLogisticRegression(LinearClassifier):
    """Logistic regression whose decays minimize the cross-validated cross-entropy, all at once.

        min_w sum_i s_i log(1 + exp(-t_i (<w, z_i> + b))) + sum_j w_j^2 / (2 C_j),   t = -1 or 1

    and with the cross-entropy of a softmax, of one score a class, for more than two classes; the weights of one feature
    then share their decay. z are the features standardized on the samples fitted. With `C_j = C` this is scikit-learn's
    `make_pipeline(StandardScaler(), LogisticRegression(C=C))`. The folds are the blocks of one bilevel problem, solved
    by Newton's method (L-BFGS beyond 1000 weights), whose Hessian also preconditions the linear system of the
    hypergradient.

    Args:
        penalty: as in `BilevelRidge`.
        cv: likewise; a number makes stratified folds.
        fit_intercept: learn b, and center the features.
        max_iter: as in `BilevelRidge`.
        tol: likewise.
        random_state: likewise.
        scoring: likewise.

    Attributes:
        C_: a number or `[n_groups]`; on standardized features, in units of scikit-learn's `LogisticRegression`.
        alpha_: `1 / C_`.
        best_params_: `{"C": C_}`.
        best_score_: the negative cross-entropy (scikit-learn's `neg_log_loss`), mean over folds; or the mean score.
        cv_results_: as in `BilevelRidge`.
        classes_: the classes, sorted.
        coef_: weights of the features as given, `[1, d]` for two classes, `[n_classes, d]` for more.
        intercept_: `[1]` or `[n_classes]`.
        solution_: as in `BilevelRidge`; likewise `n_iter_` and `n_features_in_`.

    Raises:
        ValueError: at `fit`, as in `BilevelRidge`; also less than two classes, or a fold whose training part lacks one.

    Cost:
        Each point evaluated: a few Newton steps, for K folds and c columns of scores at once. One is a pass over the
        data, or `n (d c)^2 + (d c)^3 / 3` operations a fold where the Hessian is formed anew; `K (d c)^2` numbers.

    References:
        Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016.

    Example:
        >>> from sklearn.datasets import load_breast_cancer
        >>> model = BilevelLogisticRegression().fit(*load_breast_cancer(return_X_y=True))
        >>> round(model.C_, 1), round(model.best_score_, 3)
        (0.6, -0.079)
    """

    def predict_proba(self, X: Any) -> Any:
        """Return the probability of each class, `[n, n_classes]` in the order of `classes_`."""
        scores = torch.as_tensor(self.decision_function(X))
        if scores.dim() == 1:
            positive = scores.sigmoid().numpy()
            return np.stack([1 - positive, positive], -1)
        return scores.softmax(-1).numpy()

    def predict_log_proba(self, X: Any) -> Any:
        """Return the logarithms of `predict_proba`."""
        return np.log(self.predict_proba(X))

    def _encoded(self, labels: Any) -> Any:
        """Return targets: 0 and 1 for two classes, one-hot rows for more."""
        count = len(self.classes_)
        return labels[:, None].astype(np.float64) if count == 2 else np.eye(count)[labels]

    def _stated(self, folds: Folds, groups: Tensor) -> Statement:
        binary = len(self.classes_) == 2
        # A number added to all intercepts of a softmax changes nothing: a little decay decides which one it is.
        gauge = 0.0 if binary else GAUGE
        return scored(folds, groups, Logistic() if binary else Softmax(), gauge if self.fit_intercept else None)
