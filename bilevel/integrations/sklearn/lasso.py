"""Lasso and elastic net with one pair of strengths, one for each feature, or one for each group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bilevel.data import Full
from bilevel.integrations.sklearn._base import Statement, plain
from bilevel.integrations.sklearn._descent import Lower, Strengths
from bilevel.integrations.sklearn._folds import Folds
from bilevel.integrations.sklearn._linear import halved, squares
from bilevel.integrations.sklearn._regressor import LinearRegressor
from bilevel.optimizers.coordinate_descent import CoordinateDescent
from bilevel.problem import Problem
from bilevel.regularizers import ElasticNet
from bilevel.sets import Box

WEAK, STRONG = -9.0, 2.0
"""Logarithms of the least and the largest strength, relative to the least at which all weights are 0."""
MIXES = (-6.0, -2.0, 1.0)
"""Logarithms of decays to start from, relative to the strength of the absolute values."""


class BilevelElasticNet(LinearRegressor):
    """Elastic net whose two strengths minimize the cross-validated squared error, all at once.

        min_w sum_i s_i (t_i - <w, z_i> - b)^2 / 2n + sum_j a_j |w_j| + sum_j c_j w_j^2 / 2

    z are the features standardized on the samples fitted, n the sum of the s_i. With `a_j = alpha l1_ratio` and
    `c_j = alpha (1 - l1_ratio)` this is scikit-learn's `make_pipeline(StandardScaler(), ElasticNet(alpha, l1_ratio))`.
    The folds are the blocks of one bilevel problem, solved by scikit-learn's coordinate descent; the hypergradient in
    log(a) and log(c) is that of the weights that are not 0.

    Args:
        penalty: as in `BilevelRidge`, for both strengths.
        cv: as in `BilevelRidge`.
        fit_intercept: likewise.
        max_iter: likewise.
        tol: likewise.
        random_state: likewise.
        scoring: likewise.

    Attributes:
        alpha_: `a + c`, a number or `[n_groups]`; on standardized features, in units of scikit-learn's `ElasticNet`.
        l1_ratio_: `a / (a + c)`.
        best_params_: `{"alpha": alpha_, "l1_ratio": l1_ratio_}`.
        coef_: weights of the features as given, `[d]`; zeros are exact.
        intercept_: b for these.
        best_score_, cv_results_, solution_, n_iter_, n_features_in_: as in `BilevelRidge`.

    Raises:
        ValueError: at `fit`, as in `BilevelRidge`.

    Cost:
        Each point evaluated: one run of coordinate descent for each fold, from the solution before, and a Cholesky
        factor of a d x d matrix for each.

    Notes:
        The loss has kinks where a weight leaves 0, and local minima: a ladder of shared strengths finds the valley, of
        which the descent finds the bottom. `solution_.certificate.margin` says how far from a kink it ended.

    References:
        Bertrand, Klopfenstein, Massias, Blondel, Vaiter, Gramfort, Salmon, "Implicit differentiation for fast
        hyperparameter selection in non-smooth convex learning", JMLR 23, 2022.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> model = BilevelElasticNet().fit(*load_diabetes(return_X_y=True))
        >>> sorted(model.best_params_), round(-model.best_score_ / 10)
        (['alpha', 'l1_ratio'], 299)
    """

    _names: ClassVar[tuple[str, ...]] = ("l1", "l2")

    def _stated(self, folds: Folds, groups: Tensor) -> Statement:
        A, t, s = folds.train.batch
        weighted = (A * s.unsqueeze(-1)).mT
        covariance = weighted @ A
        strongest = float((weighted @ t).abs().max().clamp_min(1e-12).log())
        # Rows times the root of their weight: the sums of squares that coordinate descent knows.
        roots = (len(s[0]) * s).sqrt()
        descents = [
            CoordinateDescent(root.unsqueeze(-1) * inputs, root * targets[:, 0], tol=1e-14)
            for inputs, targets, root in zip(A, t, roots, strict=True)
        ]

        def strength(x: Strengths, name: str) -> Tensor:
            return x[name].exp()[groups] if name in x else torch.zeros(len(groups), dtype=A.dtype)

        def solved(x: Strengths, y: Tensor) -> Lower:
            l1, l2 = strength(x, "l1"), strength(x, "l2")
            y = torch.stack([descent.minimize(l1, l2, row).y for descent, row in zip(descents, y, strict=True)])
            free = (y != 0).to(A)
            inside = covariance * free.unsqueeze(-1) * free.unsqueeze(-2)
            return Lower(y, inside + torch.diag_embed(free * l2 + 1 - free))

        shift = {"l1": strongest, "l2": 0.0}
        problem = Problem(
            upper=squares, lower=halved, blocks=len(A),
            regularizer=ElasticNet(l1=lambda x: strength(x, "l1"), l2=lambda x: strength(x, "l2")),
            upper_set=Box(
                {name: WEAK + shift[name] for name in self._names}, {name: STRONG + shift[name] for name in self._names}
            ),
            upper_data=Full(folds.validation.batch), lower_data=Full(folds.train.batch),
        )  # fmt: skip
        return Statement(problem, solved, torch.zeros_like(A[:, 0]))

    def _starts(self, folds: Folds, groups: Tensor) -> Sequence[Strengths]:
        A, t, s = folds.train.batch
        strongest = float(((A * s.unsqueeze(-1)).mT @ t).abs().max().clamp_min(1e-12).log())
        each = torch.ones(int(groups.max()) + 1, dtype=A.dtype)
        ladder = [strongest + step for step in np.linspace(-0.5, WEAK + 1, 12).tolist()]
        if "l2" not in self._names:
            return [{"l1": value * each} for value in ladder]
        return [{"l1": value * each, "l2": (value + mix) * each} for mix in MIXES for value in ladder]

    def _natural(self, x: Strengths, folds: Folds) -> dict[str, Any]:
        l1, l2 = x["l1"].exp() * folds.target_scale, x["l2"].exp()
        return {
            "alpha": plain(l1 + l2, self.penalty),
            "l1_ratio": plain(l1 / (l1 + l2), self.penalty),
        }


class BilevelLasso(BilevelElasticNet):
    """Lasso whose strength minimizes the cross-validated squared error, or whose strengths do, all at once.

        min_w sum_i s_i (t_i - <w, z_i> - b)^2 / 2n + sum_j alpha_j |w_j|

    z are the features standardized on the samples fitted, n the sum of the s_i. With `alpha_j = alpha` this is
    scikit-learn's `make_pipeline(StandardScaler(), Lasso(alpha))`. See `BilevelElasticNet` for how it is solved.

    Args:
        penalty: as in `BilevelRidge`.
        cv: likewise.
        fit_intercept: likewise.
        max_iter: likewise.
        tol: likewise.
        random_state: likewise.
        scoring: likewise.

    Attributes:
        alpha_: the strengths, a number or `[n_groups]`; on standardized features, in units of scikit-learn's `Lasso`.
        best_params_: `{"alpha": alpha_}`.
        coef_: weights of the features as given, `[d]`; zeros are exact.
        intercept_: b for these.
        best_score_, cv_results_, solution_, n_iter_, n_features_in_: as in `BilevelRidge`.

    Raises:
        ValueError: at `fit`, as in `BilevelRidge`.

    Cost:
        That of `BilevelElasticNet`.

    References:
        As in `BilevelElasticNet`.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> model = BilevelLasso().fit(*load_diabetes(return_X_y=True))
        >>> int((model.coef_ != 0).sum()), round(-model.best_score_ / 10)
        (9, 299)
    """

    _names = ("l1",)

    def _natural(self, x: Strengths, folds: Folds) -> dict[str, Any]:
        return {"alpha": plain(x["l1"].exp() * folds.target_scale, self.penalty)}
