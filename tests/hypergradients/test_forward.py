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
