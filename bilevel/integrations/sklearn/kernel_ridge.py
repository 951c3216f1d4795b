"""Kernel ridge regression: its decay and the scales of its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from bilevel.data import Full
from bilevel.integrations.sklearn._base import Statement, plain
from bilevel.integrations.sklearn._descent import Lower, Strengths, cholesky
from bilevel.integrations.sklearn._folds import Folds
from bilevel.integrations.sklearn._regressor import Regressor
from bilevel.integrations.sklearn._secant import Secant
from bilevel.problem import Problem
from bilevel.regularizers import L2
from bilevel.sets import Box

ALPHAS, GAMMAS = (-14.0, 7.0), (-9.0, 3.0)
"""Logarithms of the least and the largest alpha, and gamma times the number of features."""


class BilevelKernelRidge(Regressor):
    """Kernel ridge regression whose decay and kernel widths minimize the cross-validated squared error, all at once.

        (K + alpha diag(1 / s)) a = t - b,   K_ij = exp(-sum_j gamma_j (z_ij - z_i'j)^2),   prediction <k(z), a> + b

    z are the features standardized on the samples fitted, and b the mean target. With `gamma_j = gamma` this is
    scikit-learn's `make_pipeline(StandardScaler(), KernelRidge(alpha, kernel="rbf", gamma=gamma))` on centered targets.
    The folds are the blocks of one bilevel problem, `a` its lower variables; each is solved exactly by its Cholesky
    factor, which also solves the linear system of the hypergradient in log(alpha) and log(gamma).

    Args:
        penalty: of gamma. "shared": one; "feature": one for each feature (automatic relevance); or an array `[d]` of
            labels: one for each group. There is one alpha.
        cv: as in `BilevelRidge`.
        fit_intercept: subtract b from the targets, and center the features.
        max_iter: as in `BilevelRidge`.
        tol: likewise.
        random_state: likewise.
        scoring: likewise, with alpha alone moved around the best.

    Attributes:
        alpha_: a number, in units of scikit-learn's `KernelRidge`.
        gamma_: a number or `[n_groups]`; on standardized features.
        best_params_: `{"alpha": alpha_, "gamma": gamma_}`.
        dual_coef_: a, `[n]`, of the samples that have a weight.
        X_fit_: their standardized features, `[n, d]`.
        intercept_: b.
        best_score_, cv_results_, solution_, n_iter_, n_features_in_: as in `BilevelRidge`.

    Raises:
        ValueError: at `fit`, as in `BilevelRidge`.

    Cost:
        Each point evaluated: `n^3 / 3 + n^2 d` operations for each fold, and a few n x n matrices of memory for each.

    References:
        Chapelle, Vapnik, Bousquet, Mukherjee, "Choosing multiple parameters for support vector machines", Machine
        Learning 46, 2002 (one scale a feature, by gradients).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X = rng.uniform(-2, 2, (60, 2))
        >>> model = BilevelKernelRidge("feature").fit(X, np.sin(2 * X[:, 0]))
        >>> bool(model.gamma_[0] > 10 * model.gamma_[1]), bool(model.score(X, np.sin(2 * X[:, 0])) > 0.99)
        (True, True)
    """

    def predict(self, X: Any) -> Any:
        """Return predictions `[n]` for features `[n, d]`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        inputs = torch.as_tensor((X - self._center) / self._scale)
        found = kernel(inputs, torch.as_tensor(self.X_fit_), torch.as_tensor(self._gammas))
        return (found @ torch.as_tensor(self.dual_coef_)).numpy() + self.intercept_

    def _stated(self, folds: Folds, groups: Tensor) -> Statement:
        A, t, s = folds.train.batch
        # Padded rows have no kernel with any other, so that their coefficients are 0.
        present = (s > 0).to(A)
        share = s * folds.total[:, None] * present + (1 - present)

        def gammas(x: Strengths) -> Tensor:
            return x["gamma"].exp()[groups]

        def lower(x: Any, y: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            inputs, targets, there = batch
            masked = there * y
            return masked @ (kernel(inputs, inputs, gammas(x)) @ masked) / 2 - targets[:, 0] @ masked

        def upper(x: Any, y: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
            inputs, targets, weights, fitted, there = batch
            found = kernel(inputs, fitted, gammas(x)) @ (there * y)
            return (weights * (found - targets[:, 0]).square()).sum()

        def decay(x: Strengths) -> Tensor:
            return x["alpha"].exp() / share

        def solved(x: Strengths, y: Tensor) -> Lower:
            gram = kernel(A, A, gammas(x)) * present.unsqueeze(-1) * present.unsqueeze(-2)
            hessian = gram + torch.diag_embed(decay(x))
            return Lower(torch.cholesky_solve(t * present.unsqueeze(-1), cholesky(hessian)).squeeze(-1), hessian)

        shift = -float(np.log(len(groups)))
        bounds = [{"alpha": ALPHAS[i], "gamma": GAMMAS[i] + shift} for i in range(2)]
        problem = Problem(
            upper=upper, lower=lower, regularizer=L2(decay), upper_set=Box(*bounds), blocks=len(A),
            upper_data=Full((*folds.validation.batch, A, present)), lower_data=Full((A, t, present)),
        )  # fmt: skip
        return Statement(problem, solved, torch.zeros_like(t[..., 0]), Secant())

    def _starts(self, folds: Folds, groups: Tensor) -> Sequence[Strengths]:
        each = torch.ones(int(groups.max()) + 1, dtype=torch.float64)
        shift = -float(np.log(len(groups)))
        return [
            {"alpha": alpha * each[:1], "gamma": (gamma + shift) * each}
            for gamma in (-5.0, -2.5, 0.0)
            for alpha in (2.0, -1.0, -4.0, -7.0)
        ]

    def _factor(self, x: Strengths, log: float) -> Strengths:
        return super()._factor(x, log) | {"gamma": torch.zeros_like(x["gamma"])}

    def _natural(self, x: Strengths, folds: Folds) -> dict[str, Any]:
        return {"alpha": float(x["alpha"].exp()), "gamma": plain(x["gamma"].exp(), self.penalty)}

    def _learned(self, y: Tensor, folds: Folds) -> None:
        groups = self._groups(folds.scale.shape[1]).numpy()
        self._gammas = np.atleast_1d(self.best_params_["gamma"])[groups]
        self._center, self._scale = folds.center[0].numpy(), folds.scale[0].numpy()
        self.X_fit_ = folds.train.inputs[0].numpy()
        self.dual_coef_ = (y[0] * folds.target_scale).numpy()
        self.intercept_ = float(folds.target_center[0, 0])


def kernel(left: Tensor, right: Tensor, gammas: Tensor) -> Tensor:
    """Return `exp(-sum_j gamma_j (a_j - b_j)^2)` for all pairs of rows, `[*, n, n']`."""
    roots = gammas.sqrt()
    a, b = left * roots, right * roots
    squared = a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1).unsqueeze(-2) - 2 * a @ b.mT
    return (-squared.clamp_min(0)).exp()
