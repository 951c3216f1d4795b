"""The primal SVM with coupled constraints: two independent solvers agree, and say by which multipliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import bilevel
from bilevel import BLOCC, KKT, LVHBA, Power, Solution, Status, conditions
from bilevel.problems import Task, svm_primal

LEVELS = LVHBA(penalty=Power(0.1, 0.49), lr=0.2, upper_lr=0.3)


def slack_below(task: Task, x: Tensor) -> dict[str, Tensor]:
    """Return y*(x) by SciPy: the machine without constraints, `(‖(w, b)‖² + ‖max(1 - x - margins, 0)‖²) / 2`."""
    assert task.problem.constraint is not None
    zero = {name: torch.zeros_like(part) for name, part in task.y0.items()}  # type: ignore[union-attr]
    offset = task.problem.constraint(x, zero, None)

    def margins(v: Tensor) -> Tensor:
        y = zero | {"weight": v[:3], "bias": v[3]}
        found: Tensor = offset - task.problem.constraint(x, y, None)  # type: ignore[misc]
        return found

    rows = torch.func.jacrev(margins)(torch.zeros(4, dtype=torch.float64)).numpy()
    missing = offset.numpy()

    def fun(v: np.ndarray) -> tuple[float, np.ndarray]:
        short = np.maximum(missing - rows @ v, 0)
        return 0.5 * (v @ v + short @ short), v - rows.T @ short

    v = minimize(fun, np.zeros(4), jac=True, method="BFGS", options={"gtol": 1e-10}).x
    slack = torch.tensor(np.maximum(missing - rows @ v, 0))
    return {"weight": torch.tensor(v[:3]), "bias": torch.tensor(v[3]), "slack": slack}


def upper(task: Task, x: Tensor, y: dict[str, Tensor]) -> float:
    assert task.problem.upper_data is not None
    return float(task.problem.upper(x, y, task.problem.upper_data.batch(0, 0)))


@pytest.fixture(scope="module")
def task() -> Task:
    return svm_primal()


@pytest.fixture(scope="module")
def exact(task: Task) -> Solution:
    return bilevel.solve(task.problem, KKT(starts=1), task.x0, task.y0, steps=6)


def test_the_reference_solver_is_right_to_all_digits(task: Task, exact: Solution) -> None:
    assert exact.status is Status.COMPLETED
    again = slack_below(task, exact.x)
    for name, part in again.items():
        torch.testing.assert_close(exact.y[name], part, rtol=0, atol=1e-7)
    found = conditions(task.problem, exact.x, exact.y, exact.state.multiplier)
    for value in (found.upper_violation, found.lower_violation, found.stationarity, found.complementarity):
        assert float(value) < 1e-9
    torch.testing.assert_close(found.constraint_multiplier, exact.y["slack"], rtol=0, atol=1e-9)
    assert 5 < int((found.constraint_multiplier > 1e-6).sum()) < 20
    assert float(exact.state.report.lower_gap) < 1e-9


def test_wrong_labels_are_found_and_the_machine_improves(task: Task, exact: Solution) -> None:
    assert task.evaluate is not None
    plain = slack_below(task, task.x0)
    before, after = task.evaluate(task.x0, plain), task.evaluate(exact.x, exact.y)
    assert after["wrong_labels_found"] == 2.0
    assert after["test_accuracy"] > before["test_accuracy"] + 0.03
    assert upper(task, exact.x, exact.y) < upper(task, task.x0, plain) - 0.1


def test_other_sizes_and_splits() -> None:
    for seed, samples, wrong in ((1, 12, 0), (2, 16, 3)):
        task = svm_primal(seed, samples=samples, wrong=wrong)
        assert task.x0.shape == (samples,)
        solution = bilevel.solve(task.problem, LEVELS, task.x0, task.y0, steps=20)
        assert task.evaluate is not None
        assert task.evaluate(solution.x, solution.y)["largest_violation"] < 1e-12
        found = conditions(task.problem, solution.x, solution.y, solution.state.multiplier)
        assert float(found.upper_violation) < 1e-12


@pytest.mark.slow
def test_lv_hba_agrees_with_the_reference_solver(task: Task, exact: Solution) -> None:
    solution = bilevel.solve(task.problem, LEVELS, task.x0, task.y0, steps=task.steps)
    assert solution.status is Status.COMPLETED
    value = upper(task, exact.x, exact.y)
    assert upper(task, solution.x, solution.y) == pytest.approx(value, abs=1e-2)

    # y is the lower solution at the x found, up to the relaxation, and f there agrees too.
    again = slack_below(task, solution.x)
    assert upper(task, solution.x, again) == pytest.approx(value, abs=1e-2)
    assert max(float((solution.y[name] - part).norm()) for name, part in again.items()) < 0.1

    found = conditions(task.problem, solution.x, solution.y, solution.state.multiplier)
    assert float(found.upper_violation) < 1e-12
    assert float(found.lower_violation) < 1e-12
    assert float(found.stationarity) < 0.2
    torch.testing.assert_close(found.constraint_multiplier, exact.state.multiplier, rtol=0, atol=0.1)
    assert task.evaluate is not None
    assert task.evaluate(solution.x, solution.y)["wrong_labels_found"] == 2.0


@pytest.mark.slow
def test_blocc_agrees_without_a_joint_projection(task: Task, exact: Solution) -> None:
    solution = bilevel.solve(task.problem, BLOCC(), task.x0, task.y0, steps=600)
    assert solution.status is Status.COMPLETED
    assert upper(task, solution.x, solution.y) == pytest.approx(upper(task, exact.x, exact.y), abs=3e-3)
    found = conditions(task.problem, solution.x, solution.y, solution.state.multiplier)
    assert float(found.upper_violation) == 0.0
    assert float(found.lower_violation) < 1e-2
    assert float(found.stationarity) < 1e-2
    torch.testing.assert_close(found.constraint_multiplier, exact.state.multiplier, rtol=0, atol=2e-2)
