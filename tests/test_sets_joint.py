"""Joint projections: nearest points by an independent solver, variational inequalities, and what has no solution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from bilevel import Ball, Box, InvalidProblem, NonNegative, Simplex
from bilevel.sets.joint import JointHalfspace, JointPolyhedron
from bilevel.status import Infeasible


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(pair: Any) -> Tensor:
    return torch.cat([part.flatten() for part in pair])


def nearest(point: Tensor, rows: Tensor, offset: Tensor, equations: Tensor | None = None, bounds: Any = None) -> Tensor:
    """The projection of a point on a polyhedron by SciPy."""
    target, a, b = point.numpy(), rows.numpy(), offset.numpy()
    equal = np.zeros(len(b), bool) if equations is None else equations.numpy()
    found = minimize(
        lambda v: 0.5 * np.sum((v - target) ** 2),
        np.clip(target, *bounds) if bounds else target,
        jac=lambda v: v - target,
        method="SLSQP",
        bounds=None if bounds is None else [bounds] * len(target),
        constraints=[
            {"type": "eq" if mark else "ineq", "fun": lambda v, i=i: b[i] - a[i] @ v, "jac": lambda v, i=i: -a[i]}
            for i, mark in enumerate(equal)
        ],
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert found.status in (0, 8)  # 8: no descent left, to rounding
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("seed", range(12))
def test_polyhedron_is_the_nearest_point_of_scipy(seed: int) -> None:
    k, p, d = 5, 3, 4
    matrix, inside = draw(k, p + d, seed=seed), draw(p + d, seed=seed + 50)
    equations = torch.tensor([seed % 3 == 0, *[False] * (k - 1)])
    offset = matrix @ inside + torch.where(equations, 0.0, 0.3 * torch.rand(k, dtype=torch.float64))
    kept = JointPolyhedron(matrix[:, :p], matrix[:, p:], offset, equations)
    point = 3 * draw(p + d, seed=seed + 100)
    near = flat(kept(point[:p], point[p:]))
    torch.testing.assert_close(near, nearest(point, matrix, offset, equations), rtol=0, atol=1e-6)
    # KKT, to rounding: feasible, and the step is a nonnegative combination of active rows.
    slack = offset - matrix @ near
    assert bool((slack >= -1e-10).all())
    active = slack < 1e-9
    weights = torch.linalg.lstsq(matrix[active].T, (point - near)[:, None]).solution[:, 0]
    torch.testing.assert_close(matrix[active].T @ weights, point - near, rtol=0, atol=1e-9)
    assert bool((weights[~equations[active]] >= -1e-9).all())
    torch.testing.assert_close(flat(kept(near[:p], near[p:])), near, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_polyhedron_with_boxes(seed: int) -> None:
    matrix, inside = draw(3, 5, seed=seed), draw(5, seed=seed + 9).clamp(-0.8, 0.8)
    offset = matrix @ inside + 0.1
    kept = JointPolyhedron(matrix[:, :2], matrix[:, 2:], offset, upper_set=Box(-1, 1), lower_set=Box(-1, 1))
    point = 3 * draw(5, seed=seed + 20)
    near = flat(kept(point[:2], point[2:]))
    expected = nearest(point, matrix, offset, bounds=(-1.0, 1.0))
    torch.testing.assert_close(near, expected, rtol=0, atol=1e-6)
    assert bool((near.abs() <= 1).all())


@pytest.mark.parametrize("sets", [(None, None), (Box(-1, 1), None), (Ball(0.7), Simplex()), (NonNegative(), Box(0, 2))])
def test_halfspace_is_the_nearest_point(sets: Any) -> None:
    """<z - Pz, w - Pz> <= 0 for all w in the set; a halfspace is a polyhedron of one row."""
    upper_set, lower_set = sets
    a, b = draw(3), draw(2, seed=1)
    kept = JointHalfspace(a, b, 0.2, upper_set, lower_set)
    as_rows = JointPolyhedron(a[None], b[None], torch.tensor([0.2]), None, upper_set, lower_set)
    cut = 0
    for seed in range(20):
        z, w = (3 * draw(5, seed=s) for s in (seed, seed + 100))
        pz, pw = (flat(kept(v[:3], v[3:])) for v in (z, w))
        assert torch.dot(z - pz, pw - pz) <= 1e-9
        assert a @ pz[:3] + b @ pz[3:] <= 0.2 + 1e-12
        for part, own in ((pz[:3], upper_set), (pz[3:], lower_set)):
            assert own is None or own.violation(part) <= 1e-12
        cut += bool(a @ pz[:3] + b @ pz[3:] > 0.2 - 1e-9)
        torch.testing.assert_close(flat(as_rows(z[:3], z[3:])), pz, rtol=0, atol=1e-7)
    assert 3 <= cut < 20  # both kinds of point were tried


def test_feasible_points_stay_bit_for_bit() -> None:
    x, y = torch.tensor([0.1, 0.2], dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)
    rows = JointPolyhedron(draw(3, 2), draw(3, 1, seed=1), torch.full((3,), 5.0))
    for kept in (JointHalfspace(1.0, 1.0, 5.0), JointHalfspace(1.0, 1.0, 5.0, Box(-1, 1)), rows):
        near = kept(x, y)
        assert torch.equal(near[0], x)
        assert torch.equal(near[1], y)


def test_structure_and_precision_are_kept() -> None:
    x, y = {"a": torch.ones(2), "b": torch.ones(1)}, [torch.ones(2, 2)]
    near_x, near_y = JointHalfspace({"a": 1.0}, 1.0, 0.0)(x, y)
    assert near_x["a"].dtype == torch.float32
    assert near_x.keys() == x.keys()
    assert torch.equal(near_x["b"], torch.ones(1))  # a key left out has the normal 0
    assert near_y[0].shape == (2, 2)
    torch.testing.assert_close(near_x["a"], torch.zeros(2))
    again = JointPolyhedron(torch.tensor([[1.0, 1.0, 0.0]]), torch.ones(1, 4), torch.zeros(1))(x, y)
    torch.testing.assert_close(again[1][0], near_y[0])
    assert torch.equal(x["a"], torch.ones(2))


def test_badly_scaled_rows_and_far_points() -> None:
    rows = torch.tensor([[1e6, 0.0], [1e-6, 1e-6]], dtype=torch.float64)
    kept = JointPolyhedron(rows[:, :1], rows[:, 1:], torch.tensor([1e6, 1e-6], dtype=torch.float64))
    near = flat(kept(torch.tensor([1e5], dtype=torch.float64), torch.tensor([1e5], dtype=torch.float64)))
    torch.testing.assert_close(near, torch.tensor([0.5, 0.5], dtype=torch.float64), rtol=0, atol=1e-9)


def test_dependent_rows() -> None:
    rows = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    kept = JointPolyhedron(rows[:, :1], rows[:, 1:], torch.tensor([1.0, 0.5, 1.0, 0.0], dtype=torch.float64))
    near = flat(kept(torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)))
    torch.testing.assert_close(near, torch.tensor([0.75, -0.25], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("equations", [None, torch.tensor([True, True])])
def test_contradicting_rows(equations: Tensor | None) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    both = torch.cat([one, -one]) if equations is None else torch.cat([one, one])
    kept = JointPolyhedron(both, 0 * both, torch.tensor([-1.0, -1.0 if equations is None else 2.0]), equations)
    with pytest.raises(Infeasible, match="no \\(x, y\\) satisfies all rows") as caught:
        kept(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert caught.value.index in (0, 1)
    assert caught.value.amount >= 1


def test_sets_without_a_common_point(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(Infeasible, match=r"least excess found is 1") as caught:
        JointHalfspace(1.0, 1.0, -1.0, NonNegative(), NonNegative())(x, x)
    assert caught.value.amount == pytest.approx(1.0)
    monkeypatch.setattr("bilevel.sets.joint.SWEEPS", 200)
    kept = JointPolyhedron(torch.ones(1, 2), torch.ones(1, 2), -torch.ones(1), None, NonNegative(), NonNegative())
    with pytest.raises(Infeasible, match=r"still 0\.5 apart") as caught:
        kept(x, x)
    assert caught.value.amount == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: JointHalfspace(1.0, 1.0, torch.inf), "offset"),
        (lambda: JointHalfspace(0.0, 0.0, 1.0)(torch.zeros(1), torch.zeros(1)), "not both 0"),
        (lambda: JointHalfspace(torch.ones(3), 1.0, 1.0)(torch.zeros(2), torch.zeros(1)), "normal_x"),
        (lambda: JointPolyhedron(torch.ones(2, 1), torch.ones(1, 1), torch.ones(2)), "needs matrix_x"),
        (lambda: JointPolyhedron(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), torch.ones(1)), "booleans"),
        (lambda: JointPolyhedron(torch.ones(1, 1) / 0, torch.ones(1, 1), torch.ones(1)), "finite"),
        (
            lambda: JointPolyhedron(torch.ones(1, 2), torch.ones(1, 1), torch.ones(1))(torch.ones(1), torch.ones(1)),
            "2 and 1 columns do not fit x with 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, text: str) -> None:
    with pytest.raises(InvalidProblem, match=text):
        make()
