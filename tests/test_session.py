"""The torch.optim-like door, and states as plain data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel
from bilevel import InvalidProblem, Session, Status, implicit, solve
from bilevel.packing import pack, unpack

TASK = bilevel.problems.quadratic()


def test_session_steps_as_solve_does() -> None:
    session = Session(TASK.problem, implicit(), TASK.x0, TASK.y0)
    values = [float(session.step().upper_value) for _ in range(5)]
    solution = solve(TASK.problem, implicit(), TASK.x0, TASK.y0, steps=5)
    assert values == solution.history["upper_value"]
    assert torch.equal(session.x, solution.x)


def test_what_it_shows_is_a_copy() -> None:
    session = Session(TASK.problem, implicit(), TASK.x0, TASK.y0)
    session.step()
    session.x.zero_()
    session.y.zero_()
    assert session.x.any()
    assert session.y.any()


def test_failed_step_leaves_it_where_it_was() -> None:
    problem = bilevel.Problem(
        upper=lambda x, y, b: (y - 1).square().sum(), lower=lambda x, y, b: (x * y).sum() - y.square().sum()
    )
    session = Session(problem, implicit(lower_steps=0), torch.ones(2), torch.zeros(2))
    with pytest.raises(bilevel.LinearSolveFailed):
        session.step()
    assert torch.equal(session.x, torch.ones(2))


def test_state_of_another_shape_or_solver_is_refused_at_load() -> None:
    session = Session(TASK.problem, implicit(), TASK.x0, TASK.y0)
    small = bilevel.problems.quadratic(p=3)
    other = Session(small.problem, implicit(), small.x0, small.y0)
    with pytest.raises(InvalidProblem, match=r"state's x has shape \(3,\)"):
        session.load_state_dict(other.state_dict())
    other.step()
    with pytest.raises(InvalidProblem, match="a Metrics"):
        session.load_state_dict({"state": other.state_dict()["state"]["metrics"], "counts": {}})


def test_a_solver_is_asked_for() -> None:
    with pytest.raises(InvalidProblem, match="expected a Solver"):
        Session(TASK.problem, implicit, TASK.x0, TASK.y0)  # type: ignore[arg-type]


def test_packing_returns_what_it_was_given() -> None:
    session = Session(TASK.problem, implicit(), TASK.x0, TASK.y0)
    session.step()
    state: Any = session._state
    again = unpack(pack(state))
    assert type(again) is type(state)
    assert again.metrics.status is state.metrics.status
    assert torch.equal(again.estimator.w, state.estimator.w)
    assert unpack(pack((Status.STALLED, [1, None]))) == (Status.STALLED, [1, None])


@pytest.mark.parametrize("kind", ["os:system", "nowhere:State", "builtins:tuple"])
def test_unpacking_looks_up_state_classes_only(kind: str) -> None:
    with pytest.raises(InvalidProblem, match="no state class"):
        unpack({"__kind__": kind, "x": 1})


def test_unpacking_refuses_other_fields() -> None:
    packed = pack(solve(TASK.problem, implicit(), TASK.x0, TASK.y0, steps=1).state)
    del packed["largest"]
    with pytest.raises(InvalidProblem, match="expected"):
        unpack(packed)
