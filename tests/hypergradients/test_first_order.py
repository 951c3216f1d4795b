"""MAML of first and second order, and Reptile, on quadratic tasks: everything has a closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, FirstOrder, Full, Problem, Unrolled, hypergradient, maml, reptile
from bilevel.status import InvalidProblem, Status

H = torch.tensor([[0.5, 1.0], [2.0, 3.0], [1.0, 0.2]], dtype=torch.float64)
T = torch.tensor([[1.0, -1.0], [0.5, 2.0], [-2.0, 0.3]], dtype=torch.float64)
Q = T + 0.5
X = torch.tensor([0.3, -0.7], dtype=torch.float64)
TASKS = Problem(
    upper=lambda x, y, b: 0.5 * (y - b).square().sum() + 0.05 * x.square().sum(),
    lower=lambda x, y, b: 0.5 * (b[0] * (y - b[1]).square()).sum(),
    upper_data=Full(Q),
    lower_data=Full((H, T)),
    lower_init=lambda x: x.expand(3, 2),
    blocks=3,
)
Y = torch.zeros(3, 2, dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 3])
def test_each_is_its_formula(steps: int) -> None:
    p = (1 - 0.2 * H) ** steps
    y = p * X + (1 - p) * T
    direct = 0.1 * X
    expected = {
        "second": direct + (p * (y - Q)).mean(0),
        "first": direct + (y - Q).mean(0),
        "reptile": direct + (X - y).mean(0),
    }
    estimators: dict[str, Any] = {
        "second": Unrolled(lower=SGD(0.2), steps=steps),
        "first": FirstOrder(lower=SGD(0.2), steps=steps),
        "reptile": FirstOrder(lower=SGD(0.2), steps=steps, reptile=True),
    }
    for name, estimator in estimators.items():
        h = hypergradient(TASKS, X, Y, estimator=estimator)
        torch.testing.assert_close(h.gradient, expected[name], rtol=1e-12, atol=1e-14)
        if name != "second":
            assert h.certificate.status is Status.APPROXIMATE
            assert h.certificate.counts.hvps == 0


def best_start(steps: int) -> Tensor:
    """The minimizer of the mean over tasks of f after adaptation, and of the small term in x."""
    p = (1 - 0.2 * H) ** steps
    return -(p * ((1 - p) * T - Q)).mean(0) / (p * p).mean(0).add(0.1)


def test_maml_finds_the_best_start_and_its_first_order_form_does_not() -> None:
    found = {
        first_order: bilevel.solve(TASKS, maml(0.2, 3, first_order=first_order, upper=SGD(1.0)), X, steps=150).x
        for first_order in (False, True)
    }
    torch.testing.assert_close(found[False], best_start(3), rtol=1e-8, atol=1e-8)
    assert float((found[True] - best_start(3)).norm()) > 0.05


def test_reptile_goes_where_tasks_pull_least() -> None:
    """A fixed point of x = x - beta mean((1 - p) (x - T)) without the direct term."""
    problem = Problem(
        upper=lambda x, y, b: 0.5 * (y - b).square().sum(), lower=TASKS.lower, upper_data=Full(Q),
        lower_data=TASKS.lower_data, lower_init=TASKS.lower_init, blocks=3,
    )  # fmt: skip
    q = 1 - (1 - 0.2 * H) ** 4
    found = bilevel.solve(problem, reptile(0.2, 4), X, steps=200).x
    torch.testing.assert_close(found, (q * T).mean(0) / q.mean(0), rtol=1e-8, atol=1e-8)


class Numbered(bilevel.DataSource):
    """Gives the number of the batch to each task."""

    deterministic = False

    def __init__(self) -> None:
        self.asked: list[int] = []

    def batch(self, step: int, seed: int) -> Tensor:
        self.asked.append(step)
        return torch.full((3,), float(step), dtype=torch.float64)


def test_each_upper_step_sees_tasks_of_its_own() -> None:
    upper, lower = Numbered(), Numbered()
    problem = Problem(
        upper=lambda x, y, b: (y - 1e-3 * b).square().sum(), lower=lambda x, y, b: (y - 1e-3 * b).square().sum(),
        upper_data=upper, lower_data=lower, lower_init=lambda x: x.expand(3, 2), blocks=3,
    )  # fmt: skip
    for first_order in (True, False):
        session = bilevel.Session(problem, maml(0.1, 2, first_order=first_order), X)
        for step in range(3):
            upper.asked.clear()
            lower.asked.clear()
            session.step()
            assert set(upper.asked) == {step}
            # One more looks at the lower objective at the end.
            assert {2 * step, 2 * step + 1} <= set(lower.asked) <= {2 * step, 2 * step + 1, 2 * step + 2}


def test_without_a_start_to_learn_it_is_refused() -> None:
    problem = Problem(upper=lambda x, y, b: (y - x).square(), lower=lambda x, y, b: (y - x).square())
    one = torch.ones(())
    with pytest.raises(InvalidProblem, match="lower_init"):
        hypergradient(problem, one, one, estimator=FirstOrder(lower=SGD(0.1)))
    with pytest.raises(InvalidProblem, match="no start to learn"):
        FirstOrder(restart=False)
