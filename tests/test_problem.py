"""What a problem says of its own lower level."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel

L1, L2, BOX = bilevel.L1(0.1), bilevel.L2(0.1), bilevel.Box(0.0, 1.0)
NET = bilevel.ElasticNet(0.1, 0.2)


def total(x: Any, y: Any, batch: Any) -> torch.Tensor:
    return (x - y).square().sum()


def rows(x: Any, y: Any, batch: Any) -> torch.Tensor:
    return y[:1] - x[:1]


@pytest.mark.parametrize(
    ("fields", "kinked", "proximal", "constrained", "beyond"),
    [
        ({}, False, False, False, ()),
        ({"regularizer": L2}, False, False, False, ()),
        ({"regularizer": L1}, True, True, False, ("regularizer",)),
        ({"regularizer": NET}, True, True, False, ("regularizer",)),
        ({"lower_set": BOX}, False, True, False, ("lower_set",)),
        ({"lower_set": BOX, "regularizer": L2}, False, True, False, ("lower_set",)),
        ({"lower_set": BOX, "regularizer": L1}, True, True, False, ("lower_set", "regularizer")),
        ({"constraint": total}, False, False, True, ("constraint",)),
        ({"equality": total}, False, False, True, ("equality",)),
        (
            {"equality": total, "constraint": total, "regularizer": L1, "lower_set": BOX},
            True, True, True, ("lower_set", "constraint", "equality", "regularizer"),
        ),
        ({"upper_set": BOX}, False, False, False, ()),
    ],
)  # fmt: skip
def test_what_the_lower_level_is_made_of(
    fields: dict[str, Any], kinked: bool, proximal: bool, constrained: bool, beyond: tuple[str, ...]
) -> None:
    problem = bilevel.Problem(upper=total, lower=total, **fields)
    assert (problem.kinked, problem.proximal, problem.constrained) == (kinked, proximal, constrained)
    assert problem.beyond_smooth == beyond


@pytest.mark.parametrize("estimator", [bilevel.Implicit(), bilevel.OneStep(), bilevel.Unrolled()])
@pytest.mark.parametrize(
    ("field", "value"), [("regularizer", L1), ("lower_set", BOX), ("constraint", rows), ("equality", rows)]
)
def test_estimators_of_smooth_lower_levels_refuse_the_rest_by_name(estimator: Any, field: str, value: Any) -> None:
    problem = bilevel.Problem(upper=total, lower=total, **{field: value})
    with pytest.raises(bilevel.InvalidProblem, match=rf"{type(estimator).__name__} does not handle Problem\({field}="):
        bilevel.hypergradient(problem, torch.ones(2), torch.full((2,), 0.5), estimator=estimator)
