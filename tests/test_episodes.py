"""Episodes: both levels see the same tasks, held while they are adapted to; solvers that would mix them are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import bilevel
from bilevel import Episodes, InvalidProblem, Problem, Session, episodes
from bilevel.dry_run import open_oracles

TASKS, T, LR, STRENGTH = 3, 4, 0.2, 2.0


def draw(generator: Generator) -> tuple[Any, Any]:
    """Draw quadratic tasks: (curvature, center) to learn from, a target to be asked about."""
    curvature, center, target = (torch.rand(TASKS, generator=generator, dtype=torch.float64) for _ in range(3))
    return (0.5 + curvature, center), target


def stated(steps: int = T, strength: float = 0.0) -> Problem:
    support, query = episodes(draw, steps)

    def lower(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * batch[0] * (y - batch[1]).square() + 0.5 * strength * (y - x).square()

    return Problem(
        upper=lambda x, y, target: 0.5 * (y - target).square(), lower=lower, lower_data=support, upper_data=query,
        lower_init=lambda x: x.expand(TASKS), blocks=TASKS,
    )  # fmt: skip


X = torch.tensor(2.0, dtype=torch.float64)


def tasks(problem: Problem, upper_step: int, held: int = T) -> tuple[Tensor, Tensor, Tensor]:
    assert problem.lower_data is not None
    assert problem.upper_data is not None
    support, target = problem.lower_data.batch(upper_step * held, 0), problem.upper_data.batch(upper_step, 0)
    return (*support, target)


def test_a_batch_is_a_function_of_step_and_seed_in_any_order() -> None:
    support, query = episodes(draw, T)
    forward = [support.batch(step, 3) for step in range(3 * T)]
    again, _ = episodes(draw, T)
    for step in reversed(range(3 * T)):
        assert all(bool((a == b).all()) for a, b in zip(forward[step], again.batch(step, 3), strict=True))
    centers = [float(batch[1][0]) for batch in forward]
    assert [len(set(centers[u * T : (u + 1) * T])) for u in range(3)] == [1, 1, 1]
    assert len(set(centers)) == 3
    assert float(support.batch(0, 4)[1][0]) != centers[0]
    assert bool((query.batch(2, 3) == draw_at(2, 3)[1]).all())
    assert (support.held, query.held, support.deterministic) == (T, 1, False)


def draw_at(step: int, seed: int) -> tuple[Any, Any]:
    lower, upper = episodes(draw, 1)
    return lower.batch(step, seed), upper.batch(step, seed)


@pytest.mark.parametrize("seed", [0, 5])
def test_both_levels_see_the_same_tasks(seed: int) -> None:
    support, query = episodes(lambda generator: (torch.rand(2, generator=generator),) * 2, T)
    problem = Problem(
        upper=lambda x, y, b: (y - b).square(), lower=lambda x, y, b: (y - b).square(), upper_data=query,
        lower_data=support, lower_init=lambda x: x.expand(2), blocks=2,
    )  # fmt: skip
    oracles, _, _ = open_oracles(problem, X, None, seed=seed, trains=True)
    for u in range(3):
        for k in range(T):
            assert bool((oracles.batch("upper", u) == oracles.batch("lower", u * T + k)).all())


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_differentiates_the_tasks_of_its_step(first_order: bool) -> None:
    problem, x = stated(), X
    session = Session(problem, bilevel.maml(LR, T, first_order=first_order, upper=bilevel.SGD(1.0)), X)
    for u in range(3):
        metrics = session.step()
        a, c, t = tasks(problem, u)
        shrunk = (1 - LR * a) ** T
        y = c + shrunk * (x - c)
        torch.testing.assert_close(metrics.upper_value, (0.5 * (y - t).square()).mean(), rtol=1e-10, atol=0)
        torch.testing.assert_close(metrics.lower_value, (0.5 * a * (y - c).square()).sum(), rtol=1e-10, atol=0)
        x = x - ((y - t) * (1.0 if first_order else shrunk)).mean()
        torch.testing.assert_close(session.x, x, rtol=1e-10, atol=0)


def test_imaml_inverts_the_curvature_of_the_tasks_of_its_step() -> None:
    problem, x, many = stated(40, STRENGTH), X, 40  # so many that L-BFGS ends at the minimum
    solver = bilevel.imaml(many, linear_steps=TASKS, lower=bilevel.LBFGS(tol=1e-13), upper=bilevel.SGD(1.0))
    session = Session(problem, solver, X)
    for u in range(3):
        session.step()
        a, c, t = tasks(problem, u, many)
        y = (a * c + STRENGTH * x) / (a + STRENGTH)
        x = x - (STRENGTH / (a + STRENGTH) * (y - t)).mean()
        torch.testing.assert_close(session.x, x, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["implicit", "F2SA", "Metagradient", "unrolled", "MEHA"])
def test_solvers_that_would_mix_tasks_are_refused(name: str) -> None:
    solver = getattr(bilevel, name)()
    with pytest.raises(InvalidProblem, match=r"start every lower solve anew.*maml"):
        bilevel.solve(stated(strength=STRENGTH), solver, X, steps=1)


@pytest.mark.parametrize(
    "solver", [bilevel.maml(LR, T + 1), bilevel.reptile(LR, T - 1), bilevel.imaml(T + 1), bilevel.maml(LR, 1)]
)
def test_another_number_of_lower_steps_is_refused(solver: bilevel.Solver[Any]) -> None:
    with pytest.raises(InvalidProblem, match=rf"for {T} steps.*Give both the same lower_steps"):
        bilevel.solve(stated(strength=STRENGTH), solver, X, steps=1)


def test_going_on_is_going_through() -> None:
    problem, solver = stated(), bilevel.maml(LR, T, upper=bilevel.Adam(0.1))
    whole = bilevel.solve(problem, solver, X, steps=6)
    half = bilevel.solve(problem, solver, X, steps=3)
    assert bool((bilevel.solve(problem, solver, X, steps=3, resume=half).x == whole.x).all())


def test_wrong_sources_are_refused() -> None:
    for steps in (0, True, 1.5):
        with pytest.raises(InvalidProblem, match="lower_steps"):
            episodes(draw, steps)  # type: ignore[arg-type]
    with pytest.raises(InvalidProblem, match="function"):
        episodes((torch.ones(2), torch.ones(2)), 1)  # type: ignore[arg-type]
    with pytest.raises(InvalidProblem, match="support, query"):
        Episodes(lambda generator: torch.ones(2), 0, 1).batch(0, 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(bilevel.DataExhausted):
        episodes(lambda generator: (torch.ones(0), torch.ones(1)), 1)[0].batch(0, 0)
    with pytest.raises(InvalidProblem, match="step"):
        episodes(draw, 1)[0].batch(-1, 0)


def test_moving_keeps_the_tasks() -> None:
    support, _ = episodes(draw, T)
    moved = support.to("cpu")
    assert all(bool((a == b).all()) for a, b in zip(support.batch(5, 1), moved.batch(5, 1), strict=True))
