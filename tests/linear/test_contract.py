"""What every solver promises, one row of the tables below for each."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import linear
from bilevel.linear import (
    CG,
    GMRES,
    MFAC,
    MINRES,
    Dense,
    Identity,
    Jacobi,
    LinearSolver,
    Neumann,
    NormalCG,
    Nystrom,
    NystromPreconditioner,
    Operator,
    Sama,
)
from bilevel.status import InvalidProblem, Status

from .systems import exact, normal, operator, residual, spd, spd_rows, symmetric, times

D = 8
ITERATIVE = {
    "CG": CG(tol=1e-13, max_steps=None),
    "CG-jacobi": CG(tol=1e-13, max_steps=None, preconditioner=Jacobi()),
    "CG-nystrom": CG(tol=1e-13, max_steps=None, preconditioner=NystromPreconditioner(rank=1)),
    "MINRES": MINRES(tol=1e-13, max_steps=None),
    "NormalCG": NormalCG(tol=1e-13, max_steps=60),
    "GMRES": GMRES(tol=1e-13, max_steps=60),
    "Neumann": Neumann(tol=1e-13, terms=400),
}
EXACT = {**ITERATIVE, "Dense": Dense()}
FIXED = {
    "Identity": Identity(scale=0.3),
    "Sama": Sama(),
    "Nystrom": Nystrom(rank=1, damping=0.5),
    "Nystrom-columns": Nystrom(rank=1, damping=0.5, columns=True),
    "MFAC": MFAC(gradients=D, damping=0.5),
}
ALL = {**EXACT, **FIXED}
TRUNCATED = {
    f"{name}-3": dataclasses.replace(s, tol=1e-3, **{"terms" if isinstance(s, Neumann) else "max_steps": 3})
    for name, s in ITERATIVE.items()
}


def table(solvers: dict[str, LinearSolver], *leave_out: str):
    chosen = {name: s for name, s in solvers.items() if name not in leave_out}
    return pytest.mark.parametrize("solver", chosen.values(), ids=chosen.keys())


def damping(solver: LinearSolver) -> float:
    return getattr(solver, "damping", 0.0)


def test_every_public_solver_is_in_the_tables():
    public = {getattr(linear, name) for name in linear.__all__}
    solvers = {c for c in public if isinstance(c, type) and issubclass(c, LinearSolver)} - {LinearSolver}
    assert solvers == {type(s) for s in ALL.values()}


@table(EXACT)
@pytest.mark.parametrize("rows", [False, True], ids=["vector", "rows"])
def test_solves_as_the_dense_solve(solver, rows):
    A = spd_rows() if rows else spd()
    b = normal(*A.shape[:-1])
    solution = solver.solve(operator(A), b)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.value, exact(A, b), rtol=1e-10, atol=1e-11)
    assert solution.residual.shape == b.shape[:-1]


@table(EXACT)
def test_float32(solver):
    A, b = spd_rows(dtype=torch.float32), normal(3, D, dtype=torch.float32)
    tol = {} if isinstance(solver, Dense) else {"tol": 1e-5}
    solution = dataclasses.replace(solver, **tol).solve(operator(A), b)
    assert solution.status is Status.CONVERGED
    assert solution.value.dtype == torch.float32
    torch.testing.assert_close(solution.value, exact(A, b), rtol=1e-4, atol=1e-4)


@table(ALL)
def test_linear_in_b(solver):
    A, b, c = spd(), normal(D), normal(D, seed=1)
    w, v, both = (solver.solve(operator(A), x).value for x in (b, c, 2 * b - 3 * c))
    torch.testing.assert_close(both, 2 * w - 3 * v, rtol=1e-9, atol=1e-10)


@table({**ALL, **TRUNCATED})
def test_rows_do_not_see_each_other(solver):
    A, b = spd_rows(), normal(3, D)
    b[1] *= 1e-6
    together = solver.solve(operator(A), b)
    for i in range(3):
        alone = solver.solve(operator(A[i]), b[i])
        torch.testing.assert_close(together.value[i], alone.value, rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(together.residual[i], alone.residual, rtol=1e-6, atol=1e-12)


@table({**ALL, **TRUNCATED})
@pytest.mark.parametrize("rows", [False, True], ids=["vector", "rows"])
def test_reported_residual_is_the_true_one(solver, rows):
    A = spd_rows() if rows else spd()
    b = normal(*A.shape[:-1])
    solution = solver.solve(operator(A), b)
    if hasattr(solver, "damping") and damping(solver) == 0:
        damped = dataclasses.replace(solver, damping=0.3)
        other = damped.solve(operator(A), b)
        torch.testing.assert_close(other.residual, residual(A, b, other.value, 0.3), rtol=1e-8, atol=1e-13)
    expected = residual(A, b, solution.value, damping(solver))
    torch.testing.assert_close(solution.residual, expected, rtol=1e-8, atol=1e-13)
    assert solution.residual.dtype == torch.float64


@table({**ALL, **TRUNCATED})
def test_products_are_counted(solver):
    A, calls = spd(), []

    def apply(v):
        calls.append(1)
        return times(A, v)

    counted = dataclasses.replace(operator(A), apply=apply)
    solution = solver.solve(counted, normal(D), normal(D, seed=5) * 1e-3)
    assert solution.products == len(calls)


@table(ALL)
def test_same_call_same_bits(solver):
    A, b = spd_rows(), normal(3, D)
    one, two = (solver.solve(operator(A), b) for _ in range(2))
    assert torch.equal(one.value, two.value)
    assert one.status is two.status


@table(ALL)
def test_inputs_stay_untouched_and_the_answer_is_detached(solver):
    A = spd_rows().requires_grad_()
    b, x0 = normal(3, D).requires_grad_(), (1e-2 * normal(3, D)).requires_grad_()
    before = [t.detach().clone() for t in (A, b, x0)]
    solution = solver.solve(operator(A), b, x0)
    assert all(torch.equal(now, then) for now, then in zip((A, b, x0), before, strict=True))
    assert not solution.value.requires_grad
    assert not solution.residual.requires_grad


@table(ALL)
@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 1)], ids=str)
def test_vectors_of_length_one(solver, shape):
    A = torch.full((*shape, 1), 4.0, dtype=torch.float64)
    b = torch.full(shape, 2.0, dtype=torch.float64)
    if isinstance(solver, MFAC):
        solver = dataclasses.replace(solver, gradients=1)
    solution = solver.solve(operator(A), b)
    assert solution.value.shape == shape
    assert (solution.value > 0).all()
    if solver in EXACT.values():
        torch.testing.assert_close(solution.value, b / 4, rtol=1e-12, atol=0)


@table(ALL)
def test_zero_b_gives_zero(solver):
    A, b = spd_rows(), normal(3, D)
    b[1] = 0
    for x0 in (None, normal(3, D, seed=3)):
        solution = solver.solve(operator(A), b, x0)
        assert (solution.value[1] == 0).all()
        assert solution.residual[1] == 0
        assert solution.value.isfinite().all()
    alone = solver.solve(operator(spd()), torch.zeros(D).double())
    assert alone.status is Status.CONVERGED
    assert (alone.value == 0).all()


@table(ALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_operator_that_is_not_finite(solver, bad):
    broken = dataclasses.replace(operator(spd()), apply=lambda v: v * bad)
    assert solver.solve(broken, normal(D)).status is Status.NON_FINITE


@table(ALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_b_that_is_not_finite(solver, bad):
    b = normal(2, D)
    b[0, 0] = bad
    solution = solver.solve(operator(spd_rows(2)), b)
    assert solution.status is Status.NON_FINITE
    assert solution.value[1].isfinite().all()


@table(ALL)
def test_shapes_are_checked_at_the_door(solver):
    with pytest.raises(InvalidProblem, match=r"b has shape \[\]"):
        solver.solve(operator(spd()), torch.tensor(1.0))
    with pytest.raises(InvalidProblem, match=r"x0 has shape \[3\] but b \[8\]"):
        solver.solve(operator(spd()), normal(D), normal(3))


@table(ITERATIVE)
def test_step_limit(solver):
    A, b = spd(high=100), normal(D)
    short = dataclasses.replace(solver, **{"terms" if isinstance(solver, Neumann) else "max_steps": 1})
    if isinstance(solver, CG):
        short = dataclasses.replace(short, preconditioner=None)
    solution = short.solve(operator(A), b)
    assert solution.status is Status.STEP_LIMIT
    assert not solution.status.ok
    assert solution.value.norm() > 0
    assert solution.residual > 1e-13


@table(ITERATIVE)
def test_tolerance_of_the_call_and_of_the_solver(solver):
    A, b = spd(high=20), normal(D)
    loose = solver.solve(operator(A), b, tol=1e-2)
    assert loose.status is Status.CONVERGED
    assert 1e-13 < loose.residual <= 1e-2
    own = dataclasses.replace(solver, tol=1e-2).solve(operator(A), b)
    assert torch.equal(own.value, loose.value)


@table(ITERATIVE)
def test_warm_start(solver):
    A, b = spd_rows(), normal(3, D)
    cold = solver.solve(operator(A), b, tol=1e-6)
    at_once = solver.solve(operator(A), b, exact(A, b), tol=1e-6)
    assert at_once.steps == 0
    assert at_once.status is Status.CONVERGED
    torch.testing.assert_close(at_once.value, exact(A, b))
    near = solver.solve(operator(A), b, exact(A, b) + 1e-4 * normal(3, D, seed=2), tol=1e-6)
    assert near.status is Status.CONVERGED
    assert 0 < near.steps < cold.steps


@table(ITERATIVE)
def test_a_bad_warm_start_is_dropped_in_its_row_only(solver):
    A, b = spd_rows(2), normal(2, D)
    x0 = torch.stack([exact(A, b)[0], -5 * exact(A, b)[1]])
    x0[1, 0] = torch.nan
    solution = solver.solve(operator(A), b, x0, tol=1e-6)
    cold = solver.solve(operator(A), b, tol=1e-6)
    torch.testing.assert_close(solution.value[0], exact(A, b)[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(solution.value[1], cold.value[1], rtol=1e-12, atol=1e-14)


@table(EXACT)
def test_damping(solver):
    A, b, shift = spd_rows(), normal(3, D), 0.7
    solution = dataclasses.replace(solver, damping=shift).solve(operator(A), b)
    w = solution.value
    torch.testing.assert_close(w, exact(A, b, shift), rtol=1e-10, atol=1e-11)
    # The bias of damping is known exactly.
    torch.testing.assert_close(w - exact(A, b), -shift * exact(A, exact(A, b), shift), rtol=1e-8, atol=1e-11)
    if solution.curvature is not None:
        least = torch.linalg.eigvalsh(A)
        assert least.min() - 1e-8 <= solution.curvature[0] <= solution.curvature[1] <= least.max() + 1e-8


@table(EXACT)
def test_damping_makes_an_indefinite_system_definite(solver):
    A, b = symmetric([-0.5, 1, 2, 3, 4, 5, 6, 7]), normal(D)
    solution = dataclasses.replace(solver, damping=1.5).solve(dataclasses.replace(operator(A), diagonal=0 * b), b)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(solution.value, exact(A, b, 1.5), rtol=1e-10, atol=1e-11)


@table({**EXACT, "Nystrom": Nystrom(rank=6), "Nystrom-columns": Nystrom(rank=6, columns=True)}, "CG-jacobi")
def test_indefinite(solver):
    A, b = symmetric([-2.0, -1, 1, 2, 3, 4, 5, 6]), normal(D)
    solution = solver.solve(operator(A), b)
    assert solution.curvature is not None
    assert solution.curvature[0] < 0
    assert solution.curvature[0] >= -2.0 - 1e-8
    if isinstance(solver, (MINRES, NormalCG, GMRES)):
        assert solution.residual < 0.2
    else:
        assert solution.status is Status.NEGATIVE_CURVATURE
        assert solution.value.norm() > 0
    if isinstance(solver, (MINRES, Dense)):
        torch.testing.assert_close(solution.value, exact(A, b), rtol=1e-9, atol=1e-9)


@table(EXACT, "CG-jacobi", "Neumann")
def test_one_bad_row_does_not_spoil_the_others(solver):
    A, b = torch.stack([spd(), symmetric([0.0, 1, 1, 2, 2, 3, 3, 4]), spd(seed=4)]), normal(3, D)
    solution = solver.solve(operator(A), b)
    assert solution.status is Status.SINGULAR
    for i in (0, 2):
        torch.testing.assert_close(solution.value[i], exact(A[i], b[i]), rtol=1e-9, atol=1e-10)
    assert solution.value[1].isfinite().all()
    assert solution.value[1].norm() > 0


@table(EXACT, "CG-jacobi", "CG-nystrom", "Neumann")
@pytest.mark.parametrize("null", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_singular_inconsistent(solver, null, dtype):
    A = symmetric([0.0] * null + [1.0 + i for i in range(D - null)], dtype=dtype)
    b = normal(D, dtype=dtype)
    tol = {} if isinstance(solver, Dense) else {"tol": 1e-5}
    solution = dataclasses.replace(solver, **tol).solve(operator(A), b)
    assert solution.status is Status.SINGULAR
    assert not solution.status.ok
    assert 0 < solution.value.norm() < 1e3
    torch.testing.assert_close(solution.residual, residual(A, b, solution.value), rtol=1e-4, atol=1e-6)


@table(EXACT, "CG-jacobi")
def test_singular_consistent_gives_the_minimum_norm_solution(solver):
    A = symmetric([0.0, 0.0] + [1.0 + i for i in range(6)])
    b = times(A, normal(D))
    tol = {} if isinstance(solver, Dense) else {"tol": 1e-11}
    solution = dataclasses.replace(solver, **tol).solve(operator(A), b)
    assert solution.status is (Status.MINIMUM_NORM if isinstance(solver, Dense) else Status.CONVERGED)
    assert solution.status.ok
    torch.testing.assert_close(solution.value, times(torch.linalg.pinv(A, rtol=1e-10), b), rtol=1e-8, atol=1e-9)


@table(EXACT, "CG-jacobi")
def test_no_curvature_at_all(solver):
    solution = solver.solve(Operator(torch.zeros_like), torch.ones(D).double())
    assert solution.status is Status.SINGULAR
    assert solution.value.isfinite().all()
    if not isinstance(solver, Dense):
        assert solution.value.norm() > 0


@table(ITERATIVE)
def test_looking_less_often_changes_nothing_but_the_price(solver):
    A, b = spd_rows(), normal(3, D)
    every = solver.solve(operator(A), b, tol=1e-6)
    seldom = dataclasses.replace(solver, check_every=7).solve(operator(A), b, tol=1e-6)
    assert seldom.status is every.status
    assert seldom.products >= every.products
    if not isinstance(solver, GMRES):  # which uses the further steps
        torch.testing.assert_close(seldom.value, every.value, rtol=1e-13, atol=1e-15)


@table(ALL, "Dense", "CG-jacobi")
def test_many_entries_need_no_square_matrix(solver):
    d = 300_000
    scale = torch.linspace(1, 2, d)
    big = Operator(
        lambda v: scale * v, diagonal=scale, gradients=lambda k: torch.ones(k, d), step_diagonal=lambda: torch.ones(d)
    )
    limit = {"terms": 5} if isinstance(solver, Neumann) else {"max_steps": 5} if hasattr(solver, "max_steps") else {}
    solution = dataclasses.replace(solver, **limit).solve(big, torch.ones(d))
    assert solution.value.isfinite().all()


BAD = [
    (CG, "tol", -1.0),
    (CG, "max_steps", 0),
    (CG, "damping", -0.1),
    (CG, "check_every", 0),
    (CG, "flat", -1.0),
    (CG, "tol", float("nan")),
    (MINRES, "damping", float("inf")),
    (MINRES, "max_steps", 0),
    (NormalCG, "tol", -1.0),
    (NormalCG, "check_every", 0),
    (GMRES, "restart", 0),
    (GMRES, "damping", -1.0),
    (Neumann, "terms", -1),
    (Neumann, "alpha", 0.0),
    (Neumann, "alpha", -0.1),
    (Neumann, "estimate_steps", 0),
    (Nystrom, "rank", 0),
    (Nystrom, "damping", 0.0),
    (NystromPreconditioner, "rank", 0),
    (Jacobi, "rest", -1.0),
    (Jacobi, "probes", 0),
    (MFAC, "gradients", 0),
    (MFAC, "damping", 0.0),
    (Dense, "chunk", 0),
    (Dense, "damping", -1.0),
    (Identity, "scale", 0.0),
    (Sama, "tol", -1.0),
]


@pytest.mark.parametrize(("kind", "name", "value"), BAD)
def test_bad_options_are_refused_when_given(kind, name, value):
    with pytest.raises(InvalidProblem, match=rf"{kind.__name__}: {name} must be .*try"):
        kind(**{name: value})


@table({name: s for name, s in EXACT.items() if name not in ("CG-jacobi", "Neumann", "GMRES")})
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    d=st.integers(1, 12),
    m=st.integers(1, 3),
    condition=st.floats(1, 1e3),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_any_well_conditioned_system(solver, d, m, condition, scale, seed):
    eigenvalues = scale * torch.logspace(0, float(torch.tensor(condition).log10()), d, dtype=torch.float64)
    A = torch.stack([symmetric(eigenvalues, seed + i) for i in range(m)])
    b = normal(m, d, seed=seed)
    changes = {} if isinstance(solver, Dense) else {"tol": 1e-9, "max_steps": 2000}
    solution = dataclasses.replace(solver, **changes).solve(operator(A), b)
    assert solution.status is Status.CONVERGED
    assert (solution.value - exact(A, b)).norm() <= 1e-9 * condition * exact(A, b).norm() * m**0.5 * 2
