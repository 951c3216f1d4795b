"""Ridge regression with one decay, one for each feature, or one for each group."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bilevel.integrations.sklearn._base import Statement
from bilevel.integrations.sklearn._descent import Strengths
from bilevel.integrations.sklearn._folds import Folds
from bilevel.integrations.sklearn._linear import Decayed, least_squares
from bilevel.integrations.sklearn._regressor import LinearRegressor


class BilevelRidge(LinearRegressor, Decayed):
    """Ridge regression whose decays minimize the cross-validated squared error, all at once.

        min_w sum_i s_i (t_i - <w, z_i> - b)^2 + sum_j alpha_j w_j^2

    z are the features standardized on the samples fitted: what each fold learns from, or at the end all of them. With
    `alpha_j = alpha` this is scikit-learn's `make_pipeline(StandardScaler(), Ridge(alpha))`. The folds are the blocks
    of one bilevel problem; each is solved exactly, and so is the linear system of the hypergradient in log(alpha). A
    ladder of 8 shared decays gives the start; from there one decay moves by secants of the hypergradient, several by
    its signs, each with a step of its own length.

    Args:
        penalty: "shared": one decay; "feature": one for each feature; or an array `[d]` of labels: one for each group.
        cv: folds, as scikit-learn takes them: a number, a splitter, or pairs of indices.
        fit_intercept: learn b, and center the features.
        max_iter: steps along the hypergradient, >= 1.
        tol: > 0; it ends where the loss has fallen by less than this fraction in ten steps, and where the hypergradient
            is below `0.01 tol` times the loss. It also ends where no log-decay moves by more than 0.01.
        random_state: shuffle the samples before they are cut into `cv` folds, with this seed. None: as they come, as in
            scikit-learn. All else is deterministic.
        scoring: a score to choose by, of scikit-learn's: a name such as "r2", or a function `(estimator, X, y) ->
            float`. It needs no slope: the descent is as without, then each point evaluated is scored, and so are points
            around the best, all its penalties times common factors: in steps of a twelfth of a decade to both sides
            until six bring nothing better, then in halves and quarters of a step. Of equal scores that of the least
            loss is taken. As in `GridSearchCV`, samples are not weighted in the score. None: the loss itself.

    Attributes:
        alpha_: the decays, a number or `[n_groups]`; on standardized features, in units of scikit-learn's `Ridge`.
        best_params_: `{"alpha": alpha_}`.
        best_score_: the negative mean squared error over folds that they reached, or their mean score.
        cv_results_: a row for each point evaluated, as from `GridSearchCV`; with `scoring` its loss too,
            `mean_test_loss`.
        coef_: weights of the features as given, `[d]`.
        intercept_: b for these.
        solution_: the bilevel `Solution`: history, status, and the certificate of the last hypergradient.
        n_iter_: steps made.
        n_features_in_: d.

    Raises:
        ValueError: at `fit`, data that scikit-learn refuses, an option out of its range, groups that do not fit, or a
            score that is no number on some fold.

    Cost:
        Each of the `8 + n_iter_` points (and some 20 more for a score): K Cholesky factors of d x d matrices and four
        passes over the data. Memory: K copies of the data.

    Notes:
        Many decays can fit the folds too well: judge on samples that `fit` has not seen. Ends with a
        ConvergenceWarning, and the best point seen, where `max_iter` came first.

    References:
        Bengio, "Gradient-based optimization of hyperparameters", Neural Computation 12, 2000.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> model = BilevelRidge().fit(*load_diabetes(return_X_y=True))
        >>> round(model.alpha_, 2), round(-model.best_score_)
        (0.21, 2993)
    """

    def _stated(self, folds: Folds, groups: Tensor) -> Statement:
        return least_squares(folds, groups)

    def _natural(self, x: Strengths, folds: Folds) -> dict[str, Any]:
        return {"alpha": self._by_group(x)}
