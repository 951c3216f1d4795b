"""Declared terms against autograd, numerical minimization and each other; every shape a weight may have."""

import pytest
import torch
from scipy.optimize import minimize_scalar

from bilevel.layout import Layout
from bilevel.regularizers import L1, L2, ElasticNet, GroupL1, SparseGroupL1
from bilevel.status import InvalidProblem, NonFinite

Y = {"w": torch.zeros(2, 3), "b": [torch.zeros(2)]}
LAYOUT = Layout.of({"w": Y["w"].double(), "b": [Y["b"][0].double()]}, name="y")
D = 8


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


GROUPS = torch.tensor([0, 0, 1, 2, 2, 2, -1, 1])
REGULARIZERS = {
    "L2": (L2(lambda x: x.exp()), draw(())),
    "L2_by_entry": (L2(lambda x: x.exp()), draw(D)),
    "L2_by_leaf": (L2(lambda x: {"w": x["a"].exp(), "b": x["b"].exp()}), {"a": draw(()), "b": draw((), seed=1)}),
    "L2_groups": (L2(lambda x: x.exp(), groups=torch.tensor([0, 0, 1, 2, 2, 2, -1, 1])), draw(3)),
    "L2_number": (L2(0.3), draw(())),
    "elastic_net": (ElasticNet(lambda x: x[0].exp(), lambda x: x[1].exp()), [draw(D), draw((), seed=1)]),
    "lasso": (ElasticNet(lambda x: x.exp()), draw(())),
    "l1_by_entry": (L1(lambda x: x.exp()), draw(D)),
    "l1_by_leaf": (L1(lambda x: {"w": x.exp()}), draw(())),
    "l1_groups": (L1(lambda x: x.exp(), groups={"w": torch.tensor([0, 1, -1]), "b": 1}), draw(2)),
    "group": (GroupL1(lambda x: x.exp(), groups=GROUPS), draw(3)),
    "group_one_weight": (GroupL1(lambda x: x.exp(), groups={"w": torch.tensor([[0], [1]]), "b": 3}), draw(())),
    "group_number": (GroupL1(0.4, groups={"w": 0}), draw(())),
    "sparse_group": (
        SparseGroupL1(lambda x: x["one"].exp(), lambda x: x["all"].exp(), groups=GROUPS),
        {"one": draw(D, seed=3) - 1, "all": draw(3, seed=4)},
    ),
    "sparse_group_numbers": (SparseGroupL1(0.2, 0.7, groups={"w": 0, "b": [torch.tensor([1, -1])]}), draw(())),
    "net_groups": (ElasticNet(0.2, lambda x: x.exp(), groups={"w": 0, "b": [torch.tensor([1, 0])]}), draw(2)),
}


def leaves(x):
    return list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, list) else [x]


@pytest.mark.parametrize("name", REGULARIZERS)
def test_formulas_against_autograd(name):
    regularizer, x = REGULARIZERS[name]
    y = draw(D, seed=5).requires_grad_()
    coefficients = regularizer.coefficients(x, LAYOUT)
    value = regularizer.value(coefficients, y)
    assert value.shape == ()
    (gradient,) = torch.autograd.grad(value, y, create_graph=True)
    assert torch.allclose(regularizer.gradient(coefficients, y), gradient, rtol=1e-12)
    hessian = torch.autograd.functional.hessian(lambda v: regularizer.value(coefficients, v), y)
    curvature = regularizer.curvature(coefficients, y)
    assert curvature.shape == y.shape
    assert torch.allclose(curvature, hessian.diagonal(), rtol=1e-12)
    vectors = draw(3, D, seed=6)
    assert torch.allclose(regularizer.hvp(coefficients, y, vectors), vectors @ hessian, rtol=1e-12)
    assert not regularizer.held(coefficients, y).any()
    assert regularizer.slack(coefficients, y, gradient).isposinf().all()


CONSTANT = ("L2_number", "group_number", "sparse_group_numbers")
BY_ENTRY = [name for name, (regularizer, _) in REGULARIZERS.items() if regularizer.by_entry]


@pytest.mark.parametrize("name", [name for name in REGULARIZERS if name not in CONSTANT])
def test_derivative_in_x_against_differences(name):
    regularizer, x = REGULARIZERS[name]
    y, v = draw(D, seed=5), draw(D, seed=6)
    free = [leaf.clone().requires_grad_() for leaf in leaves(x)]
    build = {dict: lambda given: dict(zip(x, given, strict=True)), list: list}.get(type(x), lambda given: given[0])

    def products(*given):
        coefficients = regularizer.coefficients(build(given), LAYOUT)
        return (
            (regularizer.gradient(coefficients, y) * v).sum(),
            regularizer.value(coefficients, y),
            regularizer.prox(coefficients, 3 * y, 0.4) @ v,
        )

    assert torch.autograd.gradcheck(products, free)


@pytest.mark.parametrize("name", BY_ENTRY)
@pytest.mark.parametrize("step", [0.3, 2.0])
def test_prox_is_the_minimizer(name, step):
    regularizer, x = REGULARIZERS[name]
    v = 2 * draw(D, seed=7)
    coefficients = regularizer.coefficients(x, LAYOUT)
    found = regularizer.prox(coefficients, v, step)
    by_entry = [coefficient.expand(D) for coefficient in coefficients]
    for j in range(D):

        def objective(z, j=j):
            point = torch.tensor([float(z)], dtype=torch.float64)
            own = tuple(coefficient[j : j + 1] for coefficient in by_entry)
            return float(regularizer.value(own, point) + (point - v[j]).square().sum() / (2 * step))

        best = minimize_scalar(objective, bounds=(-8, 8), method="bounded", options={"xatol": 1e-10}).x
        assert float(found[j]) == pytest.approx(best, abs=2e-6)


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("step", [0.01, 0.3, 20.0])
def test_prox_is_optimal_and_says_what_is_held(name, step):
    regularizer, x = REGULARIZERS[name]
    coefficients, v = regularizer.coefficients(x, LAYOUT), 2 * draw(D, seed=7)
    found = regularizer.prox(coefficients, v, step)

    def objective(y):
        return regularizer.value(coefficients, y) + (y - v).square().sum() / (2 * step)

    least = objective(found)
    for k, scale in enumerate((1.0, 1e-1, 1e-2, 1e-3)):
        for direction in draw(50, D, seed=10 + k):
            assert objective(found + scale * direction) >= least
    rest, held = (found - v) / step, regularizer.held(coefficients, found)
    assert torch.allclose((rest + regularizer.gradient(coefficients, found))[~held], v.new_zeros(()), atol=1e-12)
    slack, distance = regularizer.slack(coefficients, found, rest), regularizer.distance(coefficients, found)
    assert (slack[held] >= 0).all()
    assert slack[~held].isposinf().all()
    assert distance[held].isposinf().all()
    assert held.any() or regularizer.smooth or step < 20
    # Growing the margin's worth of gradient, and no less, frees a held entry.
    for j in held.nonzero().flatten().tolist():
        pull = rest.sign() * slack[j] * step
        for factor, stays in ((0.99, True), (1.01, False)):
            if not regularizer.by_entry:
                continue
            moved = regularizer.prox(coefficients, v - factor * pull * (torch.arange(D) == j), step)
            assert bool(regularizer.held(coefficients, moved)[j]) == stays


def test_groups_vanish_whole_and_entries_in_those_that_stay():
    regularizer = SparseGroupL1(1.0, 2.5, groups=torch.tensor([0, 0, 1, 1, -1]))
    layout = Layout.of(torch.zeros(5, dtype=torch.float64), name="y")
    coefficients = regularizer.coefficients(None, layout)
    y = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert regularizer.held(coefficients, y).tolist() == [False, True, True, True, True]
    gradient = torch.tensor([-3.5, 0.4, 1.6, -1.8, -0.3], dtype=torch.float64)
    expected = [torch.inf, 0.6, 1.5, 1.5, 0.7]
    assert regularizer.slack(coefficients, y, gradient).tolist() == pytest.approx(expected)
    assert regularizer.distance(coefficients, y).tolist() == [3.0, *[torch.inf] * 4]
    assert float(regularizer.value(coefficients, y)) == 3.0 + 7.5
    free = GroupL1(2.5, groups=torch.tensor([0, 0, -1, -1, -1]))
    weights = free.coefficients(None, layout)
    assert not free.held(weights, y)[2:].any()
    assert torch.equal(free.prox(weights, y + 1, 1.0)[2:], (y + 1)[2:])
    assert torch.equal(free.gradient(weights, 0 * y), 0 * y)
    assert torch.equal(free.curvature(weights, 0 * y), 0 * y)


def test_blocks_have_groups_and_norms_of_their_own():
    y = draw(3, 4)
    layout = Layout.of(y, name="y", blocks=3)
    regularizer = SparseGroupL1(0.3, lambda x: x, groups=torch.tensor([0, 1, 0, 1]))
    weights = torch.tensor([[0.5, 9.0], [9.0, 0.5], [0.5, 0.5]], dtype=torch.float64)
    together = regularizer.prox(regularizer.coefficients(weights, layout), y, 1.0)
    one = Layout.of(y[0], name="y")
    for row, own, found in zip(y, weights, together, strict=True):
        assert torch.equal(regularizer.prox(regularizer.coefficients(own, one), row, 1.0), found)
    assert not together[0, [1, 3]].any()
    assert not together[1, [0, 2]].any()


@pytest.mark.parametrize("regularizer", [GroupL1(1.0, groups=torch.tensor([0, 0])), SparseGroupL1(1.0, 1.0, [0, 1])])
def test_group_prox_is_differentiable_at_zero(regularizer):
    layout = Layout.of(torch.zeros(2, dtype=torch.float64), name="y")
    v = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found = regularizer.prox(regularizer.coefficients(None, layout), v, 1.0)
    (derivative,) = torch.autograd.grad(found.sum(), v)
    assert torch.equal(derivative, torch.zeros_like(derivative))


def test_closed_forms():
    y = torch.tensor([1.0, -2.0, 0.0])
    layout = Layout.of(y, name="y")
    net = ElasticNet(2.0, 3.0)
    coefficients = net.coefficients(None, layout)
    assert float(net.value(coefficients, y)) == 2 * 3 + 1.5 * 5
    assert torch.equal(net.gradient(coefficients, y), torch.tensor([5.0, -8.0, 0.0]))
    assert torch.equal(net.curvature(coefficients, y), torch.full((3,), 3.0))
    assert torch.allclose(net.prox(coefficients, torch.tensor([3.0, -1.5, 2.0]), 1.0), torch.tensor([0.25, 0.0, 0.0]))
    assert torch.allclose(L2(3.0).prox((torch.tensor(3.0),), y, 0.5), y / 2.5)
    assert (L2(1.0).smooth, net.smooth) == (True, False)


def test_prox_takes_a_step_by_entry():
    steps = torch.tensor([0.0, 0.5, 1.0])
    net = ElasticNet(1.0)
    found = net.prox((torch.tensor(1.0), torch.tensor(0.0)), torch.ones(3), steps)
    assert torch.equal(found, torch.tensor([1.0, 0.5, 0.0]))


def test_prox_without_weight_is_the_identity_at_zero_too():
    v = torch.zeros(2, requires_grad=True)
    found = ElasticNet(0.0).prox((torch.tensor([0.0, 1.0]), torch.tensor(0.0)), v, 1.0)
    (derivative,) = torch.autograd.grad(found.sum(), v)
    assert torch.equal(derivative, torch.tensor([1.0, 0.0]))
    assert ElasticNet(1.0).prox((torch.tensor(1.0), torch.tensor(0.0)), torch.tensor([torch.nan]), 1.0).isnan().all()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (2.0, [2.0] * 8),
        (torch.tensor(2.0), [2.0] * 8),
        (torch.arange(8.0), list(range(8))),
        ({"w": torch.tensor(2.0), "b": [3.0]}, [2.0] * 6 + [3.0] * 2),
        ({"w": torch.tensor([1.0, 2, 3])}, [1.0, 2, 3, 1, 2, 3, 0, 0]),
        ({"w": torch.tensor([[1.0], [2.0]]), "b": [torch.tensor([7.0, 8.0])]}, [1.0, 1, 1, 2, 2, 2, 7, 8]),
        ({"b": torch.tensor(4.0)}, [0.0] * 6 + [4.0] * 2),
        ({}, [0.0] * 8),
    ],
)
def test_shapes_of_weights(given, expected):
    coefficient = L2(lambda x: given).coefficients(None, LAYOUT)[0]
    assert coefficient.dtype == torch.float64
    assert coefficient.expand(D).tolist() == expected
    L2(lambda x: given).check(None, LAYOUT)


def test_one_leaf_takes_flat_and_broadcast_weights():
    layout = Layout.of(torch.zeros(2, 3), name="y")
    for given in (torch.arange(6.0), torch.arange(6.0).reshape(2, 3)):
        assert torch.equal(L2(lambda x, given=given: given).coefficients(None, layout)[0], torch.arange(6.0))
    by_column = L2(lambda x: torch.arange(3.0)).coefficients(None, layout)[0]
    assert by_column.tolist() == [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (torch.tensor([0, 1, 2, 0, 1, 2, 2, 2]), [5.0, 6, 7, 5, 6, 7, 7, 7]),
        ({"w": 1, "b": [2]}, [6.0] * 6 + [7.0] * 2),
        ({"w": torch.tensor([0, 1, 2])}, [5.0, 6, 7, 5, 6, 7, 0, 0]),
        ({"w": torch.tensor([[0], [-1]]), "b": [[1, 2]]}, [5.0, 5, 5, 0, 0, 0, 6, 7]),
    ],
)
def test_groups(groups, expected):
    regularizer = L2(lambda x: x, groups=groups)
    x = torch.tensor([5.0, 6.0, 7.0])
    assert regularizer.coefficients(x, LAYOUT)[0].tolist() == expected
    regularizer.check(x, LAYOUT)
    assert regularizer.coefficients(torch.tensor(4.0), LAYOUT)[0].shape == ()
    assert ElasticNet(1.0, lambda x: x, groups=groups).coefficients(x, LAYOUT)[1].tolist() == expected


def test_blocks_share_weights_unless_they_lead():
    y = {"w": draw(3, 2), "b": draw(3, seed=1)}
    layout = Layout.of(y, name="y", blocks=3)
    flat = layout.flatten(y)
    shared = L2(lambda x: {"w": x})
    coefficients = shared.coefficients(torch.tensor([1.0, 2.0]), layout)
    assert coefficients[0].shape == (3,)
    expected = 0.5 * (y["w"][:, 0].square() + 2 * y["w"][:, 1].square()).sum()
    assert torch.allclose(shared.value(coefficients, flat), expected)
    assert shared.curvature(coefficients, flat).shape == flat.shape
    by_block = L2(lambda x: {"b": x}).coefficients(torch.tensor([1.0, 2.0, 3.0]), layout)[0]
    assert torch.equal(by_block, torch.tensor([[0.0, 0, 1], [0, 0, 2], [0, 0, 3]]).double())
    flat_weight = L2(lambda x: x).coefficients(torch.arange(9.0).reshape(3, 3), layout)[0]
    assert torch.equal(flat_weight, torch.arange(9.0).reshape(3, 3).double())
    groups = L2(lambda x: x, groups={"w": 0, "b": 1})
    assert groups.coefficients(torch.tensor([5.0, 6.0]), layout)[0].tolist() == [5.0, 5.0, 6.0]
    x = torch.tensor([[5.0, 6.0], [7.0, 8.0], [9.0, 1.0]])
    assert groups.coefficients(x, layout)[0].tolist() == [[5.0, 5, 6], [7, 7, 8], [9, 9, 1]]
    groups.check(x, layout)
    with pytest.raises(InvalidProblem, match="blocks share their groups"):
        L2(lambda x: x, groups=torch.zeros(3, 3, dtype=torch.long)).coefficients(x, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_has_the_dtype_of_y(dtype):
    layout = Layout.of(torch.zeros(2, dtype=dtype), name="y")
    y = torch.ones(2, dtype=dtype)
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for regularizer in (L2(lambda x: x.exp()), ElasticNet(lambda x: x.exp(), 1.0)):
        coefficients = regularizer.coefficients(x, layout)
        assert regularizer.gradient(coefficients, y).dtype == dtype
        assert regularizer.prox(coefficients, y, 0.1).dtype == dtype
        (in_x,) = torch.autograd.grad(regularizer.value(coefficients, y), x)
        assert in_x.dtype == torch.float64


def weight_decay(x):
    return x["log"].exp()


def test_overflow_names_the_transform_and_the_value():
    regularizer = L2(weight_decay)
    layout = Layout.of(torch.zeros(2), name="y")
    with pytest.raises(NonFinite, match=r"weight_decay\(x\), is inf \(torch.float32\) at log = 95\.") as caught:
        regularizer.check({"log": torch.tensor(95.0)}, layout)
    assert "Box" in str(caught.value)
    with pytest.raises(NonFinite, match=r"for 'y' \(torch.float32\) at log = 90 \(entry 1\)"):
        regularizer.check({"log": torch.tensor([0.0, 90.0])}, layout)
    with pytest.raises(NonFinite, match=r"is nan .* at log = nan"):
        regularizer.check({"log": torch.tensor(torch.nan)}, layout)
    regularizer.check({"log": torch.tensor(80.0)}, layout)


def test_negative_weights_are_refused():
    layout = Layout.of({"w": torch.zeros(2), "b": torch.zeros(1)}, name="y")
    with pytest.raises(InvalidProblem, match=r"L2\(weight\), <lambda>\(x\), is -1.0 for 'b'; weights are >= 0. Map x"):
        L2(lambda x: {"w": 0.0, "b": x}).check(torch.tensor(-1.0), layout)
    with pytest.raises(InvalidProblem, match=r"ElasticNet\(l2\)"):
        ElasticNet(0.0, lambda x: x).check(torch.tensor(-1.0), layout)
    L2(lambda x: x).check(torch.tensor(0.0), layout)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "1", torch.ones(2), None, True])
def test_unusable_constants_are_refused(weight):
    with pytest.raises(InvalidProblem, match=r"L2\(weight\)"):
        L2(weight)
    with pytest.raises(InvalidProblem, match=r"ElasticNet\(l1\)"):
        ElasticNet(weight)
    with pytest.raises(InvalidProblem, match=r"ElasticNet\(l2\)"):
        ElasticNet(1.0, weight)


@pytest.mark.parametrize(
    ("given", "groups", "message"),
    [
        (torch.ones(3), None, "expected a scalar, a flat tensor of shape"),
        ({"v": 1.0}, None, r"unknown keys \['v'\]"),
        ({"w": torch.ones(5)}, None, r"shape \(5,\) given for leaf 'w' does not broadcast"),
        (torch.ones(2), torch.tensor([0, 1, 2, 0, 0, 0, 0, 0]), "run from 0 to 2, but x gives 2 weights"),
        (torch.ones(2), torch.tensor([0, 1, -2, 0, 0, 0, 0, 0]), "run from -2 to 1"),
        (torch.ones(2), torch.zeros(8), "dtype torch.float32; give integers"),
        ([1.0, 2.0], torch.zeros(8, dtype=torch.long), "return a vector of one weight a group, got list"),
        (torch.ones(4, 2), torch.zeros(8, dtype=torch.long), r"one weight a group, got \(4, 2\)"),
    ],
)
def test_misfits_are_refused(given, groups, message):
    with pytest.raises(InvalidProblem, match=message):
        L2(lambda x: given, groups=groups).check(None, LAYOUT)


def test_weights_on_another_device_are_refused():
    weights = torch.ones(8, device="meta")
    with pytest.raises(InvalidProblem, match="is on meta, the variables on cpu"):
        L2(lambda x: weights).check(None, LAYOUT)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (torch.tensor([0, 0, 0, 0, 0, 0, 0, 8]), "run from 0 to 8, but 8 entries make at most 8 groups"),
        (torch.tensor([0, 0, 0, -2, 0, 0, 0, 0]), "run from -2 to 0"),
        (torch.zeros(8), "give integers"),
    ],
)
def test_group_ids_that_cannot_be_are_refused(groups, message):
    for regularizer in (GroupL1(1.0, groups), SparseGroupL1(1.0, 1.0, groups)):
        with pytest.raises(InvalidProblem, match=message):
            regularizer.check(None, LAYOUT)
    GroupL1(1.0, GROUPS).check(None, LAYOUT)
    with pytest.raises(InvalidProblem, match=r"GroupL1\(weight\).* is -1.0"):
        GroupL1(lambda x: x, GROUPS).check(torch.tensor([1.0, -1.0, 1.0]), LAYOUT)
    with pytest.raises(InvalidProblem, match=r"SparseGroupL1\(l1\).* is -1.0"):
        SparseGroupL1(lambda x: x, 1.0, GROUPS).check(torch.tensor(-1.0), LAYOUT)


def test_unusable_constants_of_groups_are_refused():
    for build in (lambda: L1(-1.0), lambda: GroupL1("1", GROUPS), lambda: SparseGroupL1(1.0, None, GROUPS)):
        with pytest.raises(InvalidProblem, match=r"(L1|GroupL1|SparseGroupL1)\("):
            build()
