"""Products with second derivatives against dense derivatives of the formula, each of the four ways, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softplus

import bilevel
from bilevel import Problem, SecondOrderFallback, SecondOrderUnsupported
from bilevel.dry_run import open_oracles
from bilevel.layout import Layout
from bilevel.linearization import Differences, gradients, join, leaves_of, second_derivatives
from bilevel.oracles import Oracles, tensors_in

WAYS = ["double_backward", "forward_over_reverse", "math_attention", "differences"]
EXACT = WAYS[:3]
TOLERANCE = dict.fromkeys(EXACT, 1e-10) | {"differences": 1e-7}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(variables: Any) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in tensors_in(variables)])


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


A, B, C = draw(5, 4, seed=1), draw(5, 7, seed=2), draw(3, 7, seed=3)
X0 = {"a": draw(3, seed=4), "rest": [draw(1, seed=5), draw(2, seed=6)]}
Y0 = {"u": draw(2, 2, seed=7), "v": (draw(2, seed=8),), "linear": draw(1, seed=9)}
"""6 entries of x, of which the lower objective sees 4; 7 of y, the last one linear below."""


def traced(x: Tensor, y: Tensor) -> Tensor:
    nonlinear = softplus(A @ x[:4] + B[:, :6] @ y[:6]).sum() + (C[:, :6] @ y[:6]).cos().prod()
    return nonlinear + (x[:3] * y[:3].square()).sum() + 3 * y[6]


def term(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x[0].exp() * y[:4].square()).sum() + 0.5 * (x[4].square() * y[6].square())


REGULARIZER = bilevel.L2(lambda x: {"u": x["a"][0].exp(), "linear": x["rest"][1][0].square()})


class Case:
    """A problem, its starts, and its lower objective as a formula of flat vectors `[p]` and `[d]` (or `[m * d]`)."""

    def __init__(self, problem: Problem, x0: Any, y0: Any, whole: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.problem, self.x0, self.y0, self.whole = problem, x0, y0, whole

    def opened(self, way: str, **options: Any) -> tuple[Oracles, Tensor, Tensor]:
        x_layout, y_layout = Layout.of(self.x0), Layout.of(self.y0, name="y", blocks=self.problem.blocks)
        oracles = Oracles(self.problem, x_layout, y_layout, way=way, **options)
        return oracles, x_layout.flatten(self.x0), y_layout.flatten(self.y0)

    def hessian(self, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = torch.func.hessian(lambda v: self.whole(x, v))(y.flatten())
        return found

    def mixed(self, x: Tensor, y: Tensor) -> Tensor:
        """Return d2g/dxdy as `[p, d]`."""
        found: Tensor = torch.func.jacfwd(lambda v: torch.func.grad(lambda u: self.whole(u, v))(x))(y.flatten())
        return found


def nested(regularized: bool) -> Case:
    problem = Problem(
        upper=lambda x, y, b: flat(y).sum() + flat(x).sum(),
        lower=lambda x, y, b: traced(flat(x), flat(y)),
        regularizer=REGULARIZER if regularized else None,
    )
    return Case(problem, X0, Y0, lambda x, y: traced(x, y) + (term(x, y) if regularized else 0.0))


def blocks(regularized: bool) -> Case:
    data = draw(3, 4, 2, seed=12)

    def one(x: Any, y: Any, b: Tensor) -> Tensor:
        return softplus(b @ y["v"] + x["bias"].sum() * y["s"]).sum() + (y["s"] - x["bias"][0]) ** 4

    problem = Problem(
        upper=lambda x, y, b: y["s"] + x["idle"].sum(),
        lower=one,
        lower_data=bilevel.Full(data),
        regularizer=bilevel.L2(lambda x: x["bias"].square().sum()) if regularized else None,
        blocks=3,
    )

    def whole(x: Tensor, y: Tensor) -> Tensor:
        parts = [
            one({"bias": x[:2]}, {"v": row[:2], "s": row[2]}, b) for row, b in zip(y.view(3, 3), data, strict=True)
        ]
        return torch.stack(parts).sum() + (0.5 * x[:2].square().sum() * y.square().sum() if regularized else 0.0)

    return Case(problem, {"bias": draw(2), "idle": draw(1)}, {"v": draw(3, 2, seed=1), "s": draw(3, seed=2)}, whole)


CASES = {
    "nested": lambda: nested(False),
    "nested, declared": lambda: nested(True),
    "blocks": lambda: blocks(False),
    "blocks, declared": lambda: blocks(True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_products_against_dense_derivatives(way: str, name: str) -> None:
    case, tolerance = CASES[name](), TOLERANCE[way]
    oracles, x, y = case.opened(way)
    linearization = oracles.linearize_lower(x, y)
    hessian, mixed = case.hessian(x, y), case.mixed(x, y)
    close(linearization.value, case.whole(x, y.flatten()), 1e-10)
    close(linearization.gradient.flatten(), torch.func.grad(lambda v: case.whole(x, v))(y.flatten()), 1e-10)
    for seed in range(3):
        v = draw(*y.shape, seed=20 + seed)
        assert linearization.hvp(v).shape == y.shape
        close(linearization.hvp(v).flatten(), hessian @ v.flatten(), tolerance)
        close(linearization.cross(v), mixed @ v.flatten(), tolerance)


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_batched_products_are_single_ones(way: str, name: str, chunk: int) -> None:
    case = CASES[name]()
    oracles, x, y = case.opened(way, chunk=chunk)
    linearization = oracles.linearize_lower(x, y)
    vectors = draw(7, *y.shape, seed=30)
    found = linearization.hvps(vectors)
    assert found.shape == vectors.shape
    hessian = case.hessian(x, y)
    close(found.flatten(1), vectors.flatten(1) @ hessian, TOLERANCE[way])
    close(found, torch.stack([linearization.hvp(v) for v in vectors]), 1e-12)
    assert linearization.hvps(vectors[:1]).shape == (1, *y.shape)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", EXACT)
def test_laws(way: str, name: str) -> None:
    """Symmetry, linearity, the adjoint identity <u, J v> = <J^T u, v>, and that products leave the graph as it was."""
    case = CASES[name]()
    oracles, x, y = case.opened(way)
    linearization = oracles.linearize_lower(x, y)
    u, v, t = draw(*y.shape, seed=1), draw(*y.shape, seed=2), draw(*x.shape, seed=3)
    first = linearization.hvp(v)
    close((u * first).sum(), (linearization.hvp(u) * v).sum(), 1e-10)
    close(linearization.hvp(2 * u - 3 * v), 2 * linearization.hvp(u) - 3 * first, 1e-10)
    close(linearization.cross(2 * u - 3 * v), 2 * linearization.cross(u) - 3 * linearization.cross(v), 1e-10)
    along = torch.func.jvp(lambda x: torch.func.grad(lambda y: case.whole(x, y))(y.flatten()), (x,), (t,))[1]
    close(linearization.cross(u) @ t, u.flatten() @ along, 1e-10)
    assert torch.equal(linearization.hvp(v), first)
    assert not linearization.hvp(torch.zeros_like(y)).any()


@pytest.mark.parametrize("way", WAYS)
def test_the_declared_diagonal_is_exact_and_apart(way: str) -> None:
    case = nested(True)
    oracles, x, y = case.opened(way)
    diagonal = oracles.linearize_lower(x, y).diagonal
    assert diagonal is not None
    expected = torch.cat([x[0].exp().expand(4), torch.zeros(2).double(), x[4:5].square()])
    close(diagonal, expected, 1e-15)
    plain, _, _ = nested(False).opened(way)
    assert plain.linearize_lower(x, y).diagonal is None


@pytest.mark.parametrize("way", WAYS)
def test_objectives_without_second_derivatives_give_zeros(way: str) -> None:
    """Linear in y, and x apart: every leaf of H v and J^T v is None."""
    problem = Problem(
        upper=lambda x, y, b: y["a"].sum(), lower=lambda x, y, b: 2 * y["a"].sum() + x["c"].square().sum()
    )
    case = Case(problem, {"c": draw(2)}, {"a": draw(3), "absent": draw(2)}, lambda x, y: 2 * y[:3].sum())
    oracles, x, y = case.opened(way)
    linearization = oracles.linearize_lower(x, y)
    close(linearization.gradient, torch.tensor([2.0, 2, 2, 0, 0], dtype=torch.float64), 1e-12)
    close(linearization.hvp(y), torch.zeros(5).double(), 1e-8)
    close(linearization.hvps(y.expand(3, -1)), torch.zeros(3, 5).double(), 1e-8)
    close(linearization.cross(y), torch.zeros(2).double(), 1e-8)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "forward_over_reverse"])
def test_a_constant_lower_objective_with_a_regularizer(way: str) -> None:
    problem = Problem(
        upper=lambda x, y, b: y.sum(),
        lower=lambda x, y, b: torch.zeros(()).double(),
        regularizer=bilevel.L2(lambda x: x.exp()),
    )
    oracles, x, y = Case(problem, draw(), draw(3), lambda x, y: y.sum()).opened(way)
    linearization = oracles.linearize_lower(x, y)
    close(linearization.hvp(y), x.exp() * y, 1e-12)
    close(linearization.cross(y), x.exp() * (y @ y), 1e-12)


def attention(x: Tensor, y: Tensor, b: Any) -> Tensor:
    query = (y * x).view(1, 1, 3, 2)
    return scaled_dot_product_attention(query, query, query).square().sum() + 0.5 * y.square().sum()


def by_hand(x: Tensor, y: Tensor) -> Tensor:
    query = (y * x).view(3, 2)
    weights = torch.softmax(query @ query.T / 2**0.5, -1)
    return (weights @ query).square().sum() + 0.5 * y.square().sum()


@pytest.mark.parametrize("way", ["math_attention", "differences"])
def test_attention_against_attention_by_hand(way: str) -> None:
    problem = Problem(upper=lambda x, y, b: y.sum(), lower=attention)
    case = Case(problem, draw(6), draw(6, seed=1), by_hand)
    oracles, x, y = case.opened(way)
    linearization = oracles.linearize_lower(x, y)
    v = draw(6, seed=2)
    close(linearization.hvp(v), case.hessian(x, y) @ v, TOLERANCE[way])
    close(linearization.hvps(v.expand(3, -1))[2], case.hessian(x, y) @ v, TOLERANCE[way])
    close(linearization.cross(v), case.mixed(x, y) @ v, TOLERANCE[way])


def test_the_math_kernel_is_taken_for_the_graph_alone() -> None:
    """Fused attention has no double backward; outside the building of the graph the user's kernels stay."""
    problem = Problem(upper=lambda x, y, b: y.sum(), lower=attention)
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    oracles, x, y = Case(problem, draw(6), draw(6, seed=1), by_hand).opened("double_backward")
    with pytest.raises(RuntimeError, match="attention"):
        oracles.linearize_lower(x, y).hvp(y)
    oracles.way = "math_attention"
    oracles.linearize_lower(x, y).hvp(y)
    assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())


# -- differences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-2)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_differences_do_not_depend_on_the_length_of_v(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    layout = Layout.of(torch.zeros(4, dtype=dtype))
    x, y = torch.ones(4, dtype=dtype), torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=dtype)
    core = Differences(lambda xs, ys: (ys[0].exp() * xs[0]).sum(), layout, layout, x, y)
    v = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=dtype)
    expected = y.exp() * v
    torch.testing.assert_close(core.hvp(scale * v) / scale, expected, rtol=tolerance, atol=tolerance)
    cross = core.cross(scale * v)[0]
    assert cross is not None
    torch.testing.assert_close(cross / scale, expected, rtol=tolerance, atol=tolerance)
    for found, rounding in core.both(scale * v):
        torch.testing.assert_close(found / scale, expected, rtol=tolerance, atol=tolerance)
        assert float((found / scale - expected).norm()) < 100 * float(rounding) / scale + tolerance


def test_differences_of_a_zero_vector_are_zero() -> None:
    layout = Layout.of(torch.zeros(2).double())
    y = draw(2)
    core = Differences(lambda xs, ys: (ys[0].exp() * xs[0]).sum(), layout, layout, y, y)
    assert core.hvp(torch.zeros(2).double()).tolist() == [0, 0]


def test_differences_give_each_block_its_own_step() -> None:
    """One block a million times larger than the other must not take the digits of the smaller."""
    problem = Problem(upper=lambda x, y, b: y.sum(), lower=lambda x, y, b: (y**3).sum() * x, blocks=2)
    case = Case(
        problem, torch.ones(()).double(), torch.stack([1e-2 * draw(3), 1e4 * draw(3)]), lambda x, y: (y**3).sum()
    )
    oracles, x, y = case.opened("differences")
    v = torch.stack([draw(3, seed=2), 1e6 * draw(3, seed=3)])
    torch.testing.assert_close(oracles.linearize_lower(x, y).hvp(v), 6 * y * v, rtol=1e-4, atol=0)


# -- the choice of a way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_the_way_asked_for_is_taken(way: Any) -> None:
    problem = Problem(upper=lambda x, y, b: y.sum(), lower=lambda x, y, b: ((y - x) ** 4).sum(), hvp=way)
    oracles, _, _ = open_oracles(problem, draw(3), draw(3, seed=1))
    assert oracles.way == way


def test_double_backward_is_the_first_choice_and_attention_takes_another() -> None:
    smooth = Problem(upper=lambda x, y, b: y.sum(), lower=lambda x, y, b: ((y - x) ** 4).sum())
    assert open_oracles(smooth, draw(3), draw(3, seed=1))[0].way == "double_backward"
    attentive = Problem(upper=lambda x, y, b: y.sum(), lower=attention)
    with pytest.warns(SecondOrderFallback, match="double_backward"):
        oracles, x, y = open_oracles(attentive, draw(6), draw(6, seed=1))
    assert oracles.way in {"forward_over_reverse", "math_attention"}
    case = Case(attentive, draw(6), draw(6, seed=1), by_hand)
    v = draw(6, seed=2)
    close(oracles.linearize_lower(x, y).hvp(v), case.hessian(x, y) @ v, 1e-10)


class Smooth(torch.autograd.Function):
    """A cube with forward-mode and reverse-mode formulas, the reverse one good for one use only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return v**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        (v,) = inputs
        ctx.save_for_backward(v)
        ctx.save_for_forward(v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return Slope.apply(v) * g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return 3 * v**2 * t


class Slope(torch.autograd.Function):
    """The slope of a cube, with a forward-mode formula only."""

    generate_vmap_rule = False

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return 3 * v**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return 6 * v * t


def test_forward_over_reverse_serves_where_double_backward_cannot() -> None:
    problem = Problem(
        upper=lambda x, y, b: y.sum(), lower=lambda x, y, b: Smooth.apply(y).sum() + (x * y.square()).sum()
    )
    with pytest.warns(SecondOrderFallback, match="fall back to 'forward_over_reverse'"):
        oracles, x, y = open_oracles(problem, draw(3).exp(), draw(3, seed=1))
    v = draw(3, seed=2)
    close(oracles.linearize_lower(x, y).hvp(v), (6 * y + 2 * x) * v, 1e-12)


def test_kinks_give_no_verdict_against_a_way() -> None:
    """At a kink differences of two step sizes disagree, and double backward keeps the benefit of the doubt."""
    problem = Problem(
        upper=lambda x, y, b: y.sum(), lower=lambda x, y, b: (y - x).clamp_min(0).sum() + 0.5 * (y - x).square().sum()
    )
    start = torch.ones(4).double()
    oracles, _, _ = open_oracles(problem, start, start)
    assert oracles.way == "double_backward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ill_conditioned_objectives_raise_no_false_alarm(dtype: torch.dtype) -> None:
    """Right products must never be refused for the rounding of the differences they are compared with."""
    for seed in range(20):
        scales = torch.logspace(-4, 4, 12, dtype=dtype)
        features = (draw(30, 12, seed=seed).to(dtype) * scales)[
            :, torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        ]
        y = draw(12, seed=seed + 100).to(dtype)
        targets = features @ y + 1e-3 * draw(30, seed=seed + 200).to(dtype)
        problem = Problem(
            upper=lambda x, y, b: y.sum(),
            lower=lambda x, y, b, f=features, t=targets: (x.exp() * softplus((f @ y - t).square())).mean(),
            hvp="double_backward",
        )
        oracles, flat_x, flat_y = open_oracles(problem, draw(30, seed=seed + 300).to(dtype), y)
        v = draw(12, seed=seed + 400).to(dtype)
        residual = features @ y - targets
        softness = (residual.square()).sigmoid()
        bend = 2 * softness + 4 * residual.square() * softness * (1 - softness)
        expected = features.T @ (flat_x.exp() * bend * (features @ v)) / 30
        found = oracles.linearize_lower(flat_x, flat_y).hvp(v)
        assert float((found - expected).norm() / expected.norm()) < (1e-9 if dtype == torch.float64 else 1e-3)


class OneByOne(torch.autograd.Function):
    """A cube that can be differentiated twice, but has no batched form."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return v**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return OneByOneSlope.apply(v, g)


class OneByOneSlope(torch.autograd.Function):
    """Its backward pass looks at a number, which no vectorized pass can."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(v, g)
        return 3 * v**2 * g

    @staticmethod
    def backward(ctx: Any, t: Tensor) -> tuple[Tensor, Tensor]:
        v, g = ctx.saved_tensors
        scale = float(t.abs().max().item() > -1)
        return 6 * v * g * t * scale, 3 * v**2 * t * scale


@pytest.mark.parametrize("single", [True, False])
def test_operations_without_a_batched_form_go_one_by_one(single: bool) -> None:
    cube = OneByOne.apply if single else (lambda v: v**3)
    problem = Problem(
        upper=lambda x, y, b: y.sum(),
        lower=lambda x, y, b: cube(y).sum() + (x * y.square()).sum(),
        hvp="double_backward",
    )
    oracles, x, y = open_oracles(problem, draw(3).exp(), draw(3, seed=1))
    assert (oracles.chunk == 1) is single
    vectors = draw(5, 3, seed=2)
    close(oracles.linearize_lower(x, y).hvps(vectors), (6 * y + 2 * x) * vectors, 1e-12)


def test_an_unknown_operation_is_told_with_all_that_was_tried() -> None:
    problem = Problem(upper=lambda x, y, b: y.sum(), lower=attention, hvp="double_backward")
    with pytest.raises(SecondOrderUnsupported, match=r"double_backward: .*attention.*hvp='differences'"):
        open_oracles(problem, draw(6), draw(6, seed=1))


# -- parts -------------------------------------------------------------------------------------------------------------


def test_leaves_are_views_without_a_graph() -> None:
    layout = Layout.of({"a": draw(2), "b": draw(2, 2)})
    point = draw(6)
    leaves = leaves_of(layout, point)
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in leaves)
    assert [leaf.untyped_storage().data_ptr() for leaf in leaves] == [point.untyped_storage().data_ptr()] * 2
    assert not any(leaf.requires_grad for leaf in leaves_of(layout, point, requires_grad=False))
    assert not point.requires_grad


def test_gradients_of_what_does_not_depend_are_none() -> None:
    a, b = draw(2).requires_grad_(), draw(3).requires_grad_()
    assert gradients([torch.ones(())], [a, b]) == [None, None]
    found = gradients([a.sum(), torch.ones(2)], [a, b], [torch.tensor(2.0).double(), torch.ones(2)])
    assert found[1] is None
    assert found[0] is not None
    assert found[0].tolist() == [2, 2]


def test_join_fills_with_zeros() -> None:
    layout = Layout.of({"a": draw(2), "b": draw(2, 2)})
    assert join(layout, [None, torch.ones(2, 2).double()], (), draw(6)).tolist() == [0, 0, 1, 1, 1, 1]
    assert join(layout, [None, None], (3,), draw(6)).shape == (3, 6)
    blocked = Layout.of({"a": draw(5, 2)}, blocks=5)
    assert join(blocked, [None], (3,), draw(5, 2)).shape == (3, 5, 2)


# -- properties --------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    p=st.integers(1, 4), d=st.integers(1, 5), k=st.integers(1, 5), chunk=st.integers(1, 6), seed=st.integers(0, 2**31)
)
def test_random_polynomials(p: int, d: int, k: int, chunk: int, seed: int) -> None:
    """g = sum c_ijk x_i y_j y_k + sum e_j y_j^3: H and J are known by hand."""
    c, e = draw(p, d, d, seed=seed), draw(d, seed=seed + 1)
    layouts = Layout.of(draw(p)), Layout.of(draw(d), name="y")
    x, y, vectors = draw(p, seed=seed + 2), draw(d, seed=seed + 3), draw(k, d, seed=seed + 4)

    def evaluate(xs: Any, ys: Any) -> Tensor:
        return torch.einsum("ijk,i,j,k", c, xs[0], ys[0], ys[0]) + (e * ys[0] ** 3).sum()

    hessian = torch.einsum("ijk,i->jk", c + c.mT, x) + torch.diag(6 * e * y)
    mixed = torch.einsum("ijk,k->ij", c + c.mT, y)
    for way in EXACT:
        core = second_derivatives(way, evaluate, *layouts, x, y)
        close(core.hvps(vectors, chunk), vectors @ hessian, 1e-9)
        found = core.cross(vectors[0])[0]
        assert found is not None
        close(found, mixed @ vectors[0], 1e-9)
