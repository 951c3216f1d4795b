"""Projections: what makes one (variational inequality), closed forms, an independent solver, and every option."""

from math import inf, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from bilevel.layout import Layout
from bilevel.sets import Affine, Ball, Box, Halfspace, L1Ball, NonNegative, Product, Set, Simplex
from bilevel.status import InvalidProblem

D = 5


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SETS = {
    "box": Box(-0.5, torch.linspace(-0.2, 2.0, D)),
    "half_open_box": Box(lower=0.1),
    "nonnegative": NonNegative(),
    "simplex": Simplex(),
    "large_simplex": Simplex(total=2.5),
    "ball": Ball(0.7),
    "shifted_ball": Ball(1.5, center=torch.linspace(-1, 1, D)),
    "l1_ball": L1Ball(1.2),
    "point": L1Ball(0.0),
    "halfspace": Halfspace(torch.linspace(-1, 2, D), offset=-0.3),
    "affine": Affine(draw(2, D), draw(2, seed=1)),
    "product": Product([Simplex(), None, Ball(0.5)]),
}
SPLIT = [2, 1, 2]


def bound(kept, dtype=torch.float64):
    like = draw(D, dtype=dtype)
    return kept.bind(Layout.of(list(like.split(SPLIT)) if isinstance(kept, Product) else like))


vectors = st.lists(st.floats(-20, 20), min_size=D, max_size=D).map(lambda v: torch.tensor(v, dtype=torch.float64))


@pytest.mark.parametrize("name", SETS)
def test_projection_is_the_nearest_point(name):
    """<z - Pz, w - Pz> <= 0 for all w in the set; P is idempotent and nonexpansive."""
    project = bound(SETS[name])

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(z=vectors, w=vectors)
    def check(z, w):
        pz, pw = project(z), project(w)
        assert torch.allclose(project(pz), pz, rtol=0, atol=1e-12)
        assert torch.dot(z - pz, pw - pz) <= 1e-9
        assert (pz - pw).norm() <= (z - w).norm() + 1e-12

    check()


@pytest.mark.parametrize("name", SETS)
def test_projection_of_rows_is_that_of_each_row(name):
    kept = SETS[name]
    like = draw(3, D)
    rows = kept.bind(Layout.of(list(like.split(SPLIT, dim=-1)) if isinstance(kept, Product) else like, blocks=3))
    assert torch.allclose(rows(3 * like), torch.stack([bound(kept)(3 * row) for row in like]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_input_kept_dtype_kept_and_nan_shown(name, dtype):
    project = bound(SETS[name], dtype)
    z = draw(D, dtype=dtype)
    before = z.clone()
    assert project(z).dtype == dtype
    assert torch.equal(z, before)
    z[0] = nan
    assert project(z).isnan().any()


@pytest.mark.parametrize("name", SETS)
def test_derivative_matches_differences(name):
    z = draw(D, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(bound(SETS[name]), (z,))


@pytest.mark.parametrize("name", [name for name in SETS if name != "product"])
def test_bare_tensors_of_any_shape_are_one_vector(name):
    z = 2 * draw(D)
    kept = SETS[name]
    assert torch.allclose(kept.project(z), bound(kept)(z), rtol=0, atol=1e-15)
    violation = kept.violation(z)
    assert violation.shape == ()
    assert torch.allclose(violation, (z - bound(kept)(z)).norm())
    assert kept.violation(kept.project(z)) <= 1e-12


def by_scipy(z, constraints, bounds=None):
    z = z.numpy()
    found = minimize(
        lambda v: 0.5 * np.sum((v - z) ** 2), np.zeros_like(z), jac=lambda v: v - z, bounds=bounds,
        constraints=constraints, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("total", [1.0, 2.5])
def test_simplex_against_a_quadratic_program(seed, total):
    z = 2 * draw(6, seed=seed)
    sums = {"type": "eq", "fun": lambda v: v.sum() - total, "jac": np.ones_like}
    assert torch.allclose(Simplex(total).project(z), by_scipy(z, sums, [(0, None)] * 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("radius", [0.5, 3.0])
def test_l1_ball_against_a_quadratic_program(seed, radius):
    z = 2 * draw(4, seed=seed)
    signs = torch.tensor([[1 - 2 * (i >> j & 1) for j in range(4)] for i in range(16)], dtype=torch.float64).numpy()
    faces = {"type": "ineq", "fun": lambda v: radius - signs @ v, "jac": lambda v: -signs}
    assert torch.allclose(L1Ball(radius).project(z), by_scipy(z, faces), rtol=0, atol=1e-6)


def test_closed_forms():
    z = torch.tensor([[3.0, -1.0], [0.0, 4.0]], dtype=torch.float64)
    assert torch.equal(Box(0, 2).project(z), torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
    assert torch.allclose(Ball(1.0).project(z), z / 26**0.5)
    assert torch.equal(Ball(6.0).project(z), z)
    assert torch.allclose(Halfspace(torch.ones(2, 2), 2.0).project(z), z - 1)
    assert torch.equal(Halfspace([[1.0, 0.0], [0.0, 0.0]], 5.0).project(z), z)
    assert torch.allclose(Affine(torch.ones(1, 4), torch.tensor([2.0])).project(z), z - 1)
    assert torch.equal(L1Ball(8.0).project(z), z)
    assert torch.equal(L1Ball(0.0).project(z), torch.zeros_like(z))
    assert torch.equal(Ball(0.0, center=2.0).project(z), torch.full_like(z, 2.0))


def test_extreme_sizes_in_float32():
    huge = torch.tensor([3e30, 4e30])
    assert torch.allclose(Ball(5.0).project(huge), torch.tensor([3.0, 4.0]))
    assert torch.allclose(Simplex().project(torch.tensor([1e8, 1e8])), torch.tensor([0.5, 0.5]))
    assert torch.allclose(Simplex().project(torch.full((7,), 123456784.0)), torch.full((7,), 1 / 7))
    many = draw(200_000, dtype=torch.float32)
    assert abs(float(Simplex().project(many).double().sum()) - 1) < 1e-5
    assert torch.equal(Simplex(total=0.25).project(torch.tensor([inf, 0.0])).isnan().any(), torch.tensor(True))


def test_derivative_at_the_center_of_a_ball_is_the_identity():
    z = torch.zeros(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(Ball(1.0).project(z).sum(), z)
    assert torch.equal(gradient, torch.ones(3))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_simplex_along_an_axis(axis):
    z = draw(3, 4)
    expected = torch.stack([Simplex(2.0).project(row) for row in z.movedim(axis, -1)]).movedim(-1, axis)
    assert torch.allclose(Simplex(2.0, axis=axis).project(z), expected)
    x = {"a": z, "b": draw(2, 3, seed=1)}
    layout = Layout.of(x)
    flat = Simplex(2.0, axis=axis).bind(layout)(layout.flatten(x))
    assert torch.allclose(flat[:12].reshape(3, 4), expected)
    assert torch.allclose(flat[12:].reshape(2, 3).sum(axis), torch.tensor(2.0, dtype=torch.float64))
    blocks = Layout.of(torch.stack([z, -z]), blocks=2)
    rows = Simplex(2.0, axis=axis).bind(blocks)(blocks.flatten(torch.stack([z, -z])))
    assert torch.allclose(rows[0].reshape(3, 4), expected)


def test_simplex_refuses_a_missing_axis():
    with pytest.raises(InvalidProblem, match=r"axis=1\) does not fit leaf 'b' of shape \(2,\)"):
        Simplex(axis=1).bind(Layout.of({"a": draw(2, 2), "b": draw(2)}))
    with pytest.raises(InvalidProblem, match=r"axis=0\) does not fit the shape \(\)"):
        Simplex(axis=0).project(torch.tensor(1.0))


def test_nested_bounds():
    x = {"rate": torch.full((2,), 9.0), "mix": [torch.full((2, 2), -9.0)], "free": torch.full((1,), 9.0)}
    layout = Layout.of(x)
    box = Box(lower={"mix": [torch.tensor([[0.0, -1.0]])]}, upper={"rate": 1, "mix": 2})
    expected = torch.tensor([1.0, 1.0, 0.0, -1.0, 0.0, -1.0, 9.0])
    assert torch.equal(box.bind(layout)(layout.flatten(x)), expected)
    ball = Ball(1.0, center={"rate": 9.0, "mix": -9.0, "free": 8.0})
    assert torch.equal(ball.bind(layout)(layout.flatten(x)), layout.flatten(x))
    half = Halfspace({"rate": torch.tensor([1.0, 0.0])}, 0.0)
    assert torch.equal(half.bind(layout)(layout.flatten(x))[:2], torch.tensor([0.0, 9.0]))
    for nested in (box, ball, half):
        with pytest.raises(InvalidProblem, match="for 'point' is not a number or a tensor"):
            nested.project(x["rate"])


def test_bounds_by_block():
    layout = Layout.of(torch.zeros(2, 3), blocks=2)
    box = Box(upper=torch.tensor([[1.0], [2.0]]))
    assert torch.equal(box.bind(layout)(torch.full((2, 3), 5.0)), torch.tensor([[1.0] * 3, [2.0] * 3]))
    half = Halfspace(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), 1.0)
    assert torch.equal(half.bind(layout)(torch.full((2, 3), 5.0)), torch.tensor([[1.0, 5, 5], [5, 1.0, 5]]))


def test_later_changes_of_the_users_bounds_change_nothing():
    upper = torch.ones(2)
    project = Box(0.0, upper).bind(Layout.of(torch.zeros(2)))
    upper.fill_(5.0)
    assert torch.equal(project(torch.full((2,), 9.0)), torch.ones(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(2, 1), r"lower <= upper, got 2.0 and 1.0\."),
        (lambda: Box(nan, 1), "got nan and 1.0"),
        (lambda: Box("low"), "'low' and inf are no bounds"),
        (lambda: Box(inf, inf), "got inf and inf"),
        (lambda: Box(torch.zeros(2), torch.tensor([1.0, -1.0])), "got 0.0 and -1.0"),
        (lambda: Simplex(total=0.0), "must be positive"),
        (lambda: Simplex(total=nan), "must be positive"),
        (lambda: Ball(-1.0), r"Ball\(radius=...\) must be finite and >= 0, got -1.0"),
        (lambda: L1Ball(inf), r"L1Ball\(radius=...\) must be finite"),
        (lambda: Halfspace(torch.zeros(2), 1.0), "not 0"),
        (lambda: Halfspace(torch.tensor([1.0, nan]), 1.0), "must be finite"),
        (lambda: Halfspace(torch.ones(2), inf), "offset=...\\) must be finite"),
        (lambda: Affine(torch.ones(2), torch.ones(2)), r"matrix \[k, d\] and rhs \[k\], got \(2,\) and \(2,\)"),
        (lambda: Affine(torch.ones(2, 2), torch.ones(3)), r"got \(2, 2\) and \(3,\)"),
        (lambda: Affine(torch.full((1, 2), nan), torch.ones(1)), "must be finite"),
        (lambda: Affine(torch.ones(2, 3), torch.tensor([1.0, 2.0])), "contradict each other .rank 1 of 2 rows"),
        (lambda: Affine(torch.zeros(1, 3), torch.ones(1)), "contradict each other .rank 0"),
    ],
)
def test_refused_at_construction(make, message):
    with pytest.raises(InvalidProblem, match=message):
        make()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (Box({"a": [0.0, 3.0]}, {"a": 2.0}), "got 3.0 and 2.0 for 'a'"),
        (Box({"b": nan}), "got nan and inf for 'b'"),
        (Box({"c": 1.0}), r"Box\(lower\): unknown keys \['c'\]"),
        (Box(0.0, {"b": torch.ones(4)}), r"Box\(upper\): shape \(4,\) given for leaf 'b' does not broadcast"),
        (Box({"a": "low"}), "is not a number"),
        (Ball(1.0, {"a": nan}), "center=...\\) must be finite"),
        (Halfspace({"a": 0.0}, 1.0), "not 0"),
        (Affine(torch.ones(1, 3), torch.ones(1)), "3 columns for 5 entries"),
        (Product({"a": Simplex(), "c": None}), "does not fit the leaves"),
        (Product([Simplex(), None]), "does not fit the leaves"),
        (Product({"a": 3.0}), "give Sets nested like them"),
        (Product({"b": Simplex(axis=1)}), "does not fit leaf 'b'"),
    ],
)
def test_refused_at_bind(kept, message):
    with pytest.raises(InvalidProblem, match=message):
        kept.bind(Layout.of({"a": torch.zeros(2), "b": torch.zeros(3)}))


def test_dependent_equations():
    rows = draw(2, D)
    z, rhs = draw(D, seed=1), draw(2, seed=2)
    doubled = Affine(torch.cat([rows, rows.sum(0, keepdim=True)]), torch.cat([rhs, rhs.sum().reshape(1)]))
    assert torch.allclose(doubled.project(z), Affine(rows, rhs).project(z), rtol=1e-12)
    assert torch.allclose(rows @ doubled.project(z), rhs, rtol=1e-12)
    rounded = Affine(doubled.matrix.float(), doubled.rhs.float())
    assert torch.allclose(rounded.project(z.float()), doubled.project(z).float(), atol=1e-5)
    assert torch.equal(Affine(torch.zeros(1, D), torch.zeros(1)).project(z), z)


def test_product_of_sets_on_whole_branches():
    layout = Layout.of({"a": {"w": torch.zeros(2), "b": torch.zeros(1)}, "c": torch.zeros(2)})
    flat = torch.tensor([3.0, 0.0, 4.0, 7.0, -7.0])
    project = Product({"a": Ball(1.0), "c": NonNegative()}).bind(layout)
    assert torch.allclose(project(flat), torch.tensor([0.6, 0.0, 0.8, 7.0, 0.0]))
    assert torch.equal(Product({}).bind(layout)(flat), flat)
    assert torch.equal(Product(NonNegative()).project(flat), flat.clamp_min(0))


def test_a_set_of_ones_own_needs_only_project():
    class Zero(Set):
        def project(self, point):
            assert point.dim() == 1
            return torch.zeros_like(point)

    assert torch.equal(Zero().bind(Layout.of(torch.ones(2, 2), blocks=2))(torch.ones(2, 2)), torch.zeros(2, 2))
    assert torch.equal(Zero().bind(Layout.of(torch.ones(2)))(torch.ones(2)), torch.zeros(2))
    assert Zero().violation(torch.tensor([3.0, 4.0])) == 5.0
