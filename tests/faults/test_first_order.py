"""Faults as the first-order solvers meet them: steps too long, no curvature, values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, DataSource, InvalidProblem, NonFinite, Problem, Solver, Status
from bilevel.solvers import BAMM, BDA, BOME, F2BA, F2SA, F3SA, GPBGD, LVHBA, MEHA, VPBGD, ProxF2SA

LONG: dict[str, Callable[[float], Solver[Any]]] = {
    "F2SA": lambda lr: F2SA(upper=SGD(lr)),
    "F3SA": lambda lr: F3SA(upper=SGD(lr)),
    "F2BA": lambda lr: F2BA(upper=SGD(lr)),
    "ProxF2SA": lambda lr: ProxF2SA(upper=SGD(lr)),
    "BDA": lambda lr: BDA(upper=SGD(lr)),
    "VPBGD": lambda factor: VPBGD(upper_factor=factor),
    "GPBGD": lambda factor: GPBGD(upper_factor=factor),
    "BAMM": lambda factor: BAMM(upper_factor=factor),
    "BOME": lambda factor: BOME(upper_factor=factor),
    "MEHA": lambda factor: MEHA(upper_factor=factor),
    "LVHBA": lambda factor: LVHBA(upper_factor=factor),
}
"""Name -> solver with upper steps of a length, or of so many times its own."""

UNSTABLE: dict[str, Solver[Any]] = {
    "F2SA": F2SA(lower_lr=3.0),
    "F3SA": F3SA(lower_lr=3.0),
    "F2BA": F2BA(lower_lr=3.0),
    "ProxF2SA": ProxF2SA(lower_lr=3.0),
    "BDA": BDA(lr=3.0),
    "VPBGD": VPBGD(lower_lr=3.0),
    "VPBGD, joint": VPBGD(lr=3.0),
    "GPBGD": GPBGD(lr=3.0),
    "BAMM": BAMM(lr=3.0),
    "BOME": BOME(lower_lr=3.0),
    "BOME, joint": BOME(lr=3.0),
    "MEHA": MEHA(lr=3.0),
    "LVHBA": LVHBA(lr=3.0),
}
"""The lower curvature being 1, no step of 2 or more is stable."""


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def track(x: Tensor, y: Tensor, _: Any) -> Tensor:
    """A lower objective with y*(x) = x and curvature 1."""
    return 0.5 * (y - x).square().sum()


def steep(x: Tensor, y: Tensor, _: Any) -> Tensor:
    """An upper objective that overflows 27 away from its minimizer."""
    return (y - 1).square().sum().exp()


STEEP = Problem(upper=steep, lower=track)


# -- row 6 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LONG)
def test_row_06_hopeless_upper_steps_stall_at_the_last_good_point(name: str) -> None:
    solver = LONG[name](1e12)
    solution = bilevel.solve(STEEP, solver, doubles(2.0), doubles(2.0), steps=40, on_nonfinite="backtrack")
    assert solution.status is Status.STALLED
    assert "lower lr" in solution.message
    assert "after 10 halvings" in solution.message
    assert solution.x.tolist() == solution.best_x.tolist() == [2.0]
    assert math.isfinite(float(steep(solution.x, solution.y, None)))


@pytest.mark.parametrize("name", LONG)
def test_row_06_without_backtracking_they_end_as_diverged(name: str) -> None:
    solution = bilevel.solve(STEEP, LONG[name](1e12), doubles(2.0), doubles(2.0), steps=40)
    assert solution.status is Status.DIVERGED
    assert "ran away at step" in solution.message
    assert solution.x.tolist() == [2.0]
    assert math.isfinite(float(steep(solution.x, solution.y, None)))


@pytest.mark.parametrize(("name", "length"), [("F2SA", 6.0), ("F2BA", 6.0), ("ProxF2SA", 100.0), ("BDA", 6.0),
                                              ("LVHBA", 10.0)])  # fmt: skip
def test_row_06_long_upper_steps_are_shortened_until_they_serve(name: str, length: float) -> None:
    start, solver = doubles(2.0), LONG[name](length)
    with pytest.raises((NonFinite, bilevel.SolveFailed)) as caught:
        bilevel.solve(STEEP, solver, start, start, steps=60, throw=True)
    assert all(bool(leaf.isfinite().all()) for leaf in caught.value.last_good)
    solution = bilevel.solve(STEEP, solver, start, start, steps=60, on_nonfinite="backtrack")
    assert solution.status is Status.COMPLETED
    assert float(solution.x) == pytest.approx(1.0, abs=2e-2)


@pytest.mark.parametrize("name", UNSTABLE)
def test_row_06_lower_steps_that_cannot_be_stable_are_refused(name: str) -> None:
    problem = Problem(upper=lambda x, y, b: 0.5 * (y - 1).square().sum(), lower=track)
    with pytest.raises(InvalidProblem, match=r"lr=3 is outside \(0, "):
        bilevel.solve(problem, UNSTABLE[name], doubles(2.0, 0.0), doubles(2.0, 1.0), steps=5)


# -- row 29 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LONG if name not in {"MEHA", "LVHBA"}])
@pytest.mark.parametrize("start", [-3.0, 2.0])
def test_row_29_piecewise_linear_lower_objectives_are_refused(name: str, start: float) -> None:
    """Steps of a measured length would be 1 / 0. From 2 = x even the gradient of g is 0."""
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square().sum() + 0.1 * x.square().sum(),
        lower=lambda x, y, b: (y - x - 1).relu().sum() + (x - 1 - y).relu().sum(),
    )
    with pytest.raises(InvalidProblem, match=r"no curvature in y at the start.*regularizer.*MEHA"):
        bilevel.solve(problem, LONG[name](0.1), doubles(2.0, 2.0), doubles(start, start), steps=5)


# -- rows 1 to 3 -------------------------------------------------------------------------------------------------------


class Scales(DataSource):
    """The batch of each step is a number: `special` at one step, 1 at all others."""

    def __init__(self, special: float, at: int) -> None:
        self.special, self.at = special, at

    @property
    def deterministic(self) -> bool:
        return False

    def batch(self, step: int, seed: int) -> Tensor:
        return doubles(self.special if step == self.at else 1.0)


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_01_to_03_what_is_not_finite_never_replaces_the_last_good_point(
    name: str, level: str, value: float
) -> None:
    """One batch is bad, as one broken example would make it."""
    problem = Problem(
        upper=lambda x, y, b: 0.5 * ((1 if b is None else b) * (y - 1).square()).sum(),
        lower=lambda x, y, b: 0.5 * ((1 if b is None else b) * (y - x).square()).sum(),
        **{f"{level}_data": Scales(value, at=37)},
    )
    zero, seen = doubles(0.0, 0.5), []
    with pytest.raises(NonFinite, match=r"(is|are) (nan|inf|not finite).*on_nonfinite='skip' or 'backtrack'") as caught:
        bilevel.solve(
            problem, LONG[name](0.05), zero, zero, steps=40, callbacks=[lambda event: seen.append(event.x.clone())]
        )
    x, y = caught.value.last_good
    assert bool(x.isfinite().all() & y.isfinite().all())
    assert all(bool(point.isfinite().all()) for point in seen)
    ended = bilevel.solve(problem, LONG[name](0.05), zero, zero, steps=40, on_nonfinite="backtrack")
    for point in (ended.x, ended.y, ended.best_x, ended.best_y):
        assert bool(point.isfinite().all())
    skipped = bilevel.solve(problem, LONG[name](0.05), zero, zero, steps=45, on_nonfinite="skip")
    assert skipped.status is Status.COMPLETED
    assert bool(skipped.x.isfinite().all() & skipped.y.isfinite().all())
