"""Logistic regression: scikit-learn's own answers at the decays found, for two classes and more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.integrations.sklearn import BilevelLogisticRegression, _newton
from bilevel.integrations.sklearn._newton import Inverse, Logistic, Loss, Softmax, newton

LOADERS = {"two classes": load_breast_cancer, "three classes": load_iris}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_refit_and_score_are_scikit_learns_at_the_decay_found(loader: Any) -> None:
    X, y = loader(return_X_y=True)
    model = BilevelLogisticRegression().fit(X, y)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=model.C_, tol=1e-10, max_iter=10_000))
    again = cross_val_score(theirs, X, y, cv=5, scoring="neg_log_loss").mean()
    assert model.best_score_ == pytest.approx(again, rel=1e-5)
    np.testing.assert_allclose(model.predict_proba(X), theirs.fit(X, y).predict_proba(X), atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1.0)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), model.predict_proba(X))
    assert model.coef_.shape == theirs[-1].coef_.shape
    assert model.intercept_.shape == theirs[-1].intercept_.shape
    assert model.score(X, y) > 0.95


def test_classes_may_be_words() -> None:
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])
    model = BilevelLogisticRegression().fit(X, names[y])
    assert model.classes_.tolist() == names.tolist()
    assert set(model.predict(X)) == set(names)


def test_without_intercept_scores_pass_through_zero() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    model = BilevelLogisticRegression(fit_intercept=False).fit(X, y)
    assert model.intercept_.tolist() == [0.0]
    np.testing.assert_array_equal(model.decision_function(0 * X), 0.0)


LOSSES = {"logistic": (Logistic(), 1), "softmax": (Softmax(), 3)}


def problem(classes: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, 30, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, max(classes, 2), (2, 30), generator=generator)
    t = labels.unsqueeze(-1) if classes == 1 else torch.nn.functional.one_hot(labels, classes)
    s = torch.rand(2, 30, generator=generator, dtype=torch.float64)
    return (A, t.double(), s / s.sum(-1, keepdim=True)), torch.full((2, 4 * classes), 1e-3, dtype=torch.float64)


@pytest.mark.parametrize(("loss", "classes"), LOSSES.values(), ids=LOSSES)
def test_formulas_are_derivatives(loss: Loss, classes: int) -> None:
    (_, t, _), _ = problem(classes)
    scores = torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(loss.value(scores, t).sum(), scores, create_graph=True)
    torch.testing.assert_close(loss.slopes(scores, t), slopes)
    rows = [torch.autograd.grad(slopes[..., a].sum(), scores, retain_graph=True)[0] for a in range(classes)]
    torch.testing.assert_close(loss.curvatures(scores, t), torch.stack(rows, -2))


@pytest.mark.parametrize("dense", [1000, 0], ids=["newton", "l-bfgs"])
@pytest.mark.parametrize(("loss", "classes"), LOSSES.values(), ids=LOSSES)
def test_newton_ends_where_the_gradient_vanishes(
    loss: Loss, classes: int, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_newton, "DENSE", dense)
    (A, t, s), decay = problem(classes)
    start = torch.full_like(decay, 20.0)  # far off, where curvatures are almost zero
    y, hessian = newton(loss, (A, t, s), decay, start)
    leaf = y.clone().requires_grad_()

    def objective(y: torch.Tensor) -> torch.Tensor:
        return (s * loss.value(A @ y.view(2, 4, -1), t)).sum() + (decay * y.square()).sum() / 2

    assert torch.autograd.grad(objective(leaf), leaf)[0].norm() < (1e-9 if dense else 1e-7)
    whole = torch.autograd.functional.hessian(objective, y)
    for k in range(2):
        exact = whole[k, :, k]
        if not dense:
            torch.testing.assert_close(hessian[k], exact.diagonal(), rtol=1e-5, atol=1e-9)
            continue
        # It may be that of an earlier step, close enough to precondition with.
        ratios = torch.linalg.eigvals(torch.linalg.solve(hessian[k], exact)).real
        assert ratios.min() > 1 / 4
        assert ratios.max() < 4


def test_a_stale_inverse_learns_from_its_steps_in_each_fold_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    exact = root @ root.mT + torch.eye(5, dtype=torch.float64)
    stale = torch.diag_embed(exact.diagonal(dim1=-2, dim2=-1))
    inverse = Inverse(torch.linalg.cholesky(stale))
    y = torch.zeros(2, 5, dtype=torch.float64)
    change = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    change[1] = 0  # this fold stands still
    inverse(y, 0 * y)
    z = (exact @ change.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(inverse(y + change, z)[0], change[0], rtol=1e-10, atol=0)  # the secant equation
    g = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(inverse(y + change, g)[1], g[1] / stale[1].diagonal(), rtol=1e-10, atol=0)
