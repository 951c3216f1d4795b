"""Feasible starts, what is said where there is none, and what constraints must return."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import Box, Infeasible, InfeasibleStart, InvalidProblem, Problem
from bilevel.dry_run import open_oracles
from bilevel.feasibility import restored
from bilevel.sets.joint import JointHalfspace


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def stated(**fields: Any) -> Problem:
    return Problem(
        upper=lambda x, y, b: (y - 5).square().sum() + x.square().sum(),
        lower=lambda x, y, b: 0.5 * (y - x.sum()).square().sum(),
        **fields,
    )


def opened(problem: Problem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    _, x, y = open_oracles(problem, x, y, needs_hvp=False)
    return x, y


# -- starts ------------------------------------------------------------------------------------------------------------


def test_feasible_starts_are_left_alone() -> None:
    x, y = doubles(0.5), doubles(-1.0, 0.3)
    found = opened(stated(constraint=lambda x, y, b: y - x), x, y)
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], y)


def test_violated_linear_constraints_take_the_least_step_in_y() -> None:
    """y1 + y2 <= x from (3, 1), x = 2: the nearest point is (2, 0)."""
    y0 = doubles(3.0, 1.0)
    x, y = opened(stated(constraint=lambda x, y, b: (y.sum() - x.sum()).reshape(1)), doubles(2.0), y0)
    torch.testing.assert_close(y, doubles(2.0, 0.0))
    assert x.tolist() == [2.0]
    assert y0.tolist() == [3.0, 1.0]


def test_curved_constraints_and_equations_together() -> None:
    problem = stated(
        constraint=lambda x, y, b: (y.square().sum() - 1 - x.square().sum()).reshape(1),
        equality=lambda x, y, b: (y[0] * y[1] - 0.25).reshape(1),
    )
    x, y = opened(problem, doubles(0.5), doubles(3.0, 2.0))
    assert float(y.square().sum()) <= 1.25 + 1e-12
    assert float(y[0] * y[1]) == pytest.approx(0.25, abs=1e-12)
    assert x.tolist() == [0.5]


def test_steps_stay_in_the_lower_set() -> None:
    problem = stated(constraint=lambda x, y, b: (1 - y.sum()).reshape(1), lower_set=Box(0.0, 0.7))
    _, y = opened(problem, doubles(0.0), doubles(-2.0, 0.9))
    assert float(y.sum()) >= 1 - 1e-12
    assert bool(((y >= 0) & (y <= 0.7)).all())


def test_blocks_are_restored_one_by_one() -> None:
    problem = Problem(
        upper=lambda x, y, b: (y - x).square().sum(),
        lower=lambda x, y, b: (y - x).square().sum(),
        constraint=lambda x, y, b: y - b,
        lower_data=bilevel.Full(doubles(1.0, 4.0)[:, None]),
        blocks=2,
    )
    _, y = opened(problem, doubles(0.0), doubles(3.0, 3.0)[:, None])
    torch.testing.assert_close(y, doubles(1.0, 3.0)[:, None])


def test_x_moves_only_where_no_y_is_feasible_and_that_is_told() -> None:
    """y in [0, 1] and x <= y: from x = 3 the nearest x with a feasible y is 1."""
    problem = stated(constraint=lambda x, y, b: x - y, lower_set=Box(0.0, 1.0))
    with pytest.warns(InfeasibleStart, match=r"the start was moved in x by 2\. Pass a feasible x0"):
        x, y = opened(problem, doubles(3.0), doubles(0.0))
    torch.testing.assert_close(x, doubles(1.0))
    torch.testing.assert_close(y, doubles(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, _ = opened(problem, doubles(0.4), doubles(0.0))
    assert x.tolist() == [0.4]


def test_joint_sets_project_both() -> None:
    problem = stated(
        constraint=lambda x, y, b: (x.sum() + y.sum() - 2).reshape(1), joint_set=JointHalfspace(1.0, 1.0, offset=2.0)
    )
    x, y = opened(problem, doubles(3.0), doubles(3.0))
    torch.testing.assert_close(x, doubles(1.0))
    torch.testing.assert_close(y, doubles(1.0))


def test_restoring_counts_a_gradient_for_each_constraint_and_point() -> None:
    problem = stated(constraint=lambda x, y, b: torch.stack([y.sum() - x.sum(), y[0] - 7]))
    oracles, x, _ = open_oracles(problem, doubles(2.0), doubles(0.0, 0.0), needs_hvp=False)
    _, near, rows = restored(oracles, x, doubles(3.0, 1.0))
    torch.testing.assert_close(near, doubles(2.0, 0.0))
    assert rows.inequalities == 2
    assert oracles.counts.gradients == 2 * 2


# -- no start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "of", "index", "amount", "text"),
    [
        (
            "constraint",
            lambda x, y, b: torch.stack([y[0] - 1, y[0].square() + 2]),
            1,
            2.0,
            r"entry 1 of the constraint",
        ),
        ("equality", lambda x, y, b: (y[0].square() + 3).reshape(1), 0, 3.0, r"entry 0 of the equality"),
    ],
)
def test_what_cannot_be_satisfied_is_named_with_its_amount(
    part: str, of: Any, index: int, amount: float, text: str
) -> None:
    with pytest.raises(Infeasible, match=rf"{text} misses by {amount:g} .*at the best point found") as caught:
        opened(stated(**{part: of}), doubles(0.0), doubles(0.0))
    assert caught.value.index == index
    assert caught.value.amount == pytest.approx(amount)


def test_blocks_are_named() -> None:
    problem = Problem(
        upper=lambda x, y, b: (y - x).square().sum(),
        lower=lambda x, y, b: (y - x).square().sum(),
        constraint=lambda x, y, b: y.square() + b,
        lower_data=bilevel.Full(doubles(-1.0, 4.0)[:, None]),
        blocks=2,
    )
    with pytest.raises(Infeasible, match=r"entry 0 of the constraint of block 1 misses by 4"):
        opened(problem, doubles(0.0), doubles(0.0, 0.0)[:, None])


def test_a_flipped_sign_is_suspected() -> None:
    """1 + y² >= 0 was meant, which holds everywhere."""
    with pytest.raises(Infeasible, match=r"was c >= 0 meant\? Then return -c"):
        opened(stated(constraint=lambda x, y, b: 1 + y.square()), doubles(0.0), doubles(1.0))
    two = stated(constraint=lambda x, y, b: torch.cat([1 + y.square(), y - 9]))
    with pytest.raises(Infeasible) as caught:
        opened(two, doubles(0.0), doubles(1.0))
    assert "was c >= 0 meant" not in str(caught.value)


# -- what constraints must return --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["constraint", "equality"])
@pytest.mark.parametrize(
    ("of", "text"),
    [
        (lambda x, y, b: y.sum() - x.sum(), r"returned shape \(\); for one entry use \.reshape\(1\)"),
        (lambda x, y, b: (y - x).reshape(1, 1), r"returned shape \(1, 1\)"),
        (lambda x, y, b: (y - x)[:0], r"returned shape \(0,\)"),
        (lambda x, y, b: y <= x, r"returned torch\.bool; return the amount, such as a - b"),
        (lambda x, y, b: [y - x], r"returned a list; stack the entries into one Tensor"),
        (lambda x, y, b: (y - x).item(), r"returned a float; stack"),
        (lambda x, y, b: torch.cat([y, y.log()]), r"is not finite in entry 1 at the start"),
        (lambda x, y, b: (y - x).detach(), r"does not depend on y; what binds x alone belongs in upper_set"),
        (lambda x, y, b: x - 1, r"does not depend on y"),
    ],
    ids=["0-dim", "2-dim", "empty", "bool", "list", "float", "nan", "detached", "x-alone"],
)
def test_wrong_constraints_are_refused_with_the_convention(part: str, of: Any, text: str) -> None:
    expected = "where <= 0" if part == "constraint" else "where = 0"
    with pytest.raises(InvalidProblem, match=rf"the {part} {text}.*Expected: {part}\(x, y, batch\).*{expected}"):
        opened(stated(**{part: of}), doubles(1.0), doubles(-0.5))


def test_joint_sets_that_are_no_projection_are_refused() -> None:
    problem = stated(constraint=lambda x, y, b: y - 9, joint_set=lambda x, y: (x, y - 0.1))
    with pytest.raises(InvalidProblem, match="joint_set is no projection: applied twice it moves the start"):
        opened(problem, doubles(0.0), doubles(0.0))


def test_joint_sets_that_disagree_with_the_constraints_are_refused() -> None:
    problem = stated(
        constraint=lambda x, y, b: (x.sum() + y.sum() - 1).reshape(1), joint_set=JointHalfspace(1.0, 1.0, offset=2.0)
    )
    with pytest.raises(InvalidProblem, match=r"joint_set and the constraints disagree: entry 0 is 1 at the projected"):
        opened(problem, doubles(3.0), doubles(3.0))
