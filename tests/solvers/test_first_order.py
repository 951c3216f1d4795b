"""What the fully first-order solvers share: how they reduce to one another, no HVPs, and steps that compile."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, Adam, Problem, Solver
from bilevel.dry_run import open_oracles
from bilevel.optimizers import Power
from bilevel.solvers.f2ba import F2BA
from bilevel.solvers.f2sa import F2SA
from bilevel.solvers.f3sa import F3SA
from bilevel.solvers.prox_f2sa import ProxF2SA

SOLVERS = [
    F2SA(lower_steps=2),
    F2BA(lower_steps=2),
    F3SA(),
    ProxF2SA(lower_steps=2),
]
GROWING = Power(2.0, 1 / 3)


def noisy() -> Problem:
    """A least-squares problem on shuffled mini-batches at both levels."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(24, generator=generator, dtype=torch.float64)
    return Problem(
        upper=lambda x, y, b: (b[0] @ y - b[1]).square().mean() + 0.1 * x.square().sum(),
        lower=lambda x, y, b: (b[0] @ y - b[1]).square().mean() + (y - x).square().sum(),
        upper_data=bilevel.Shuffled((inputs[:12], targets[:12]), batch_size=4),
        lower_data=bilevel.Shuffled((inputs[12:], targets[12:]), batch_size=4),
    )


def after(problem: Problem, solver: Solver[Any], steps: int, size: tuple[int, int] = (5, 5)) -> Any:
    x, y = (torch.zeros(n, dtype=torch.float64) for n in size)
    oracles, x, y = open_oracles(problem, x, y, needs_hvp=False)
    state = solver.init(oracles, x, y)
    for _ in range(steps):
        state = solver.step(oracles, state)
    return state


def quadratic() -> Problem:
    return bilevel.problems.quadratic().problem


# -- one method as a case of another -----------------------------------------------------------------------------------


def test_without_noise_f3sa_is_f2sa() -> None:
    options: dict[str, Any] = {"upper": SGD(0.05, 0.3), "penalty": GROWING}
    plain = after(quadratic(), F2SA(**options, lower_steps=1, momentum=0.0), 30, (4, 10))
    for renewal in (1.0, 0.05, Power(1.0, -0.8, offset=3.0)):
        recursive = after(quadratic(), F3SA(**options, renewal=renewal), 30, (4, 10))
        for name in ("x", "y", "relaxed"):
            assert torch.equal(getattr(recursive, name), getattr(plain, name))


@pytest.mark.parametrize("shared", [True, False])
def test_with_full_renewal_f3sa_is_f2sa_on_any_batches(shared: bool) -> None:
    options: dict[str, Any] = {"upper": SGD(0.05), "penalty": GROWING, "shared_batches": shared}
    plain = after(noisy(), F2SA(**options, lower_steps=1, momentum=0.0), 30)
    recursive = after(noisy(), F3SA(**options, renewal=1.0), 30)
    other = after(noisy(), F3SA(**options, renewal=0.5), 30)
    for name in ("x", "y", "relaxed"):
        assert torch.equal(getattr(recursive, name), getattr(plain, name))
        assert not torch.equal(getattr(other, name), getattr(plain, name))


@pytest.mark.parametrize("lower_steps", [1, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_without_prox_and_sets_prox_f2sa_is_f2sa(shared: bool, lower_steps: int) -> None:
    options: dict[str, Any] = {
        "upper": Adam(0.05), "penalty": GROWING, "shared_batches": shared, "lower_steps": lower_steps,
    }  # fmt: skip
    plain = after(noisy(), F2SA(**options, momentum=0.0), 30)
    prox = after(noisy(), ProxF2SA(**options, prox=math.inf, averaging=1.0), 30)
    torch.testing.assert_close(prox.x, plain.x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(prox.y, plain.relaxed, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(prox.value, plain.y, rtol=1e-12, atol=1e-14)
    for name in ("stationarity", "lower_value", "lower_gradient_norm"):
        torch.testing.assert_close(getattr(prox.metrics, name), getattr(plain.metrics, name), rtol=1e-10, atol=1e-12)


def test_at_one_penalty_f2ba_is_f2sa() -> None:
    options: dict[str, Any] = {"upper": Adam(0.05), "penalty": 50.0, "lower_steps": 4}
    plain = after(noisy(), F2SA(**options, momentum=0.0), 30)
    loops = after(noisy(), F2BA(**options), 30)
    for name in ("x", "y", "relaxed"):
        assert torch.equal(getattr(loops, name), getattr(plain, name))


# -- first derivatives only --------------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """A square that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return 2 * y * gradient


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_first_derivatives_are_enough(solver: Solver[Any]) -> None:
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - 1).square().sum(), lower=lambda x, y, b: 0.5 * Once.apply(y - x).sum()
    )
    zero = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(bilevel.SecondOrderUnsupported):
        bilevel.solve(
            Problem(upper=problem.upper, lower=problem.lower, hvp="double_backward"), bilevel.implicit(), zero, zero
        )
    solution = bilevel.solve(problem, solver, zero, zero, steps=400)
    assert solution.counts.hvps == solution.counts.crosses == 0
    assert solution.counts.gradients > 0
    torch.testing.assert_close(solution.x, torch.ones_like(zero), rtol=0.1, atol=0.1)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiling() -> Any:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=False):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("decay", [None, bilevel.L2(weight=lambda x: x.exp().sum())], ids=["plain", "L2"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_whole_step_compiles(solver: Solver[Any], decay: bilevel.L2 | None, compiling: None) -> None:
    """One graph, without a break, that serves every step from the second on, and counts as plain steps do."""
    task = bilevel.problems.quadratic(p=2, d=3)
    problem = replace(task.problem, regularizer=decay)
    oracles, x, y = open_oracles(problem, task.x0, task.y0, needs_hvp=False)
    assert not oracles.random_levels
    plain = [solver.init(oracles, x, y)]
    before = oracles.counts
    for _ in range(5):
        plain.append(solver.step(oracles, plain[-1]))
    counts, oracles.counts = oracles.counts, before
    step = torch.compile(solver.step, backend="aot_eager", fullgraph=True)
    state = plain[0]
    for k in range(5):
        with torch._dynamo.config.patch(error_on_recompile=k > 2):
            state = step(oracles, state)
        torch.testing.assert_close(state.x, plain[k + 1].x, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(state.y, plain[k + 1].y, rtol=1e-12, atol=1e-14)
    assert oracles.counts == counts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch hides it, but not from -W error
def test_a_compiled_step_still_seeds_what_draws(compiling: None) -> None:
    """Random numbers break the graph, and are those of a plain step; the caller's random state stays."""
    task = bilevel.problems.quadratic(p=2, d=3)
    problem = Problem(
        upper=task.problem.upper,
        lower=lambda x, y, b: task.problem.lower(x, y, b) + (0.1 * torch.randn(3).double()) @ y,
    )
    oracles, x, y = open_oracles(problem, task.x0, task.y0, needs_hvp=False)
    assert oracles.random_levels == {"lower"}
    solver = F2SA(lower_steps=1)
    start = solver.init(oracles, x, y)
    plain = solver.step(oracles, start)
    state = torch.get_rng_state()
    compiled = torch.compile(solver.step, backend="aot_eager")(oracles, start)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(compiled.x, plain.x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(compiled.y, plain.y, rtol=1e-12, atol=1e-14)
