"""Laws that every penalty method obeys, one test each for all of them: bias, directions, fixed points, sets, scaling.

`held` runs a solver with steps of x of length 1e-30 from x = 0: the numbers stay exact, x stays in place, the lower
variables converge, and the last move of x is the solver's direction there. `WHERE` says which tests hold which law,
here and in the files of single solvers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, Problem, Solver, solvers
from bilevel.data import DataSource
from bilevel.dry_run import open_oracles
from bilevel.solvers import BAMM, BDA, BOME, F2BA, F2SA, F3SA, GPBGD, LVHBA, MEHA, VPBGD, ProxF2SA

UNIT = 1e-30
STILL = SGD(lr=UNIT)
TASK = bilevel.problems.quadratic()
SHIFT = torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def F(x: Tensor, y: Tensor) -> Tensor:
    return TASK.problem.upper(x.double() + SHIFT, y.double(), None)


def G(x: Tensor, y: Tensor) -> Tensor:
    return TASK.problem.lower(x.double() + SHIFT, y.double(), None)


def quadratic(dtype: torch.dtype = torch.float64) -> Problem:
    """Return the contract quadratic, its origin moved to a point where nothing is special."""
    task = bilevel.problems.quadratic(dtype=dtype)
    shift = SHIFT.to(dtype)
    return Problem(
        upper=lambda x, y, b: task.problem.upper(x + shift, y, b),
        lower=lambda x, y, b: task.problem.lower(x + shift, y, b),
    )


def minimizer(of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return where a quadratic of y is least."""
    zero = torch.zeros(10, dtype=torch.float64)
    found: Tensor = torch.linalg.solve(torch.func.hessian(of)(zero), -torch.func.grad(of)(zero))
    return found


def reached(x: Tensor) -> Tensor:
    """Return F along the lower solutions: what all of them approach."""
    return F(x, minimizer(lambda y: G(x, y)))


def gap_penalized(x: Tensor, strength: float) -> Tensor:
    y, z = minimizer(lambda y: F(x, y) / strength + G(x, y)), minimizer(lambda y: G(x, y))
    return F(x, y) + strength * (G(x, y) - G(x, z))


def gradient_penalized(x: Tensor, strength: float) -> Tensor:
    def whole(y: Tensor) -> Tensor:
        return F(x, y) + 0.5 * strength * torch.func.grad(G, 1)(x, y).square().sum()

    return whole(minimizer(whole))


def averaged(x: Tensor, strength: float) -> Tensor:
    return F(x, minimizer(lambda y: F(x, y) / strength + (1 - 1 / strength) * G(x, y)))


class Law(NamedTuple):
    """How to hold a solver at one x, and the function whose gradient is its direction there.

    Args:
        make: strength (penalty, or 1 / mu) -> solver with steps of x of length UNIT.
        steps: for its lower variables to converge.
        value: (x, strength) -> 0-dim.
    """

    make: Callable[[float], Solver[Any]]
    steps: int
    value: Callable[[Tensor, float], Tensor]


LAWS: dict[str, Law] = {
    "F2SA": Law(lambda p: F2SA(upper=STILL, penalty=p), 60, gap_penalized),
    "F3SA": Law(lambda p: F3SA(upper=STILL, penalty=p), 200, gap_penalized),
    "F2BA": Law(lambda p: F2BA(upper=STILL, penalty=p), 10, gap_penalized),
    "ProxF2SA": Law(lambda p: ProxF2SA(upper=STILL, penalty=p), 60, gap_penalized),
    "VPBGD": Law(lambda p: VPBGD(upper_lr=UNIT * (1 + p), penalty=p), 250, gap_penalized),
    "GPBGD": Law(lambda p: GPBGD(upper_lr=UNIT * (1 + p), penalty=p), 400, gradient_penalized),
    "BAMM": Law(lambda s: BAMM(upper_lr=UNIT, mu=1 / s, decay=0.0), 200, averaged),
    "BDA": Law(lambda s: BDA(upper=STILL, mu=1 / s, decay=0.0, lower_steps=100), 2, averaged),
}
GAPS = [name for name, law in LAWS.items() if law.value is gap_penalized]


def held(solver: Solver[Any], problem: Problem, steps: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the solver's last `steps // 2` directions at x = 0, `[steps // 2, 4]`."""
    zero = torch.zeros(4, dtype=dtype)
    oracles, x, y = open_oracles(problem, zero, torch.zeros(10, dtype=dtype))
    states = [solver.init(oracles, x, y)]
    for _ in range(steps):
        states.append(solver.step(oracles, states[-1]))
    moves = [(before.x - after.x) / UNIT for before, after in pairwise(states)]
    assert float(states[-1].x.abs().max()) < 1e-25
    return torch.stack(moves[-(steps // 2) :])


def direction(name: str, strength: float, dtype: torch.dtype = torch.float64) -> Tensor:
    law = LAWS[name]
    return held(law.make(strength), quadratic(dtype), law.steps, dtype)[-1]


WHERE: dict[str, dict[str, list[str]]] = {
    "1: the bias of the direction is inversely proportional to the penalty (BAMM: proportional to mu)": {
        "invariants": [
            "test_bias_is_inversely_proportional_to_the_penalty",
            "test_solutions_have_the_bias_of_their_penalty",
            "test_an_adversary_below_leaves_no_bias",
        ],
        "meha": ["test_bias_falls_like_one_over_the_penalty"],
        "blocc": ["test_the_bias_falls_like_one_over_the_penalty"],
        "bome": ["test_steps_that_do_not_fall_leave_a_floor"],
    },
    "2: the direction is the derivative of the penalized value": {
        "invariants": ["test_direction_is_the_derivative_of_the_penalized_value"],
        "meha": ["test_direction_is_the_gradient_of_the_penalized_envelope"],
        "lv_hba": ["test_direction_is_the_gradient_of_the_penalized_value_function"],
        "blocc": ["test_direction_is_the_gradient_of_the_penalized_problem"],
        "bome": ["test_step_is_the_one_written_down"],
    },
    "3: g lies above the value function, and meets it at a solution": {
        "lv_hba": ["test_the_value_function_bounds_g_from_below_with_equality_at_the_solution"],
    },
    "4: nothing moves from a solution without an upper objective": {
        "invariants": ["test_nothing_moves_from_a_lower_solution_without_an_upper_objective"],
        "meha": ["test_nothing_moves_at_a_solution_without_the_upper_term"],
        "lv_hba": ["test_nothing_moves_at_the_solution_without_the_upper_term"],
        "blocc": ["test_nothing_moves_at_the_solution"],
    },
    "5: methods that are cases of one another": {
        "first_order": [
            "test_without_noise_f3sa_is_f2sa",
            "test_with_full_renewal_f3sa_is_f2sa_on_any_batches",
            "test_without_prox_and_sets_prox_f2sa_is_f2sa",
            "test_at_one_penalty_f2ba_is_f2sa",
        ],
        "meha": ["test_without_kinks_it_is_lv_hba_without_constraints"],
        "blocc": ["test_without_constraints_it_is_f2sa"],
    },
    "6: iterates stay in their sets, and a multiplier at its bound is told": {
        "invariants": ["test_every_iterate_is_in_its_sets"],
        "lv_hba": ["test_iterates_stay_in_their_sets", "test_a_bound_below_the_multiplier_is_told"],
        "blocc": ["test_a_bound_below_the_multiplier_is_told"],
    },
    "7: unstable steps are refused; scaling f and the penalty together changes nothing": {
        "invariants": ["test_scaling_f_and_the_penalty_together_leaves_all_paths"],
        "../faults/first_order": [
            "test_row_06_lower_steps_that_cannot_be_stable_are_refused",
            "test_rows_01_to_03_what_is_not_finite_never_replaces_the_last_good_point",
        ],
    },
    "8: shared batches cancel their noise; single precision is enough at a large penalty": {
        "invariants": [
            "test_shared_batches_cancel_their_noise",
            "test_directions_in_single_precision_at_a_large_penalty",
        ],
    },
    "9: who solves the merely convex toy, and who must not": {
        "bamm": [
            "test_defaults_solve_the_quadratic_and_the_merely_convex_toy",
            "test_merely_convex_needs_the_upper_curvature",
        ],
        "bda": [
            "test_defaults_solve_the_quadratic_and_the_merely_convex_toy",
            "test_plain_unrolling_answers_one_half",
        ],
        "meha": ["test_toys"],
    },
    "10: no influence through an active bound; the scale of a prox": {
        "prox_f2sa": ["test_box"],
        "v_pbgd": ["test_bounds_of_the_lower_level"],
        "meha": ["test_the_solution_does_not_depend_on_the_steps", "test_a_threshold_scaled_twice_is_found_out"],
    },
    "11: counts are the cost lines, without second derivatives": {
        "invariants": ["test_first_order_means_no_second_derivatives"],
        **{name: ["test_counts"] for name in ("f2sa", "f3sa", "f2ba", "prox_f2sa")},
        **{name: ["test_counts_are_its_cost_line"] for name in ("v_pbgd", "g_pbgd", "bamm", "bda")},
        "bome": ["test_counts_are_its_cost_line_and_batches_are_shared"],
        **{name: ["test_cost_is_as_stated"] for name in ("meha", "lv_hba", "blocc")},
    },
}


@pytest.mark.parametrize("law", WHERE)
def test_every_law_has_its_tests(law: str) -> None:
    here = Path(__file__).parent
    for name, tests in WHERE[law].items():
        folder, _, file = name.rpartition("/")
        text = (here / folder / f"test_{file}.py").read_text()
        for test in tests:
            assert f"\ndef {test}(" in text, f"{name}: {test}"


# -- 1 and 2: the direction, and its bias ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAWS)
def test_direction_is_the_derivative_of_the_penalized_value(name: str) -> None:
    """By central differences, which are exact for quadratics up to rounding."""
    law, ends = LAWS[name], 1e-3 * torch.eye(4, dtype=torch.float64)
    expected = torch.stack([(law.value(h, 10.0) - law.value(-h, 10.0)) / 2e-3 for h in ends])
    torch.testing.assert_close(direction(name, 10.0), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", LAWS)
def test_bias_is_inversely_proportional_to_the_penalty(name: str) -> None:
    exact = torch.func.grad(reached)(torch.zeros(4, dtype=torch.float64))
    weak, strong = (float((direction(name, strength) - exact).norm()) for strength in (100.0, 1000.0))
    assert 9 <= weak / strong <= 11
    assert weak > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("solver", [F2SA, F3SA, F2BA, ProxF2SA])
def test_solutions_have_the_bias_of_their_penalty(solver: Any) -> None:
    errors = []
    for penalty in (50.0, 500.0):
        made = solver(upper=SGD(0.05), penalty=penalty, **{} if solver is F3SA else {"lower_steps": 8})
        error = TASK.x_error(bilevel.solve(TASK.problem, made, TASK.x0, TASK.y0, steps=250).x)
        assert error is not None
        errors.append(error)
    assert 9 <= errors[0] / errors[1] <= 11


@pytest.mark.slow
@pytest.mark.parametrize("name", GAPS)
@pytest.mark.parametrize("penalty", [2.0, 30.0])
def test_an_adversary_below_leaves_no_bias(name: str, penalty: float) -> None:
    """With g = -f in y the direction is exact at any penalty above 1, for y and z agree."""
    plain = quadratic()
    problem = Problem(upper=lambda x, y, b: x.square().sum() - plain.lower(x, y, b), lower=plain.lower)
    zero = torch.zeros(4, dtype=torch.float64)
    exact = torch.func.grad(lambda x: x.square().sum() - G(x, minimizer(lambda y: G(x, y))))(zero)
    found = held(LAWS[name].make(penalty), problem, 2 * LAWS[name].steps)[-1]
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


# -- 4: fixed points ---------------------------------------------------------------------------------------------------

PLAIN: dict[str, Solver[Any]] = {
    "F2SA": F2SA(upper=SGD(0.1)),
    "F3SA": F3SA(),
    "F2BA": F2BA(upper=SGD(0.1)),
    "ProxF2SA": ProxF2SA(upper=SGD(0.1)),
    "VPBGD": VPBGD(),
    "GPBGD": GPBGD(),
    "BAMM": BAMM(),
    "BDA": BDA(upper=SGD(0.1)),
    "BOME": BOME(),
    "MEHA": MEHA(),
    "LVHBA": LVHBA(),
}


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_moves_from_a_lower_solution_without_an_upper_objective(name: str) -> None:
    problem = Problem(upper=lambda x, y, b: 0 * x.sum() + 0 * y.sum(), lower=quadratic().lower)
    zero = torch.zeros(4, dtype=torch.float64)
    oracles, x, y = open_oracles(problem, zero, minimizer(lambda y: G(zero, y)))
    state = PLAIN[name].init(oracles, x, y)
    for _ in range(5):
        state = PLAIN[name].step(oracles, state)
    assert float((state.x - x).abs().max()) < 1e-12
    assert float((state.y - y).abs().max()) < 1e-12


# -- 6: sets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_every_iterate_is_in_its_sets(name: str) -> None:
    solver = PLAIN[name]
    lower_set = bilevel.Box(-0.3, 0.3) if solver.handles_lower_set else None
    problem = replace(quadratic(), upper_set=bilevel.Box(-0.1, 0.1), lower_set=lower_set)
    oracles, x, y = open_oracles(problem, torch.ones(4).double(), torch.ones(10).double())
    state = solver.init(oracles, x, y)
    for _ in range(40):
        assert float(state.x.abs().max()) <= 0.1
        assert lower_set is None or float(state.y.abs().max()) <= 0.3
        state = solver.step(oracles, state)
    assert float(state.x.abs().max()) == 0.1, "the unconstrained solution lies outside"


# -- 7: scaling --------------------------------------------------------------------------------------------------------

SCALED: dict[str, Callable[[float], Solver[Any]]] = {
    "F2SA": lambda s: F2SA(upper=SGD(0.1 / s), penalty=10 * s),
    "F3SA": lambda s: F3SA(upper=SGD(0.1 / s), penalty=10 * s),
    "F2BA": lambda s: F2BA(upper=SGD(0.1 / s), penalty=10 * s),
    "ProxF2SA": lambda s: ProxF2SA(upper=SGD(0.1 / s), penalty=10 * s),
    "VPBGD": lambda s: VPBGD(penalty=10 * s),
    "GPBGD": lambda s: GPBGD(penalty=10 * s),
    "BOME": lambda s: BOME(lr=0.1 / s, eta=0.5 * s),
    "MEHA": lambda s: MEHA(penalty=10 * s),
    "LVHBA": lambda s: LVHBA(penalty=10 * s),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("factor", [0.5, 100.0])
def test_scaling_f_and_the_penalty_together_leaves_all_paths(name: str, factor: float) -> None:
    problem, ends = quadratic(), []
    for s in (1.0, factor):
        scaled = replace(problem, upper=lambda x, y, b, s=s: s * problem.upper(x, y, b))
        solver = SCALED[name](s)
        oracles, x, y = open_oracles(scaled, torch.zeros(4).double(), torch.zeros(10).double())
        state = solver.init(oracles, x, y)
        for _ in range(20):
            state = solver.step(oracles, state)
        ends.append(state)
    assert float(ends[0].x.norm()) > 1e-2
    torch.testing.assert_close(ends[1].x, ends[0].x, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ends[1].y, ends[0].y, rtol=1e-6, atol=1e-7)


# -- 8: noise and rounding ---------------------------------------------------------------------------------------------


class Noise(DataSource):
    """A fresh vector at every step."""

    @property
    def deterministic(self) -> bool:
        return False

    def batch(self, step: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(hash((step, seed)) & (2**62 - 1))
        return 0.1 * torch.randn(10, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("solver", [F2SA, F3SA, ProxF2SA])
def test_shared_batches_cancel_their_noise(solver: Any) -> None:
    """On batches of their own, y and z differ by their noise, and the penalty multiplies it."""
    plain = quadratic()
    problem = replace(plain, lower=lambda x, y, b: plain.lower(x, y, None) + b @ y, lower_data=Noise())
    variances = []
    for shared in (True, False):
        made = solver(upper=STILL, penalty=300.0, shared_batches=shared)
        variances.append(float(held(made, problem, 120).var(dim=0).sum()))
    assert variances[0] < 1e-3 * variances[1]


@pytest.mark.parametrize("name", GAPS)
def test_directions_in_single_precision_at_a_large_penalty(name: str) -> None:
    exact, rounded = (direction(name, 1e3, dtype) for dtype in (torch.float64, torch.float32))
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).norm() / exact.norm()) < 1e-3


# -- 11: what a step costs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", solvers.__all__)
def test_first_order_means_no_second_derivatives(name: str) -> None:
    solver = getattr(solvers, name)()
    if solver.needs_hvp or name == "KKT":
        return
    oracles, x, y = open_oracles(quadratic(), torch.zeros(4).double(), torch.zeros(10).double(), needs_hvp=False)
    state = solver.init(oracles, x, y)
    for _ in range(3):
        before = oracles.counts.gradients
        state = solver.step(oracles, state)
        assert oracles.counts.gradients > before
    assert oracles.counts.hvps == oracles.counts.crosses == 0
    assert math.isfinite(float(state.metrics.stationarity))
