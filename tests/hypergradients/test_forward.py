"""Forward mode: equal to reverse mode along every direction; unbiased along random ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, Adam, AdamW, ForwardMode, Full, Problem, Shuffled, Status, Unrolled, hypergradient
from bilevel.status import InvalidProblem


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DATA = Shuffled((draw(12, 4), draw(12, seed=1)), batch_size=4)


def lower(x: Any, y: Any, b: Any) -> Tensor:
    return (b[0] @ torch.tanh(y["w"]) + y["b"] - b[1] * x["scale"]).square().mean()


PROBLEM = Problem(
    upper=lambda x, y, b: (b[0] @ torch.tanh(y["w"]) + y["b"] - b[1]).square().mean() + 0.1 * x["scale"].square(),
    lower=lower,
    upper_data=Full((draw(6, 4, seed=2), draw(6, seed=3))),
    lower_data=DATA,
    regularizer=bilevel.L2(weight=lambda x: x["decay"].exp()),
    lower_init=lambda x: {"w": x["start"] * 1.0, "b": x["scale"] * 0.1},
)
X = {
    "scale": torch.tensor(0.7, dtype=torch.float64), "decay": torch.tensor(-2.0, dtype=torch.float64),
    "rate": torch.tensor(-1.0, dtype=torch.float64), "start": 0.3 * draw(4, seed=4),
}  # fmt: skip
Y = {"w": torch.zeros(4, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}


def rate(x: Any, step: int) -> Tensor:
    learned: Tensor = 0.1 * x["rate"].exp()
    return learned


OPTIMIZERS = [SGD(rate), SGD(rate, 0.8, nesterov=True), Adam(rate), AdamW(rate, weight_decay=0.1)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["SGD", "Nesterov", "Adam", "AdamW"])
def test_forward_mode_is_reverse_mode(optimizer: Any) -> None:
    forward = hypergradient(PROBLEM, X, Y, estimator=ForwardMode(lower=optimizer, steps=9))
    reverse = hypergradient(PROBLEM, X, Y, estimator=Unrolled(lower=optimizer, steps=9))
    for name in X:
        torch.testing.assert_close(forward.gradient[name], reverse.gradient[name], rtol=1e-11, atol=1e-14)
    assert forward.certificate.status is Status.CONVERGED
    assert forward.certificate.error_estimate is not None
    assert float(forward.certificate.error_estimate) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("directions", [1, 8])
def test_random_directions_average_to_the_gradient(directions: int) -> None:
    problem = Problem(upper=PROBLEM.upper, lower=lower, upper_data=PROBLEM.upper_data, lower_data=Full(DATA.data))
    x, y = {"scale": X["scale"], "rate": X["rate"]}, {"w": 0.3 * draw(4, seed=4), "b": Y["b"]}
    exact = hypergradient(problem, x, y, estimator=Unrolled(lower=SGD(rate), steps=3)).gradient
    whole = torch.stack(list(exact.values()))
    estimator = ForwardMode(lower=SGD(rate), steps=3, directions=directions)
    rows, claimed = [], []
    for step in range(300):
        h = hypergradient(problem, x, y, estimator=estimator, step=step)
        rows.append(torch.stack(list(h.gradient.values())))
        assert h.certificate.error_estimate is not None
        claimed.append(h.certificate.error_estimate.square())
    found = torch.stack(rows)
    error = (found.mean(0) - whole).norm()
    spread = (found - whole).square().sum(-1).mean().sqrt()
    assert float(error) < 4 * float(spread) / 300**0.5
    assert float(torch.stack(claimed).mean().sqrt()) == pytest.approx(float(spread), rel=0.3)


def test_long_x_is_sent_elsewhere() -> None:
    problem = Problem(upper=lambda x, y, b: y, lower=lambda x, y, b: (y - x.sum()).square())
    with pytest.raises(InvalidProblem, match=r"each of 300 entries.*Unrolled"):
        hypergradient(problem, torch.ones(300), torch.ones(()), estimator=ForwardMode(lower=SGD(0.1)))
    with pytest.raises(InvalidProblem, match="directions"):
        ForwardMode(directions=0)


def test_it_needs_double_backward() -> None:
    problem = Problem(upper=lambda x, y, b: y, lower=lambda x, y, b: (y - x).square(), hvp="differences")
    with pytest.raises(InvalidProblem, match="not by differences"):
        hypergradient(problem, torch.ones(()), torch.ones(()), estimator=ForwardMode(lower=SGD(0.1)))


def test_it_descends() -> None:
    task = bilevel.problems.scalar()
    solver = bilevel.HypergradientDescent(estimator=ForwardMode(steps=10), lower_steps=0)
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=100)
    assert task.problem.reference is not None
    assert abs(float(solution.x) - float(task.problem.reference)) < 1e-2


# -- real-time hyperparameter optimization: the derivatives go on ------------------------------------------------------


H, RATE = 1.5, 0.2


def attracted(lr: Any = RATE) -> tuple[Problem, ForwardMode]:
    problem = Problem(
        upper=lambda x, y, b: (y - 3).square() / 2 + 0 * x["lr"],
        lower=lambda x, y, b: H * (y - x["to"]).square() / 2,
    )
    return problem, ForwardMode(lower=SGD(lr, 0.0), steps=2, restart=False, carry=True)


def one(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_carried_derivatives_have_their_closed_form() -> None:
    # y+ = y - lr h (y - x), with lr and x learned: z_x+ = (1 - lr h) z_x + lr h,  z_lr+ = (1 - lr h) z_lr - h (y - x)
    problem, estimator = attracted(lambda x, step: x["lr"])
    solver = bilevel.HypergradientDescent(estimator=estimator, lower_steps=0, upper=SGD(0.05))
    oracles, x, y = bilevel.dry_run.open_oracles(problem, {"to": one(1.0), "lr": one(RATE)}, one(0.0), trains=True)
    state = solver.init(oracles, x, y)
    to, lr, weight, z_to, z_lr = 1.0, RATE, 0.0, 0.0, 0.0
    for _ in range(5):
        for _ in range(2):
            slope = H * (weight - to)
            weight, z_to, z_lr = weight - lr * slope, (1 - lr * H) * z_to + lr * H, (1 - lr * H) * z_lr - slope
        h = torch.tensor([(weight - 3) * z_to, (weight - 3) * z_lr], dtype=torch.float64)
        estimate, _ = estimator.estimate(oracles, state.x, state.y, state.estimator, upper_step=state.step)
        torch.testing.assert_close(estimate.gradient, h, rtol=1e-12, atol=1e-14)
        assert estimate.certificate.status is Status.APPROXIMATE
        assert estimate.certificate.error_estimate is None
        state = solver.step(oracles, state)
        to, lr = to - 0.05 * float(h[0]), lr - 0.05 * float(h[1])
        torch.testing.assert_close(state.x, torch.tensor([to, lr], dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_at_a_fixed_x_they_are_those_of_the_whole_past() -> None:
    """Two trainings of 4 steps, carried, are one of 8: weights, momentum and derivatives go on."""
    problem = bilevel.Problem(
        upper=lambda x, y, b: (y - 1).square().sum(),
        lower=lambda x, y, b: (x.exp() * y.pow(4)).sum() + (y - x).square().sum(),
    )
    x0, y0 = 0.3 * draw(3), draw(3, seed=1)
    oracles, x, y = bilevel.dry_run.open_oracles(problem, x0, y0, trains=True)
    twice = ForwardMode(lower=SGD(0.01, 0.9), steps=4, restart=False, carry=True)
    state = twice.init(oracles, x, y)
    first, state = twice.estimate(oracles, x, y, state)
    second, _ = twice.estimate(oracles, x, first.y, state, upper_step=1)
    whole = hypergradient(problem, x0, y0, estimator=ForwardMode(lower=SGD(0.01, 0.9), steps=8))
    torch.testing.assert_close(second.gradient, whole.gradient, rtol=1e-12, atol=1e-14)
    forgets = ForwardMode(lower=SGD(0.01, 0.9), steps=4, restart=False)
    other = forgets.estimate(oracles, x, y, forgets.init(oracles, x, y))
    third, _ = forgets.estimate(oracles, x, other[0].y, other[1], upper_step=1)
    assert float((third.gradient - whole.gradient).norm()) > 0.1 * float(whole.gradient.norm())


def test_carrying_finds_what_forgetting_cannot() -> None:
    # One step of a slow training sees a twentieth of what x does to y, beside a direct term that pulls x away.
    problem = Problem(
        upper=lambda x, y, b: (y - 3).square() / 2 + x.square() / 2, lower=lambda x, y, b: (y - x).square() / 2
    )
    found = {}
    for carry in (True, False):
        estimator = ForwardMode(lower=SGD(0.05), steps=1, restart=False, carry=carry)
        solver = bilevel.HypergradientDescent(estimator=estimator, lower_steps=0, upper=SGD(0.02))
        found[carry] = float(bilevel.solve(problem, solver, one(0.0), one(0.0), steps=600).x)
    assert found[True] == pytest.approx(1.5, abs=1e-3)  # the minimizer of (x - 3)^2 / 2 + x^2 / 2
    assert found[False] == pytest.approx(3 * 0.05 / 1.05, abs=1e-3)


def test_carried_derivatives_survive_saving() -> None:
    problem, estimator = attracted()
    solver = bilevel.HypergradientDescent(estimator=estimator, lower_steps=0)
    x0 = {"to": one(1.0), "lr": one(0.0)}
    whole = bilevel.Session(problem, solver, x0, one(0.0))
    half = bilevel.Session(problem, solver, x0, one(0.0))
    for _ in range(3):
        half.step()
    rest = bilevel.Session(problem, solver, x0, one(0.0))
    rest.load_state_dict(half.state_dict())
    for _ in range(6):
        whole.step()
    for _ in range(3):
        rest.step()
    assert torch.equal(whole.x["to"], rest.x["to"])


@pytest.mark.parametrize("options", [{}, {"restart": True}, {"restart": False, "directions": 2}])
def test_carrying_needs_a_training_that_goes_on(options: Any) -> None:
    with pytest.raises(InvalidProblem, match="carry=True"):
        ForwardMode(carry=True, **options)
