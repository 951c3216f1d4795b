"""LV-HBA: its direction, its value function, its fixed point, its price, what it solves, and the traps around it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import L2, Box, InvalidProblem, Problem, Status
from bilevel.dry_run import open_oracles
from bilevel.optimizers import Power
from bilevel.oracles import Oracles
from bilevel.problems import Task, toys
from bilevel.sets.joint import JointHalfspace, JointPolyhedron
from bilevel.solvers.lv_hba import LVHBA, LVHBAState
from bilevel.status import Diverged, MultiplierAtBound

STEADY = Power(1.0, 0.3)


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def start(task: Task, solver: LVHBA) -> tuple[Oracles, LVHBAState]:
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False)
    return oracles, solver.init(oracles, x, y)


def errors(task: Task, solver: LVHBA, steps: int) -> dict[str, Any]:
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps)
    assert solution.status is Status.COMPLETED
    assert task.evaluate is not None
    return task.evaluate(solution.x, solution.y)


# -- what a step is: on g = (y - 3)² / 2, c = x + y - 2 ----------------------------------------------------------------


def value(x: Tensor, y: Tensor, z: Tensor, gamma: float, dual_gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return v(x, y, z) and its saddle point in closed form."""
    # (t - 3) + l + (t - y) / gamma = 0  and  l = z + dual_gamma (x + t - 2), or l = 0 where that is negative
    inside = (3 - z - dual_gamma * (x - 2) + y / gamma) / (1 + dual_gamma + 1 / gamma)
    multiplier = z + dual_gamma * (x + inside - 2)
    outside = (3 + y / gamma) / (1 + 1 / gamma)
    theta = torch.where(multiplier > 0, inside, outside)
    multiplier = multiplier.clamp_min(0)
    v = 0.5 * (theta - 3) ** 2 + multiplier * (x + theta - 2) + (theta - y) ** 2 / (2 * gamma)
    return v - (multiplier - z) ** 2 / (2 * dual_gamma), theta, multiplier


@pytest.mark.parametrize("point", [(0.3, 1.1, 0.8), (-0.5, 0.2, 0.1), (1.0, -1.0, 2.0)])
def test_direction_is_the_gradient_of_the_penalized_value_function(point: tuple[float, ...]) -> None:
    x, y, z = (torch.tensor([v], dtype=torch.float64) for v in point)
    assert float(x + y) < 2  # inside, where the projection does nothing
    gamma, dual_gamma, penalty = 0.7, 0.4, 2.5
    task = toys.ineq()
    solver = LVHBA(gamma=gamma, multiplier_gamma=dual_gamma, penalty=penalty, lr=0.1, upper_lr=1e-3, tracker_lr=1e-3)
    oracles, state = start(task, solver)
    _, theta, multiplier = value(x, y, z, gamma, dual_gamma)
    after = solver.step(oracles, state._replace(x=x, y=y, tracker=z, theta=theta, multiplier=multiplier))
    torch.testing.assert_close(after.theta, theta)
    torch.testing.assert_close(after.multiplier, multiplier)
    variables = [v.clone().requires_grad_() for v in (x, y, z)]
    penalized = (
        oracles.problem.upper(*variables[:2], None) / penalty
        + oracles.problem.lower(*variables[:2], None)
        - value(*variables, gamma, dual_gamma)[0].sum()
    )
    slopes = torch.autograd.grad(penalized, variables)
    for before, now, slope in zip((x, y, z), (after.x, after.y, after.tracker), slopes, strict=True):
        torch.testing.assert_close((before - now) / 1e-3, slope, rtol=1e-9, atol=1e-9)


def test_the_value_function_bounds_g_from_below_with_equality_at_the_solution() -> None:
    grid = torch.linspace(-2, 4, 25, dtype=torch.float64)
    x, y, z = torch.meshgrid(grid, grid, torch.linspace(0, 5, 11, dtype=torch.float64), indexing="ij")
    gap = 0.5 * (y - 3) ** 2 - value(x, y, z, 1.0, 1.0)[0]
    assert bool((gap[x + y <= 2] >= -1e-12).all())
    x = doubles(1.5)
    assert float(0.5 * (0.5 - 3) ** 2 - value(x, 2 - x, doubles(2.5), 1.0, 1.0)[0]) == pytest.approx(0, abs=1e-12)


def test_nothing_moves_at_the_solution_without_the_upper_term() -> None:
    task, solver = toys.ineq(), LVHBA(penalty=1e14)
    oracles, state = start(task, solver)
    y, multiplier = doubles(0.5), doubles(2.5)
    state = state._replace(x=doubles(1.5), y=y, theta=y, multiplier=multiplier, tracker=multiplier)
    for _ in range(5):
        state = solver.step(oracles, state)
    for now, then in ((state.x, doubles(1.5)), (state.y, y), (state.theta, y), (state.multiplier, multiplier)):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-12)
    assert state.metrics is not None


def test_cost_is_as_stated() -> None:
    both = Problem(
        upper=lambda x, y, b: (x - y.sum()).square().sum(),
        lower=lambda x, y, b: y.square().sum() + x.sum() * y.sum(),
        constraint=lambda x, y, b: y - 5,
        equality=lambda x, y, b: (y.sum() - x.sum()).reshape(1),
        joint_set=JointPolyhedron(
            torch.tensor([[0.0], [0.0], [-1.0]]), torch.tensor([[1.0, 0], [0, 1], [1, 1]]),
            torch.tensor([5.0, 5.0, 0.0]), torch.tensor([False, False, True]),
        ),
    )  # fmt: skip
    for problem, of_constraints in ((both, 4), (bilevel.problems.quadratic().problem, 0)):
        x, y = (doubles(0.1), doubles(0, 0)) if of_constraints else (torch.zeros(n).double() for n in (4, 10))
        oracles, x, y = open_oracles(problem, x, y, needs_hvp=False)
        solver = LVHBA()
        state = solver.init(oracles, x, y)
        before = oracles.counts
        solver.step(oracles, state)
        spent = oracles.counts - before
        assert (spent.gradients, spent.hvps, spent.crosses, spent.values) == (4 + of_constraints, 0, 0, 0)


# -- what it solves ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "solver", "steps", "tolerance"),
    [
        pytest.param(toys.ineq(), LVHBA(), 1300, 1e-3, marks=pytest.mark.slow),
        (toys.ineq(), LVHBA(), 300, 1e-1),
        (toys.ineq(), LVHBA(penalty=STEADY), 500, 1e-3),
        pytest.param(toys.mci(), LVHBA(), 1000, 1e-2, marks=pytest.mark.slow),
        (toys.llc(), LVHBA(penalty=Power(2.0, 0.49)), 1000, 1e-2),
        pytest.param(toys.mc(), LVHBA(), 1500, 1e-3, marks=pytest.mark.slow),
        pytest.param(toys.box(), LVHBA(), 1000, 1e-2, marks=pytest.mark.slow),
        pytest.param(toys.box(), LVHBA(penalty=Power(5.0, 0.49)), 5000, 1e-3, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_toys(task: Task, solver: LVHBA, steps: int, tolerance: float) -> None:
    found = errors(task, solver, steps)
    assert found["x_error"] <= tolerance
    assert found["y_error"] <= tolerance


@pytest.mark.slow
def test_toys_to_more_digits() -> None:
    assert errors(toys.ineq(), LVHBA(penalty=STEADY), 3000)["x_error"] < 1e-9
    assert errors(toys.llc(100), LVHBA(penalty=Power(2.0, 0.49)), 3000)["x_error"] < 1e-2
    assert errors(toys.mci(), LVHBA(penalty=Power(2.0, 0.49)), 6000)["x_error"] < 2e-3


def test_multipliers_are_found_in_the_units_of_the_user() -> None:
    """The same problem, its constraint multiplied by 100: the iterates stay, the multiplier is a hundredth."""
    task = toys.ineq()
    plain, scaled = (
        Problem(
            upper=task.problem.upper,
            lower=task.problem.lower,
            constraint=lambda x, y, b, s=s: s * (x + y - 2),
            joint_set=task.problem.joint_set,
        )
        for s in (1.0, 100.0)
    )
    one, other = (bilevel.solve(p, LVHBA(), task.x0, task.y0, steps=400) for p in (plain, scaled))
    torch.testing.assert_close(one.x, other.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.state.multiplier, 100 * other.state.multiplier, rtol=1e-9, atol=1e-9)
    assert float(one.state.multiplier) == pytest.approx(2.5, abs=0.05)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_units_of_the_objectives_change_nothing(scale: float) -> None:
    """Both objectives multiplied: the same iterates, the multipliers multiplied."""
    task = toys.ineq()
    scaled = replace(
        task.problem,
        upper=lambda x, y, b: scale * task.problem.upper(x, y, b),
        lower=lambda x, y, b: scale * task.problem.lower(x, y, b),
    )
    one, other = (bilevel.solve(p, LVHBA(bound=1e6), task.x0, task.y0, steps=200) for p in (task.problem, scaled))
    torch.testing.assert_close(one.x, other.x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scale * one.state.multiplier, other.state.multiplier, rtol=1e-6, atol=0.0)


def test_equations_have_multipliers_of_either_sign() -> None:
    """The equation 1^T (x + y1 + y2) / sqrt(3 n) = 0 of `llc` has the multiplier -sqrt(3 n), and its negative +."""
    task = toys.llc()
    problem = task.problem
    flipped = Problem(
        upper=problem.upper,
        lower=problem.lower,
        equality=lambda x, y, b: -problem.equality(x, y, b),  # type: ignore[misc]
        joint_set=problem.joint_set,
    )
    for stated, sign in ((problem, -1.0), (flipped, 1.0)):
        solution = bilevel.solve(stated, LVHBA(), task.x0, task.y0, steps=400)
        assert float(solution.state.multiplier) == pytest.approx(sign * 3**0.5, abs=0.05)
        assert float(solution.x) == pytest.approx(-0.3, abs=0.03)


def test_iterates_stay_in_their_sets() -> None:
    task, solver = toys.ineq(), LVHBA()
    oracles, state = start(task, solver)
    for _ in range(300):
        state = solver.step(oracles, state)
        assert float(state.x + state.y) <= 2 + 1e-12
        for held in (state.multiplier, state.tracker):
            assert 0 <= float(held) <= solver.bound


def test_lower_sets_beside_constraints() -> None:
    """y in [0, 1] and x + y <= 2 below: with x bounded by 0.5, only the box is active."""
    task = toys.ineq()
    problem = Problem(
        upper=task.problem.upper,
        lower=task.problem.lower,
        constraint=task.problem.constraint,
        lower_set=Box(0, 1),
        upper_set=Box(-1, 0.5),
        joint_set=JointHalfspace(1.0, 1.0, 2.0, upper_set=Box(-1, 0.5), lower_set=Box(0, 1)),
        regularizer=L2(0.1),
    )
    solution = bilevel.solve(problem, LVHBA(), task.x0, task.y0, steps=300)
    assert float(solution.y) == 1.0
    assert float(solution.x) == pytest.approx(0.5)
    assert float(solution.state.multiplier) == 0.0


def test_float32() -> None:
    task = toys.ineq(dtype=torch.float32)
    solution = bilevel.solve(task.problem, LVHBA(penalty=STEADY), task.x0, task.y0, steps=1000)
    assert solution.x.dtype == solution.state.multiplier.dtype == torch.float32
    assert float(solution.x) == pytest.approx(1.5, abs=1e-3)


def test_options_away_from_their_defaults() -> None:
    solver = LVHBA(
        gamma=0.5, multiplier_gamma=2.0, penalty=Power(0.5, 0.3), bound=50.0, lr=0.1, upper_lr=0.04, tracker_lr=0.05,
        upper_factor=1.5,
    )  # fmt: skip
    assert errors(toys.ineq(), solver, 1000)["x_error"] < 3e-3
    assert solver.backtracked(0.5).upper_factor == 0.75


def test_blocks_have_multipliers_of_their_own() -> None:
    """Two lower problems min (y - 3)² / 2, y <= t_b - x, with t = (2, 9): the first is held, the second is free."""
    t = doubles(2.0, 9.0)[:, None]

    def joint(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return JointPolyhedron(torch.ones(2, 1), torch.eye(2), t.flatten())(x, y)

    problem = Problem(
        upper=lambda x, y, b: 0.5 * (x - 2).square().sum() + 0.5 * (y - 1).square().sum(),
        lower=lambda x, y, b: 0.5 * (y - 3).square().sum(),
        constraint=lambda x, y, b: x + y - b,
        joint_set=joint,
        upper_data=bilevel.Full(t),
        lower_data=bilevel.Full(t),
        blocks=2,
    )
    # F = (x - 2)² / 2 + ((1 - x)² + 4) / 4
    solution = bilevel.solve(problem, LVHBA(penalty=STEADY), doubles(0.0), 0 * t, steps=600)
    assert float(solution.x) == pytest.approx(5 / 3, abs=1e-2)
    torch.testing.assert_close(solution.y[0], doubles(1 / 3), rtol=0, atol=2e-2)
    assert 2.7 < float(solution.y[1]) < 3.0  # its bias is 2 / c_k
    torch.testing.assert_close(solution.state.multiplier, doubles(8 / 3, 0.0)[:, None], rtol=0, atol=2e-2)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_bound_below_the_multiplier_is_told() -> None:
    """With r = 1 < 2.5 the answer is wrong without any other sign: x = .11 instead of 1.5."""
    task = toys.ineq()
    with pytest.warns(MultiplierAtBound, match=r"reached its bound 1 at step \d+.*LVHBA\(bound=") as caught:
        solution = bilevel.solve(task.problem, LVHBA(bound=1.0), task.x0, task.y0, steps=500)
    assert len(caught) == 1
    assert solution.status is Status.COMPLETED
    assert float(solution.x) < 1.0
    assert float(solution.state.multiplier) == 1.0


def test_a_large_gamma_needs_a_tiny_step() -> None:
    task = toys.ineq()
    with pytest.raises(InvalidProblem, match=r"lr=0\.3 is outside \(0, 0\.198\), where its steps are stable"):
        bilevel.solve(task.problem, LVHBA(gamma=10.0, lr=0.3), task.x0, task.y0, steps=1)
    measured = bilevel.solve(task.problem, LVHBA(gamma=10.0), task.x0, task.y0, steps=1000)
    assert 1.0 < float(measured.x) < 1.5  # stable, but slow


STEEPER = Problem(
    upper=lambda x, y, b: 0.5 * (x - 3).square().sum(),
    lower=lambda x, y, b: 0.5 * (y - 3).square().sum(),
    equality=lambda x, y, b: (1 + x) * (y - 1),
    joint_set=lambda x, y: (x, torch.ones_like(y)),
)
"""The row of the equation is 1 long at x = 0 and 4 at the solution x = 3."""


def test_a_large_gamma_that_diverges_says_so() -> None:
    """A step that is stable at the start, and is not where x is held: θ and λ spiral outward."""
    problem = replace(STEEPER, joint_set=lambda x, y: (torch.full_like(x, 3.0), torch.ones_like(y)))
    oracles, x, y = open_oracles(problem, doubles(0.0), doubles(0.0), needs_hvp=False)
    for solver, stable in ((LVHBA(gamma=10.0, lr=0.15, bound=1e12), False), (LVHBA(gamma=10.0, bound=1e12), True)):
        state = solver.init(oracles, 0 * x, y)
        with nullcontext() if stable else pytest.raises(Diverged, match="with a large gamma θ and λ rotate"):
            for _ in range(500):
                state = solver.step(oracles, state)
                solver.inspect(oracles, state)
        assert bool(state.theta.isfinite().all() & state.multiplier.isfinite().all())
        assert (state.step == 500) == stable


def test_measured_steps_follow_a_constraint_that_grows_steeper() -> None:
    solution = bilevel.solve(STEEPER, LVHBA(), doubles(0.0), doubles(0.0), steps=1000)
    assert solution.status is Status.COMPLETED
    assert float(solution.state.scale.coupling) == pytest.approx(4.0, abs=0.3)
    assert float(solution.x) == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize("part", ["constraint", "equality"])
def test_constraints_without_a_joint_set_are_refused(part: str) -> None:
    problem = Problem(
        upper=lambda x, y, b: (x - y).square().sum(),
        lower=lambda x, y, b: (y - x).square().sum(),
        **{part: lambda x, y, b: x + y},
    )
    with pytest.raises(InvalidProblem, match=r"pass Problem\(joint_set=.*BLOCC needs no projection"):
        bilevel.solve(problem, LVHBA(), doubles(0.0), doubles(0.0), steps=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"upper_lr": 5.0}, "upper_lr=5 is outside"), ({"tracker_lr": 3.0}, "tracker_lr=3 is outside")],
)
def test_unstable_steps_are_refused(options: dict[str, float], text: str) -> None:
    task = toys.ineq()
    with pytest.raises(InvalidProblem, match=text):
        bilevel.solve(task.problem, LVHBA(**options), task.x0, task.y0, steps=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"bound": -1.0}, {"penalty": -2.0}, {"tracker_lr": 0.0}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(InvalidProblem, match=next(iter(options))):
        LVHBA(**options)  # type: ignore[arg-type]
