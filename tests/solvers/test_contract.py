"""What every solver in `bilevel.solvers.__all__` keeps, with its defaults."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

import bilevel
from bilevel import Problem, Session, Shuffled, Solver, solvers
from bilevel.compare import steps_for
from bilevel.dry_run import open_oracles
from bilevel.layout import named_leaves
from bilevel.problems import Task

NAMES = solvers.__all__
STOCHASTIC = [name for name in NAMES if name != "KKT"]  # the reference solver needs float64 and the same batch always


def make(name: str, **options: Any) -> Solver[Any]:
    solver: Solver[Any] = getattr(solvers, name)(**options)
    return solver


def nested() -> Task:
    """A problem whose variables are a dict with a nested list, and whose x lives in a box."""
    task = bilevel.problems.quadratic(d=12)
    problem = task.problem

    def flat_x(x: Any) -> torch.Tensor:
        return torch.cat([x["a"], x["rest"][0].flatten()])

    def flat_y(y: Any) -> torch.Tensor:
        return torch.cat([y["u"].flatten(), y["v"]])

    return Task(
        "nested",
        Problem(
            upper=lambda x, y, b: problem.upper(flat_x(x), flat_y(y), b),
            lower=lambda x, y, b: problem.lower(flat_x(x), flat_y(y), b),
            upper_set=bilevel.Box(-0.1, 0.1),
        ),
        {"a": torch.zeros(2, dtype=torch.float64), "rest": [torch.zeros(1, 2, dtype=torch.float64)]},
        {"u": torch.zeros(3, 2, dtype=torch.float64), "v": torch.zeros(6, dtype=torch.float64)},
    )


@pytest.mark.parametrize("name", NAMES)
def test_defaults_converge_on_the_reference_quadratic(name: str, device: str) -> None:
    task = bilevel.problems.quadratic(device=device)
    solver = make(name)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps_for(task, solver))
    error = task.x_error(solution.x)
    assert error is not None
    assert error <= 1e-2
    assert solution.status is bilevel.Status.COMPLETED
    if solver.needs_hvp and solution.certificate is not None:
        assert solution.certificate.error_estimate is not None
        assert torch.isfinite(solution.certificate.error_estimate)
        torch.testing.assert_close(solution.x, solution.best_x, rtol=0.1, atol=0.1)
    if not solver.needs_hvp:
        assert solution.counts.hvps == solution.counts.crosses == 0


def test_hypergradient_descent_is_certified() -> None:
    task = bilevel.problems.quadratic()
    for name in ("HypergradientDescent", "SparseDescent", "amigo", "imaml", "implicit", "neumann", "nystrom"):
        assert bilevel.solve(task.problem, make(name), task.x0, task.y0, steps=2).certificate is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_defaults_converge_on_other_quadratics(name: str) -> None:
    solver = make(name)
    for seed in range(1, 5):
        task = bilevel.problems.quadratic(seed=seed)
        solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps_for(task, solver))
        error = task.x_error(solution.x)
        assert error is not None
        assert error <= 1e-2, seed


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCHASTIC)
def test_float32_keeps_dtype_and_comes_close(name: str, device: str) -> None:
    task = bilevel.problems.quadratic(dtype=torch.float32, device=device)
    solver = make(name)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps_for(task, solver))
    assert solution.x.dtype == solution.y.dtype == torch.float32
    assert solution.x.device.type == device
    error = task.x_error(solution.x)
    assert error is not None
    assert error <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nested_variables_and_sets(name: str) -> None:
    task = nested()
    solver = make(name)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=max(2, solver.contract_steps // 5))
    shapes = [(leaf_name, leaf.shape) for leaf_name, leaf in named_leaves(solution.x)]
    assert shapes == [(leaf_name, leaf.shape) for leaf_name, leaf in named_leaves(task.x0)]
    flat = torch.cat([leaf.flatten() for _, leaf in named_leaves(solution.x)])
    assert bool((flat.abs() <= 0.1).all())
    assert bool((flat.abs() == 0.1).any()), "the unconstrained solution lies outside the box"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_twice_fifty_steps_are_a_hundred(name: str) -> None:
    task, solver = bilevel.problems.quadratic(), make(name)
    steps = min(20, solver.contract_steps // 4)
    whole = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=2 * steps)
    half = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps)
    both = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps, resume=half)
    assert torch.equal(whole.x, both.x)
    assert torch.equal(whole.state.y, both.state.y)
    assert whole.state.step == both.state.step == 2 * steps


@pytest.mark.parametrize("name", NAMES)
def test_state_keeps_structure_and_is_never_mutated(name: str) -> None:
    task, solver = bilevel.problems.quadratic(), make(name)
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0)
    before = solver.init(oracles, x, y)
    kept = (before.x.clone(), before.y.clone(), before.step)
    after = solver.step(oracles, before)
    assert type(after) is type(before)
    assert torch.equal(before.x, kept[0])
    assert torch.equal(before.y, kept[1])
    assert before.step == kept[2] == after.step - 1
    assert after.x.dtype == before.x.dtype
    assert after.x.shape == before.x.shape
    assert not after.x.requires_grad
    assert not after.y.requires_grad


@pytest.mark.parametrize("name", STOCHASTIC)
def test_inputs_and_random_state_are_untouched(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    kept = data.clone()
    x0, y0 = torch.zeros(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    problem = Problem(
        upper=lambda x, y, b: (b[0] - y).square().mean(),
        lower=lambda x, y, b: (
            (b[0] * torch.bernoulli(torch.full_like(b[0], 0.9)) - y).square().mean() + 0.1 * (y - x).square().mean()
        ),
        upper_data=bilevel.Full((data,)),
        lower_data=Shuffled((data,), batch_size=8),
    )
    state = torch.get_rng_state()
    one = bilevel.solve(problem, make(name), x0, y0, steps=5, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(data, kept)
    assert not x0.any()
    assert not y0.any()
    torch.randn(7)  # the caller's random state must not matter
    other = bilevel.solve(problem, make(name), x0, y0, steps=5, seed=3)
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.y, other.y)
    assert not torch.equal(one.y, bilevel.solve(problem, make(name), x0, y0, steps=5, seed=4).y)


@pytest.mark.parametrize("name", NAMES)
def test_session_saves_and_loads(name: str) -> None:
    task = bilevel.problems.quadratic()
    session = Session(task.problem, make(name), task.x0, task.y0)
    for _ in range(3):
        session.step()
    file = io.BytesIO()
    torch.save(session.state_dict(), file)
    session.step()
    file.seek(0)
    fresh = Session(task.problem, make(name), task.x0, task.y0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    fresh.step()
    assert torch.equal(fresh.x, session.x)
    assert torch.equal(fresh.y, session.y)
    assert fresh.counts == session.counts


@pytest.mark.parametrize("name", STOCHASTIC)
def test_backtracked_takes_shorter_steps(name: str) -> None:
    task = bilevel.problems.quadratic()
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0)
    moves = []
    for solver in (make(name), make(name).backtracked(0.5)):
        state = solver.init(oracles, x, y)
        for _ in range(2):  # multipliers that start at 0 give x no direction in the first step
            state = solver.step(oracles, state)
        moves.append((state.x - x).norm())
    assert 0 < moves[1] <= 0.6 * moves[0]


@pytest.mark.parametrize("name", NAMES)
def test_parts_it_cannot_treat_are_refused(name: str) -> None:
    task = bilevel.problems.quadratic()
    parts: dict[str, tuple[str, Any]] = {
        "lower_set": ("handles_lower_set", bilevel.NonNegative()),
        "constraint": ("handles_constraints", lambda x, y, b: y - 1),
        "equality": ("handles_constraints", lambda x, y, b: y[:1] - 1),
        "regularizer": ("handles_nonsmooth", bilevel.ElasticNet(l1=0.1, l2=0.1)),
    }
    for part, (fact, value) in parts.items():
        if getattr(make(name), fact):
            continue
        problem = Problem(upper=task.problem.upper, lower=task.problem.lower, **{part: value})
        with pytest.raises(bilevel.InvalidProblem, match=r"does not handle.*Use \w+"):
            bilevel.solve(problem, make(name), task.x0, task.y0, steps=1)
