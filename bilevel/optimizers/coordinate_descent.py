"""scikit-learn's coordinate descent for least squares with an elastic net penalty."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.extras import extra
from bilevel.optimizers._base import Minimum
from bilevel.status import InvalidProblem, Status


@final
@dataclass(frozen=True, eq=False)
class CoordinateDescent:
    """Minimize `‖A y - t‖² / 2n + sum_j a_j |y_j| + 1/2 w_j y_j²` with scikit-learn, `a_j > 0`, `w_j >= 0`.

    It solves in the columns of A divided by a, with a row `sqrt(n w_j) e_j` below A where w is not 0, so that its one
    weight is 1. Much faster than proximal gradients where A has many columns and the solution few entries.

    Args:
        inputs: A, `[n, d]`.
        targets: t, `[n]`.
        tol: > 0, of the duality gap relative to `‖t‖² / n`.
        max_steps: >= 1, passes over all columns.

    Raises:
        InvalidProblem: shapes do not fit.

    Cost:
        O(n d) a pass, on the CPU in float64.

    References:
        Friedman, Hastie, Tibshirani (2010), "Regularization paths for generalized linear models via coordinate
        descent", J. Statistical Software 33(1).

    Example:
        >>> descent = CoordinateDescent(torch.eye(2), torch.tensor([3.0, 0.5]))
        >>> descent.minimize(torch.tensor(0.5), torch.tensor(0.0), torch.zeros(2)).y
        tensor([2., 0.])
    """

    inputs: Tensor
    targets: Tensor
    tol: float = 1e-12
    max_steps: int = 100_000

    def __post_init__(self) -> None:
        if self.inputs.dim() != 2 or self.targets.shape != self.inputs.shape[:1]:
            raise InvalidProblem(
                f"CoordinateDescent needs inputs [n, d] and targets [n], got {tuple(self.inputs.shape)} and "
                f"{tuple(self.targets.shape)}."
            )
        if not self.tol > 0 or self.max_steps < 1:
            raise InvalidProblem(f"CoordinateDescent needs tol > 0 and max_steps >= 1, got {self}.")

    def value_and_gradient(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return `‖A y - t‖² / 2n` and its gradient: what the lower objective must be."""
        residual = self.inputs @ y - self.targets
        return residual.square().sum() / (2 * len(residual)), self.inputs.T @ residual / len(residual)

    def minimize(self, l1: Tensor, l2: Tensor, y0: Tensor, *, max_steps: int | None = None) -> Minimum:
        """Minimize from y0.

        Args:
            l1: a, `[]` or `[d]`.
            l2: w, `[]` or `[d]`.
            y0: `[d]`, where to start; not changed.
            max_steps: replaces `self.max_steps`.

        Returns:
            The point, with the largest violation of its optimality conditions as `gradient_norm`. CONVERGED, or
            STEP_LIMIT where scikit-learn says so.

        Raises:
            InvalidProblem: a weight in l1 is 0, y0 has another shape.
            MissingPackage: scikit-learn is not installed.
        """
        with extra("sklearn", {"sklearn": "scikit-learn"}, "CoordinateDescent"):
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.linear_model import enet_path
        inputs, targets = self.inputs.double().cpu(), self.targets.double().cpu()
        n, d = inputs.shape
        if y0.shape != (d,):
            raise InvalidProblem(f"CoordinateDescent: the inputs have {d} columns, but y has shape {tuple(y0.shape)}.")
        a, w = (weight.double().cpu().expand(d) for weight in (l1, l2))
        if not bool((a > 0).all()):
            raise InvalidProblem("CoordinateDescent needs l1 weights > 0; use ProximalGradient for free entries.")
        if bool((w > 0).any()):
            inputs = torch.cat([inputs, (n * w).sqrt().diag()])
            targets = torch.cat([targets, targets.new_zeros(d)])
        # scikit-learn divides the sum of squares by the number of rows it is given.
        scale = (len(inputs) / n) ** 0.5
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, path, _ = enet_path(
                (scale * inputs / a).numpy(),
                (scale * targets).numpy(),
                l1_ratio=1.0,
                alphas=[1.0],
                coef_init=(a * y0.double().cpu()).numpy(),
                tol=self.tol,
                max_iter=self.max_steps if max_steps is None else max_steps,
            )
        y = torch.as_tensor(path[:, 0]) / a
        # Rows of l2, if any, are part of the inputs here.
        slope = inputs.T @ (inputs @ y - targets) / n
        violation = torch.where(y == 0, (slope.abs() - a).clamp_min(0), (slope + a * y.sign()).abs())
        limited = any(issubclass(entry.category, ConvergenceWarning) for entry in caught)
        value, _ = self.value_and_gradient(y.to(self.inputs))
        status = Status.STEP_LIMIT if limited else Status.CONVERGED
        return Minimum(y.to(y0), value.to(y0), violation.max().to(y0), status, 0, 0)
