"""L-BFGS against closed forms and SciPy, and what it says when it cannot."""

import itertools
import math

import pytest
import torch

from bilevel.optimizers import LBFGS
from bilevel.optimizers._line_search import Trial, strong_wolfe
from bilevel.optimizers.lbfgs import _Pairs, _Run
from bilevel.status import InvalidProblem, Status

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def objective(function):
    """Value and gradient of a scalar function."""

    def fun(y):
        y = y.detach().requires_grad_()
        value = function(y)
        return value.detach(), torch.autograd.grad(value, y)[0]

    return fun


def counted(fun):
    calls = []

    def wrapped(y):
        calls.append(y.clone())
        return fun(y)

    return wrapped, calls


def quadratic(condition, size=20, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = scale * (basis * torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)) @ basis.T
    solution = torch.randn(size, generator=generator, dtype=torch.float64)
    b = (matrix @ solution).to(dtype)
    matrix = ((matrix + matrix.T) / 2).to(dtype)
    return lambda y: (y @ matrix @ y / 2 - b @ y, matrix @ y - b), solution.to(dtype)


def rosenbrock(y):
    return ((1 - y[:-1]) ** 2 + 100 * (y[1:] - y[:-1] ** 2) ** 2).sum()


def logistic(dtype=torch.float64, weight=1e-3):
    generator = torch.Generator().manual_seed(2)
    X = torch.randn(200, 10, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, generator=generator, dtype=torch.float64)
    sign = torch.sign(X @ torch.ones(10, dtype=torch.float64) + 2 * noise).to(dtype)
    X = X.to(dtype)
    return objective(lambda y: torch.nn.functional.softplus(-sign * (X @ y)).mean() + weight / 2 * (y * y).sum())


def with_scipy(fun, y0):
    optimize = pytest.importorskip("scipy.optimize")

    def both(z):
        value, gradient = fun(torch.from_numpy(z.copy()))
        return value.item(), gradient.numpy()

    options = {"maxiter": 5000, "maxfun": 10000, "ftol": 0.0, "gtol": 1e-9}
    return optimize.minimize(both, y0.numpy().copy(), jac=True, method="L-BFGS-B", options=options)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_quadratic(condition):
    fun, solution = quadratic(condition)
    y0 = torch.zeros(20, dtype=torch.float64)
    minimum = LBFGS(max_steps=1000, tol=1e-10, patience=40).minimize(fun, y0)
    assert minimum.status is Status.CONVERGED
    assert minimum.gradient_norm <= 1e-10
    # ‖y - y*‖ <= ‖g‖ / (least curvature).
    assert torch.linalg.vector_norm(minimum.y - solution) <= 1e-10 * condition * 1.01
    reference = with_scipy(fun, y0)
    assert minimum.evaluations <= 1.5 * reference.nfev + 10
    assert minimum.steps < minimum.evaluations


def test_full_memory_ends_a_quadratic_fast():
    fun, _ = quadratic(1e3)
    long = LBFGS(memory=40, max_steps=500).minimize(fun, torch.zeros(20, dtype=torch.float64))
    short = LBFGS(memory=2, max_steps=500).minimize(fun, torch.zeros(20, dtype=torch.float64))
    assert long.status is short.status is Status.CONVERGED
    assert long.steps < short.steps


@pytest.mark.parametrize("size", [2, 30])
def test_rosenbrock(size):
    y0 = torch.full((size,), -1.2, dtype=torch.float64)
    y0[1::2] = 1.0
    fun = objective(rosenbrock)
    minimum = LBFGS(max_steps=1000).minimize(fun, y0)
    assert minimum.status is Status.CONVERGED
    value, gradient = fun(minimum.y)
    torch.testing.assert_close(minimum.value, value, rtol=0, atol=0)
    torch.testing.assert_close(minimum.gradient_norm, gradient.norm())
    assert minimum.gradient_norm <= 1e-8
    assert minimum.evaluations <= 1.5 * with_scipy(fun, y0).nfev + 10
    if size == 2:
        torch.testing.assert_close(minimum.y, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("weight", [1.0, 1e-3, 0.0])
def test_logistic_regression(weight):
    fun, y0 = logistic(weight=weight), torch.zeros(10, dtype=torch.float64)
    minimum = LBFGS().minimize(fun, y0)
    reference = with_scipy(fun, y0)
    assert minimum.status is Status.CONVERGED
    torch.testing.assert_close(minimum.y, torch.from_numpy(reference.x), rtol=1e-5, atol=1e-6)
    assert minimum.value.item() <= reference.fun + 1e-14


def test_rows_are_one_point():
    fun, solution = quadratic(10.0, size=6)

    def rows(y):
        pairs = [fun(row) for row in y]
        return torch.stack([value for value, _ in pairs]), torch.stack([gradient for _, gradient in pairs])

    y0 = torch.stack([torch.zeros(6), torch.ones(6), -torch.ones(6)]).double()
    minimum = LBFGS().minimize(rows, y0)
    assert minimum.status is Status.CONVERGED
    assert minimum.y.shape == (3, 6)
    torch.testing.assert_close(minimum.y, solution.expand(3, 6), rtol=0, atol=1e-6)
    summed = LBFGS().minimize(lambda y: (rows(y)[0].sum(), rows(y)[1]), y0)
    assert torch.equal(summed.y, minimum.y)
    assert minimum.value.ndim == minimum.gradient_norm.ndim == 0


def test_a_warm_start_ends_at_once():
    fun, _ = quadratic(100.0)
    first = LBFGS(max_steps=500).minimize(fun, torch.zeros(20, dtype=torch.float64))
    again = LBFGS(max_steps=500).minimize(fun, first.y)
    assert again.status is Status.CONVERGED
    assert (again.steps, again.evaluations) == (0, 1)
    assert torch.equal(again.y, first.y)


def test_tol_does_not_look_at_the_value():
    fun, _ = quadratic(10.0)
    minimum = LBFGS().minimize(lambda y: (fun(y)[0] + 1e6, fun(y)[1]), torch.zeros(20, dtype=torch.float64))
    assert minimum.status is Status.CONVERGED
    assert minimum.gradient_norm <= 1e-8


def test_tol_and_max_steps_of_the_call_come_first():
    fun, _ = quadratic(100.0)
    y0 = torch.zeros(20, dtype=torch.float64)
    loose = LBFGS(tol=1e-12, max_steps=500).minimize(fun, y0, tol=1e-3)
    assert loose.status is Status.CONVERGED
    assert 1e-8 < loose.gradient_norm <= 1e-3
    assert LBFGS(tol=1e-3).minimize(fun, y0).steps == loose.steps
    for few in (LBFGS(max_steps=3).minimize(fun, y0), LBFGS().minimize(fun, y0, max_steps=3)):
        assert few.status is Status.STEP_LIMIT
        assert few.steps == 3
        assert few.value < fun(y0)[0]


def test_patience():
    fun, _ = quadratic(1e4, dtype=torch.float32, scale=1e6)
    runs = [LBFGS(max_steps=5000, patience=patience).minimize(fun, torch.zeros(20)) for patience in (1, 10, 100)]
    assert all(run.status is Status.STALLED for run in runs)
    assert runs[0].steps < runs[1].steps < runs[2].steps
    assert runs[2].gradient_norm < 0.1 * runs[1].gradient_norm


def test_no_steps_only_looks():
    fun, calls = counted(quadratic(10.0)[0])
    y0 = torch.ones(20, dtype=torch.float64)
    minimum = LBFGS(max_steps=0).minimize(fun, y0)
    assert minimum.status is Status.STEP_LIMIT
    assert len(calls) == minimum.evaluations == 1
    assert torch.equal(minimum.y, y0)


def test_max_trials_bounds_the_evaluations():
    fun, calls = counted(objective(rosenbrock))
    y0 = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    minimum = LBFGS(max_trials=2, max_steps=15).minimize(fun, y0)
    assert minimum.evaluations == len(calls) <= 1 + 2 * 2 * 15
    assert minimum.value < fun(y0)[0]


def test_deterministic_and_pure():
    fun = objective(rosenbrock)
    y0 = torch.tensor([-1.2, 1.0, 0.3], dtype=torch.float64, requires_grad=True)
    before = y0.detach().clone()
    first, second = LBFGS().minimize(fun, y0), LBFGS().minimize(fun, y0)
    assert torch.equal(first.y, second.y)
    assert first.evaluations == second.evaluations
    assert torch.equal(y0.detach(), before)
    assert not first.y.requires_grad
    assert not first.value.requires_grad


def test_a_reused_gradient_buffer_does_no_harm():
    fun, _ = quadratic(100.0)
    buffer = torch.empty(20, dtype=torch.float64)

    def reusing(y):
        value, gradient = fun(y)
        return value, buffer.copy_(gradient)

    y0 = torch.zeros(20, dtype=torch.float64)
    assert torch.equal(LBFGS().minimize(reusing, y0).y, LBFGS().minimize(fun, y0).y)


@pytest.mark.parametrize(
    ("function", "y0"),
    [
        (lambda y: y.sum(), [1.0, 2.0]),
        (lambda y: -(y * y).sum(), [1.0, 2.0]),
        (lambda y: y[0] ** 2 - y[1] ** 2, [1.0, 1e-3]),
        (lambda y: -y.exp().sum(), [1.0, 1.0]),
        (lambda y: -(y**4).sum(), [1.0, 0.0]),
    ],
    ids=["linear", "concave", "saddle", "exponential", "quartic"],
)
@DTYPES
def test_unbounded_below(function, y0, dtype):
    fun, calls = counted(objective(function))
    minimum = LBFGS().minimize(fun, torch.tensor(y0, dtype=dtype))
    assert minimum.status is Status.DIVERGED
    assert len(calls) < 120
    assert minimum.y.isfinite().all()
    assert minimum.value.isfinite()


@pytest.mark.parametrize("max_trials", [12, 14, 25])
def test_a_far_start_is_not_taken_for_unbounded(max_trials):
    # The first length is 1e-12 here, the right one a hundred million times that.
    fun = objective(lambda y: (1e4 * y * y / 2 + 1e-3 * y**4).sum())
    y0 = torch.tensor([1e8, -3e7], dtype=torch.float64)
    assert LBFGS(max_trials=max_trials).minimize(fun, y0).status is Status.CONVERGED
    bent = strong_wolfe(
        lambda a: Trial(a, -a if a < 3e6 else a, -1.0 if a < 3e6 else 1.0, y0, y0, 1.0),
        Trial(0.0, 0.0, -1.0, y0, y0, 1.0),
        1.0,
        noise=0.0,
        shortest=0.0,
        max_trials=max_trials,
    )
    assert not bent.unbounded
    assert bent.trial is not None


def test_minus_infinity_is_unbounded():
    minimum = LBFGS().minimize(lambda y: (torch.where(y < 0.5, -math.inf, y).sum(), torch.ones_like(y)), torch.ones(1))
    assert minimum.status is Status.DIVERGED
    assert minimum.value == 1.0


@DTYPES
def test_a_start_that_is_not_finite(dtype):
    y0 = -torch.ones(2, dtype=dtype)
    minimum = LBFGS().minimize(objective(lambda y: y.log().sum()), y0)
    assert minimum.status is Status.NON_FINITE
    assert torch.equal(minimum.y, y0)
    assert minimum.evaluations == 1
    hidden = LBFGS().minimize(lambda y: (y.sum(), torch.full_like(y, math.nan)), y0)
    assert hidden.status is Status.NON_FINITE


@DTYPES
def test_nothing_finite_around_the_start(dtype):
    y0 = torch.ones(2, dtype=dtype)
    minimum = LBFGS().minimize(lambda y: (torch.where(y == 1, y, math.nan).sum(), torch.ones_like(y)), y0)
    assert minimum.status is Status.NON_FINITE
    assert torch.equal(minimum.y, y0)
    assert minimum.evaluations < 60


@DTYPES
def test_a_barrier_is_stepped_back_from(dtype):
    # The first trials leave the domain (0, 1).
    fun = objective(lambda y: -((1 - y).log() + 0.1 * y.log()).sum())
    minimum = LBFGS().minimize(fun, torch.full((3,), 0.99, dtype=dtype))
    assert minimum.status is Status.CONVERGED
    torch.testing.assert_close(minimum.y, torch.full((3,), 1 / 11, dtype=dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e6])
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e4])
def test_float32_ends_at_its_precision(condition, scale):
    fun, _ = quadratic(condition, dtype=torch.float32, scale=scale)
    fun, calls = counted(fun)
    y0 = torch.zeros(20)
    minimum = LBFGS(max_steps=10_000).minimize(fun, y0)
    assert minimum.status in {Status.CONVERGED, Status.STALLED}
    assert len(calls) < 600
    exact, _ = quadratic(condition, scale=scale)
    least = LBFGS(max_steps=10_000).minimize(exact, y0.double()).value.item()
    assert minimum.value.item() <= least + 1e-5 * abs(least)
    if condition == 1e1 and scale == 1.0:
        assert minimum.status is Status.CONVERGED
        assert minimum.gradient_norm <= 1.2e-6


def test_float32_logistic_regression_converges():
    minimum = LBFGS().minimize(logistic(torch.float32), torch.zeros(10))
    assert minimum.status is Status.CONVERGED
    assert minimum.y.dtype == minimum.value.dtype == torch.float32
    exact = LBFGS().minimize(logistic(), torch.zeros(10, dtype=torch.float64))
    torch.testing.assert_close(minimum.y, exact.y.float(), rtol=1e-3, atol=1e-4)


@DTYPES
def test_a_false_gradient_stalls(dtype):
    fun, calls = counted(lambda y: ((y * y).sum(), -2 * y))
    y0 = torch.ones(3, dtype=dtype)
    minimum = LBFGS().minimize(fun, y0)
    assert minimum.status is Status.STALLED
    assert torch.equal(minimum.y, y0)
    assert len(calls) < 40


def test_a_kink_stalls_without_harm():
    fun = objective(lambda y: (y - torch.tensor([0.1, 0.7, -0.3])).abs().sum() + 1)
    y0 = torch.tensor([1.0, -0.3, 2.0])
    minimum = LBFGS(max_steps=1000).minimize(fun, y0)
    assert minimum.status is Status.STALLED
    assert minimum.value < fun(y0)[0]
    assert minimum.evaluations < 500


@DTYPES
def test_never_worse_than_the_start(dtype):
    eps = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        phases = (6 * torch.rand(4, generator=generator)).to(dtype)
        fun = objective(lambda y, p=phases: (torch.sin(3 * y + p) + 0.05 * y * y).sum())
        y0 = (3 * torch.randn(4, generator=generator)).to(dtype)
        for steps in (1, 3, 200):
            minimum = LBFGS(max_steps=steps).minimize(fun, y0)
            start = fun(y0)[0]
            assert minimum.value <= start + 10 * eps * start.abs()


def test_negative_curvature_is_crossed():
    # Starts where the Hessian is negative; those pairs are left out.
    fun = objective(lambda y: (-torch.exp(-y * y / 2)).sum())
    minimum = LBFGS().minimize(fun, torch.tensor([2.0, -1.7], dtype=torch.float64))
    assert minimum.status is Status.CONVERGED
    torch.testing.assert_close(minimum.y, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-7)


def test_a_wrong_gradient_shape_is_told():
    with pytest.raises(InvalidProblem, match=r"gradient of shape \(1, 3\)"):
        LBFGS().minimize(lambda y: (y.sum(), torch.ones(1, 3)), torch.zeros(3))
    with pytest.raises(InvalidProblem, match=r"torch\.float64"):
        LBFGS().minimize(lambda y: (y.sum(), torch.ones(3).double()), torch.zeros(3))


def test_a_stationary_start_and_no_variables():
    assert LBFGS().minimize(lambda y: ((y * y).sum(), 2 * y), torch.zeros(3)).steps == 0
    empty = LBFGS().minimize(lambda y: (y.sum(), torch.ones_like(y)), torch.zeros(0))
    assert empty.status is Status.CONVERGED


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (lambda a: (a - 1) ** 2, 1e-6),
        (lambda a: (a - 1) ** 2, 50.0),
        (lambda a: a**4 - 3 * a, 10.0),
        (lambda a: torch.cosh(a - 2), 1e-3),
        (lambda a: -a / (a * a + 2), 30.0),
        (lambda a: (a + 0.004) ** 5 - 2 * (a + 0.004) ** 4, 20.0),
    ],
)
def test_the_line_search_meets_the_wolfe_conditions(function, first):
    def evaluate(length):
        a = torch.tensor([length], dtype=torch.float64, requires_grad=True)
        value = function(a).sum()
        (slope,) = torch.autograd.grad(value, a)
        return Trial(length, value.item(), slope.item(), a.detach(), slope, slope.abs().item())

    start = evaluate(0.0)
    search = strong_wolfe(evaluate, start, first, noise=1e-15, shortest=0.0, max_trials=40)
    assert search.trial is not None
    assert search.finite
    assert not search.unbounded
    assert search.trial.value <= start.value + 1e-4 * search.trial.length * start.slope + 1e-15
    assert abs(search.trial.slope) <= 0.9 * abs(start.slope)
    assert search.evaluations <= 20


def test_pairs_without_curvature_are_left_out():
    pairs = _Pairs(3, eps=1e-16)
    s = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for z in (-s, 0 * s, torch.tensor([1e-17, 1.0], dtype=torch.float64)):
        pairs.push(s, z)
    assert not pairs.kept
    assert torch.equal(pairs.direction(s), -s)
    pairs.push(s, 4 * s)
    torch.testing.assert_close(pairs.direction(s), -s / 4)


def test_an_uphill_direction_forgets_the_pairs():
    y0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    run = _Run(LBFGS(), lambda y: ((y * y).sum() / 2, y), y0, tol=1e-8)
    run.pairs.kept.append((y0, 0 * y0, torch.tensor(-1.0, dtype=torch.float64)))
    assert run.step() is None
    assert not run.pairs.kept
    assert run.to_end(10).status is Status.CONVERGED


@pytest.mark.slow
def test_more_steps_never_return_a_worse_point():
    fun, _ = quadratic(1e2, dtype=torch.float32, scale=1e3)
    runs = [LBFGS(max_steps=steps, patience=100).minimize(fun, torch.zeros(20)) for steps in range(40, 110)]
    assert runs[-1].status is Status.STALLED
    for shorter, longer in itertools.pairwise(runs):
        noise = 10 * 1.2e-7 * shorter.value.abs()
        assert longer.value < shorter.value - 0.5 * noise or longer.gradient_norm <= shorter.gradient_norm


def test_the_floor_of_the_precision_costs_little():
    # The values go to 0 here, so that their rounding does not show in them.
    fun, calls = counted(objective(rosenbrock))
    minimum = LBFGS(max_steps=1000).minimize(fun, -torch.ones(50))
    assert minimum.status in {Status.CONVERGED, Status.STALLED}
    assert len(calls) < 1.4 * minimum.steps


def test_a_search_below_the_noise_gives_up_early():
    y = torch.zeros(1)
    search = strong_wolfe(
        lambda a: Trial(a, 1.0 + 1e-9, -1e-14, y, y, 1.0),
        Trial(0.0, 1.0, -1e-14, y, y, 1.0),
        1.0,
        noise=1e-12,
        shortest=0.0,
        max_trials=25,
    )
    assert search.trial is None
    assert search.evaluations == 3
