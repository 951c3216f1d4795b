"""The support vector machine: stationary at the C found, close to scikit-learn's, and right for several classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from bilevel.integrations.sklearn import BilevelLinearSVC
from bilevel.integrations.sklearn._newton import SquaredHinge


def test_refit_is_scikit_learns_machine_where_it_hardly_decays_the_intercept() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    model = BilevelLinearSVC().fit(X, y)
    scaled = StandardScaler().fit_transform(X)
    theirs = LinearSVC(C=model.C_, dual=False, tol=1e-10, intercept_scaling=100.0, max_iter=100_000).fit(scaled, y)
    np.testing.assert_allclose(model.decision_function(X), theirs.decision_function(scaled), atol=1e-3)
    assert model.score(X, y) > 0.98


def test_several_classes_are_machines_of_their_own() -> None:
    X, y = load_iris(return_X_y=True)
    model = BilevelLinearSVC().fit(X, y)
    scores = model.decision_function(X)
    signs = np.where(y[:, None] == np.arange(3), 1.0, -1.0)
    slopes = np.where(1 - signs * scores > 0, -2 * signs * (1 - signs * scores), 0.0)
    scale = X.std(0)
    gradient = model.C_ * slopes.T @ ((X - X.mean(0)) / scale) + model.coef_ * scale
    np.testing.assert_allclose(gradient, 0, atol=1e-6 * model.C_ * len(X))
    assert model.coef_.shape == (3, 4)
    assert model.score(X, y) > 0.9


def test_score_is_the_mean_squared_hinge_over_folds() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    splits = [(np.arange(300), np.arange(300, 569)), (np.arange(200, 569), np.arange(200))]
    model = BilevelLinearSVC(cv=splits).fit(X, y)
    losses = []
    for train, judge in splits:
        scaler = StandardScaler().fit(X[train])
        part = LinearSVC(C=model.C_, dual=False, tol=1e-10, intercept_scaling=100.0, max_iter=100_000)
        scores = part.fit(scaler.transform(X[train]), y[train]).decision_function(scaler.transform(X[judge]))
        losses.append(np.square(np.maximum(0, 1 - (2 * y[judge] - 1) * scores)).mean())
    assert -model.best_score_ == pytest.approx(np.mean(losses), rel=1e-3)


def test_formulas_are_derivatives() -> None:
    t = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]], dtype=torch.float64)
    scores = torch.tensor([[0.3, -2.0, 0.4], [0.5, -0.7, 0.2]], dtype=torch.float64, requires_grad=True)
    loss = SquaredHinge()
    (slopes,) = torch.autograd.grad(loss.value(scores, t).sum(), scores, create_graph=True)
    torch.testing.assert_close(loss.slopes(scores, t), slopes)
    (curvature,) = torch.autograd.grad(slopes.sum(), scores)
    torch.testing.assert_close(loss.curvatures(scores, t), torch.diag_embed(curvature))
