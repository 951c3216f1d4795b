"""SciPy on the upper level, against closed forms, on every kind of set that it takes."""

import math

import pytest
import torch

import bilevel
from bilevel.integrations.scipy import minimize

METHODS = ["L-BFGS-B", "SLSQP", "trust-constr"]
TARGET = torch.tensor([0.9, -0.4, 0.3, 1.2], dtype=torch.float64)
CURVATURE = torch.tensor([1.0, 3.0, 10.0, 30.0], dtype=torch.float64)


def quadratic(upper_set=None, **parts):
    """F(x) = sum k (x - t)^2 / 2 through y* = A x, with A not a multiple of the identity."""
    matrix = torch.diag(CURVATURE.sqrt()) + 0.1
    wanted = matrix @ TARGET
    problem = bilevel.Problem(
        upper=lambda x, y, batch: 0.5 * (y - wanted).square().sum(),
        lower=lambda x, y, batch: 0.5 * ((y - matrix @ x).square() * (1 + torch.arange(4.0))).sum(),
        upper_set=upper_set,
        **parts,
    )
    return problem, matrix.T @ matrix


def solved(upper_set, method, x0=None, **options):
    problem, hessian = quadratic(upper_set)
    x0 = torch.full((4,), 0.25, dtype=torch.float64) if x0 is None else x0
    return minimize(problem, x0, torch.zeros(4, dtype=torch.float64), method=method, **options), hessian


def least(hessian, matrix, rhs):
    """Return argmin (x - t)^T H (x - t) / 2 subject to matrix x = rhs, from its linear system."""
    k = len(matrix)
    system = torch.cat([torch.cat([hessian, matrix.T], 1), torch.cat([matrix, matrix.new_zeros(k, k)], 1)])
    return torch.linalg.solve(system, torch.cat([hessian @ TARGET, rhs]))[: len(TARGET)]


def assert_stationary(solution, upper_set, hessian, tol=1e-6):
    """Check `‖x - P(x - h)‖ <= tol` by the closed form of h, and that x is in the set."""
    h = hessian @ (solution.x - TARGET)
    assert float((solution.x - upper_set.project(solution.x - h)).norm()) <= 2 * tol
    assert float(upper_set.violation(solution.x)) <= 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_without_a_set(method):
    solution, _ = solved(None, method)
    assert solution.status is bilevel.Status.CONVERGED, solution.message
    torch.testing.assert_close(solution.x, TARGET, rtol=0, atol=2e-6)
    assert float(solution.certificate.error_estimate) < 1e-6
    assert len(solution.history) < 60
    assert solution.history["error_estimate"][0] < 1e-6
    assert solution.best_value == pytest.approx(0.0, abs=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_in_a_box(method):
    box = bilevel.Box(torch.tensor([-1.0, 0.0, -math.inf, -1.0]), torch.tensor([0.5, 1.0, math.inf, 1.0]))
    solution, hessian = solved(box, method)
    assert solution.status is bilevel.Status.CONVERGED, solution.message
    assert_stationary(solution, box, hessian)
    assert float(solution.x[0]) == pytest.approx(0.5, abs=1e-6)
    assert float(solution.x[3]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("total", [1.0, 1.9])
def test_on_a_simplex(method, total):
    simplex = bilevel.Simplex(total)
    solution, hessian = solved(simplex, method)
    assert solution.status is bilevel.Status.CONVERGED, solution.message
    assert_stationary(solution, simplex, hessian)
    assert float(solution.x.sum()) == pytest.approx(total, abs=1e-12)
    # The closed form: the best of the minima with some entries held at 0.
    found = []
    for zeros in [[j for j in range(4) if mask >> j & 1] for mask in range(15)]:
        rows = torch.cat([torch.ones(1, 4), torch.eye(4)[zeros]]).double()
        x = least(hessian, rows, torch.tensor([total] + [0.0] * len(zeros), dtype=torch.float64))
        if bool((x >= -1e-12).all()):
            found.append((float((x - TARGET) @ hessian @ (x - TARGET)), x))
    torch.testing.assert_close(solution.x, min(found, key=lambda pair: pair[0])[1], rtol=0, atol=5e-6)


@pytest.mark.parametrize("method", METHODS[1:])
def test_under_equations(method):
    rows = torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
    rhs = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)  # the second row repeats the first
    solution, hessian = solved(bilevel.Affine(rows, rhs), method)
    assert solution.status is bilevel.Status.CONVERGED, solution.message
    torch.testing.assert_close(solution.x, least(hessian, rows[[0, 2]], rhs[[0, 2]]), rtol=0, atol=5e-6)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("offset", [0.5, 5.0])
def test_in_a_halfspace(method, offset):
    normal = torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    halfspace = bilevel.Halfspace(normal, offset)
    solution, hessian = solved(halfspace, method)
    assert solution.status is bilevel.Status.CONVERGED, solution.message
    active = normal @ TARGET > offset
    expected = least(hessian, normal[None], torch.tensor([offset], dtype=torch.float64)) if active else TARGET
    torch.testing.assert_close(solution.x, expected, rtol=0, atol=5e-6)


def test_parts_with_sets_of_their_own():
    parts = {"mix": torch.full((2, 2), 0.5), "rate": torch.ones(2), "free": torch.zeros(1)}
    x0 = {name: leaf.double() for name, leaf in parts.items()}

    def flat(x):
        return torch.cat([x["mix"].flatten(), x["rate"], x["free"]])

    wanted = torch.tensor([0.9, 0.3, -2.0, 1.0, -1.0, 0.5, 7.0], dtype=torch.float64)
    upper_set = bilevel.Product({"mix": bilevel.Simplex(axis=1), "rate": bilevel.NonNegative()})
    problem = bilevel.Problem(
        upper=lambda x, y, batch: 0.5 * (y - wanted).square().sum(),
        lower=lambda x, y, batch: 0.5 * (y - flat(x)).square().sum(),
        upper_set=upper_set,
    )
    solution = minimize(problem, x0, torch.zeros(7, dtype=torch.float64))
    assert solution.status is bilevel.Status.CONVERGED, solution.message
    expected = torch.tensor([0.8, 0.2, 0.0, 1.0, 0.0, 0.5, 7.0], dtype=torch.float64)
    torch.testing.assert_close(flat(solution.x), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_ridge_with_one_decay_a_feature():
    task = bilevel.problems.ridge()
    solution = minimize(task.problem, task.x0, task.y0)
    assert solution.status is bilevel.Status.CONVERGED, solution.message

    def value(x):
        return task.problem.upper(x, task.problem.lower_solution(x), task.problem.upper_data.batch(0, 0))

    x = solution.x.clone().requires_grad_()
    (h,) = torch.autograd.grad(value(x), x)
    found = task.problem.upper_set
    assert float((solution.x - found.project(solution.x - h)).norm()) < 2e-6
    adam = bilevel.solve(task.problem, bilevel.implicit(), task.x0, task.y0, steps=40, progress=False)
    assert solution.best_value <= adam.best_value + 1e-9
    assert len(solution.history) < 60
    assert solution.best_value == pytest.approx(float(value(solution.best_x)), abs=1e-10)


def test_kinks_below():
    b, t = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64), torch.tensor([2.5, 0.5, 0.0], dtype=torch.float64)
    problem = bilevel.Problem(
        upper=lambda x, y, batch: (y - t).square().sum() / 2,
        lower=lambda x, y, batch: (y - b).square().sum() / 2,
        regularizer=bilevel.L1(lambda x: x),
        upper_set=bilevel.Box(0, 5),
    )
    solution = minimize(problem, torch.tensor(1.3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    # y = (3 - x, 2 - x, 0) for x in [0.5, 2]: least where (0.5 - x) + (1.5 - x) = 0.
    assert float(solution.x) == pytest.approx(1.0, abs=1e-6)
    assert solution.status is bilevel.Status.CONVERGED, solution.message


def test_a_loose_lower_solve_is_told():
    problem, _ = quadratic()
    loose = bilevel.HypergradientDescent(lower=bilevel.SGD(0.05), lower_steps=1)
    start = torch.zeros(4, dtype=torch.float64)
    with pytest.warns(bilevel.HypergradientInaccurate, match="the error of the last hypergradient is estimated at"):
        solution = minimize(problem, start, start, solver=loose, steps=3)
    assert float(solution.certificate.error_estimate) > 1e-6
    assert solution.status is not bilevel.Status.CONVERGED


@pytest.mark.slow
def test_float32_is_honest():
    task = bilevel.problems.ridge(dtype=torch.float32)
    with pytest.warns(bilevel.HypergradientInaccurate):
        solution = minimize(task.problem, task.x0, task.y0, tol=1e-8)
    assert solution.status is bilevel.Status.STALLED
    assert solution.x.dtype is torch.float32
    assert max(solution.history["stationarity"][-3:]) < 1e-4  # as far as rounding lets it
    rough = minimize(task.problem, task.x0, task.y0, tol=1e-3)
    assert rough.status is bilevel.Status.CONVERGED


def test_limits_and_callbacks():
    stopped, _ = solved(None, "L-BFGS-B", callbacks=[lambda event: event.step == 2])
    assert stopped.status is bilevel.Status.STOPPED
    assert len(stopped.history) == 2
    limited, _ = solved(None, "L-BFGS-B", steps=2)
    assert limited.status is bilevel.Status.STEP_LIMIT
    assert "> tol 1e-06" in limited.message
    assert limited.certificate is not None
    loose, _ = solved(None, "L-BFGS-B", options={"gtol": 10.0})
    assert loose.status is bilevel.Status.STALLED  # SciPy is content, the measure is not
    seen = []
    solution, _ = solved(None, "SLSQP", callbacks=[lambda event: seen.append((event.step, event.x.clone()))])
    assert [step for step, _ in seen] == solution.history["step"]
    torch.testing.assert_close(torch.stack([x for _, x in seen]), torch.stack(solution.history.xs))


def test_a_failed_evaluation_has_a_status():
    problem = bilevel.Problem(
        upper=lambda x, y, batch: -1e3 * y.sum() + 0 * x.sum(),
        lower=lambda x, y, batch: 0.5 * (y - x).square().sum() / (x < 5).double().prod(),
    )
    start = torch.zeros(2, dtype=torch.float64)
    solution = minimize(problem, start, start)
    assert solution.status in {bilevel.Status.NON_FINITE, bilevel.Status.DIVERGED}
    assert torch.isfinite(solution.best_x).all()


def test_what_scipy_cannot_take_is_refused():
    start = torch.zeros(4, dtype=torch.float64)
    for upper_set, method, match in [
        (bilevel.Simplex(), "L-BFGS-B", "takes bounds only"),
        (bilevel.Ball(1.0), None, "bounds and linear constraints"),
        (None, "Newton-CG", "method must be one of"),
    ]:
        with pytest.raises(bilevel.InvalidProblem, match=match):
            minimize(quadratic(upper_set)[0], start, start, method=method)
    with pytest.raises(bilevel.InvalidProblem, match="tol > 0"):
        minimize(quadratic()[0], start, start, tol=0.0)
    with pytest.raises(bilevel.InvalidProblem, match="forms no hypergradient"):
        minimize(quadratic()[0], start, start, solver=bilevel.F2SA())
    random = bilevel.Shuffled((torch.ones(8, 4),), batch_size=2)
    problem = bilevel.Problem(
        upper=lambda x, y, b: (y - 1).square().sum(),
        lower=lambda x, y, b: ((y - x) * b[0].double()).square().sum(),
        lower_data=random,
    )
    with pytest.raises(bilevel.InvalidProblem, match="another batch each step"):
        minimize(problem, start, start)
