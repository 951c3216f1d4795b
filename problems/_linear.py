"""What ready problems with linear models share: losses, the statement, and the judges on test data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import functional as F

from bilevel.data import Full
from bilevel.problem import Problem
from bilevel.problems._datasets import Part, Split

Judge: TypeAlias = Callable[[Any, Any], dict[str, Any]]


def squares(x: Any, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return `‖A y - t‖^2 / 2n`."""
    return 0.5 * (batch[0] @ y - batch[1]).square().mean()


def logits(y: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Return the scores of a linear classifier with an intercept."""
    return inputs @ y["weight"] + y["bias"]


def cross_entropy(x: Any, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy of targets 0 and 1."""
    return F.binary_cross_entropy_with_logits(logits(y, batch[0]), batch[1])


def stated(loss: Callable[..., Tensor], split: Split, **parts: Any) -> Problem:
    """State a problem that has one loss at both levels: on training data below, on validation data above.

    Args:
        loss: of (x, y, batch).
        split: the data.
        parts: further arguments of `Problem`.
    """
    upper, lower = (Full((part.inputs, part.targets)) for part in (split.validation, split.train))
    return Problem(upper=loss, lower=loss, upper_data=upper, lower_data=lower, **parts)


def regression_judge(test: Part) -> Judge:
    """Return what says how well a linear model predicts numbers that no solver has seen."""

    def judge(x: Any, y: Any) -> dict[str, Any]:
        error = (test.inputs @ y - test.targets).square().mean()
        explained = 1 - error / (test.targets - test.targets.mean()).square().mean()
        return {"test_mse": float(error), "test_r2": float(explained)}

    return judge


def classification_judge(test: Part) -> Judge:
    """Return what says how well a linear model tells apart samples that no solver has seen."""

    def judge(x: Any, y: Any) -> dict[str, Any]:
        found = logits(y, test.inputs)
        return {
            "test_accuracy": float(((found > 0) == (test.targets > 0.5)).double().mean()),
            "test_loss": float(F.binary_cross_entropy_with_logits(found, test.targets)),
        }

    return judge
