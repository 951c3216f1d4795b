"""Faults of the graph: what is detached, frozen, changed in place, or has no second derivative. One test a row."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import bilevel
from bilevel import (
    BilevelWarning,
    Dense,
    Implicit,
    IneffectiveHyperparameter,
    InvalidProblem,
    LinearSolveFailed,
    NonDeterministic,
    Problem,
    SecondOrderFallback,
    SecondOrderUnsupported,
    Status,
    UnusedHyperparameter,
    hypergradient,
)
from bilevel.dry_run import open_oracles

EXACT = Implicit(linear=Dense(), truncate=True)
EXPLICIT = ["double_backward", "forward_over_reverse", "math_attention"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def far(x: Any, y: Tensor, _: Any) -> Tensor:
    """An upper objective of y alone."""
    return (y - 5).square().sum()


def track(x: Tensor, y: Tensor, _: Any) -> Tensor:
    """A lower objective with y*(x) = x."""
    return 0.5 * (y - x).square().sum()


@contextmanager
def silence() -> Iterator[None]:
    """Assert that nothing of the library's is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [str(each.message) for each in caught if issubclass(each.category, BilevelWarning)] == []


# -- what x reaches ----------------------------------------------------------------------------------------------------


def test_row_11_x_used_nowhere_is_refused_by_name() -> None:
    problem = Problem(upper=far, lower=lambda x, y, b: track(x["used"], y, b))
    x = {"used": draw(2), "stray": draw(3)}
    with pytest.raises(UnusedHyperparameter, match=r"leaf 'stray' enters neither the upper nor the lower objective"):
        hypergradient(problem, x, draw(2))


def test_row_11_detached_x_is_refused() -> None:
    problem = Problem(upper=far, lower=lambda x, y, b: track(x.detach(), y, b))
    with pytest.raises(UnusedHyperparameter, match=r"detached"):
        bilevel.solve(problem, bilevel.implicit(), draw(2), draw(2))


def test_row_11_x_in_the_regularizer_alone_is_used() -> None:
    problem = Problem(
        upper=far, lower=lambda x, y, b: (y - 1).square().sum(), regularizer=bilevel.L2(lambda x: x.exp())
    )
    assert float(hypergradient(problem, draw(), draw(2)).gradient.abs()) > 0


def test_row_11_x_of_a_later_batch_is_used() -> None:
    """A leaf that the first batch leaves out is no stray: a few more batches are looked at before it is refused."""
    problem = Problem(upper=far, lower=lambda x, y, b: track(x["odd" if b[0] else "even"], y, b), lower_data=Parity())
    _, x, _ = open_oracles(problem, {"even": draw(2), "odd": draw(2)}, draw(2))
    assert x.shape == (4,)


def test_row_12_x_in_the_upper_loss_alone_has_its_direct_gradient() -> None:
    problem = Problem(
        upper=lambda x, y, b: far(x, y, b) + x["direct"].square().sum(), lower=lambda x, y, b: track(x["below"], y, b)
    )
    x = {"direct": draw(3), "below": draw(2)}
    found = hypergradient(problem, x, x["below"], estimator=EXACT).gradient
    torch.testing.assert_close(found["direct"], 2 * x["direct"])
    torch.testing.assert_close(found["below"], 2 * (x["below"] - 5))


class Parity(bilevel.DataSource):
    """Even and odd steps take turns; after `until` steps all are even."""

    def __init__(self, until: int = 10**9) -> None:
        self.until = until

    @property
    def deterministic(self) -> bool:
        return False

    def batch(self, step: int, seed: int) -> Any:
        return [step % 2 == 1 and step < self.until]


def test_row_13_a_leaf_left_out_by_some_batches_counts_zero_there() -> None:
    problem = Problem(
        upper=far,
        lower=lambda x, y, b: track(x["always"] + (x["odd"] if b[0] else 0), y, b),
        lower_data=Parity(),
    )
    oracles, x, y = open_oracles(problem, {"always": draw(2), "odd": draw(2)}, draw(2))
    in_x = [oracles.linearize_lower(x, y, step).cross(torch.ones_like(y)) for step in (0, 1)]
    assert in_x[0].tolist() == [-1, -1, 0, 0]
    assert in_x[1].tolist() == [-1, -1, -1, -1]


@pytest.mark.parametrize("alternates", [True, False])
def test_row_13_a_leaf_unused_for_a_hundred_products_is_told_once(alternates: bool) -> None:
    problem = Problem(
        upper=far,
        lower=lambda x, y, b: track(x["always"] + (0 if b[0] else x["even"]), y, b),
        lower_data=Parity(),
    )
    oracles, x, y = open_oracles(problem, {"always": draw(2), "even": draw(2)}, draw(2))
    linearizations = [oracles.linearize_lower(x, y, step) for step in (0, 1)]
    if alternates:
        with silence():
            in_x = [linearizations[step % 2].cross(torch.ones_like(y)).tolist() for step in range(300)]
        assert in_x == 150 * [[-1, -1, -1, -1], [-1, -1, 0, 0]]
        return
    for _ in range(99):
        linearizations[1].cross(y)
    with pytest.warns(IneffectiveHyperparameter, match="leaf 'even'.* 100 "):
        linearizations[1].cross(y)
    with silence():
        for _ in range(200):
            linearizations[1].cross(y)


def test_row_13_a_leaf_of_the_upper_loss_alone_is_not_told() -> None:
    problem = Problem(
        upper=lambda x, y, b: far(x, y, b) + x["direct"].square().sum(), lower=lambda x, y, b: track(x["below"], y, b)
    )
    oracles, x, y = open_oracles(problem, {"direct": draw(3), "below": draw(2)}, draw(2))
    linearization = oracles.linearize_lower(x, y)
    with silence():
        in_x = [linearization.cross(torch.ones_like(y)).tolist() for _ in range(150)]
    assert in_x == 150 * [[0, 0, 0, -1, -1]]


def test_row_14_frozen_modules_are_refused_and_starts_need_no_gradient() -> None:
    module = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(InvalidProblem, match=r"all 2 parameters are frozen; call module\.requires_grad_\(True\)"):
        bilevel.functional(module)
    x, y = draw(2), draw(2).requires_grad_()
    hypergradient(Problem(upper=far, lower=track), x, y)
    assert not x.requires_grad
    assert y.requires_grad
    assert y.grad is None


def test_row_15_frozen_parameters_are_constants_and_listed() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    module[0].requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    net, data = bilevel.functional(module), (draw(5, 2), draw(5, 1, seed=1))
    problem = Problem(
        upper=lambda x, y, b: (net(y, b[0]) - b[1]).square().mean(),
        lower=lambda x, y, b: (net(y, b[0]) + b[1]).square().mean(),
        regularizer=bilevel.L2(lambda x: x.exp()),
        upper_data=bilevel.Full(data),
        lower_data=bilevel.Full(data),
    )
    solution = bilevel.solve(problem, bilevel.implicit(), draw(), net.parameters(), steps=3)
    assert sorted(solution.y) == ["2.bias", "2.weight"]
    assert "frozen: 2 tensors\n  0.weight\n  0.bias" in net.summary()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# -- what an objective returns -----------------------------------------------------------------------------------------

DETACHED: dict[str, Callable[[Tensor], Any]] = {
    "detach": lambda loss: loss.detach(),
    "item": lambda loss: torch.tensor(loss.item()),
    "constant": lambda loss: torch.zeros(()),
    "numpy": lambda loss: torch.as_tensor(np.asarray(loss.detach().numpy())),
    "numpy with its graph": lambda loss: torch.as_tensor(loss.numpy()),
}


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("how", DETACHED)
def test_row_16_detached_losses(level: str, how: str) -> None:
    def broken(x: Tensor, y: Tensor, b: Any) -> Tensor:
        value: Tensor = DETACHED[how](track(x, y, b))
        return value

    parts = {"upper": track, "lower": track} | {level: broken}
    with pytest.raises(
        InvalidProblem, match=rf"{level} objective is detached from x and y \(\.item\(\), \.detach\(\), numpy"
    ):
        hypergradient(Problem(**parts), draw(2), draw(2))


def test_row_16_no_grad_inside() -> None:
    with pytest.raises(InvalidProblem, match=r"lower objective is detached.*no_grad"):
        hypergradient(Problem(upper=far, lower=torch.no_grad()(track)), draw(2), draw(2))


def test_row_16_detached_from_y_alone() -> None:
    problem = Problem(upper=far, lower=lambda x, y, b: track(x, y.detach(), b))
    with pytest.raises(InvalidProblem, match="lower objective does not depend on y"):
        hypergradient(problem, draw(2), draw(2))


@pytest.mark.parametrize("blocks", [None, 4])
def test_row_17_losses_that_are_no_number(blocks: int | None) -> None:
    y = draw(2) if blocks is None else draw(blocks, 2)
    problem = Problem(upper=far, lower=lambda x, y, b: (y - x).square(), blocks=blocks)
    with pytest.raises(InvalidProblem, match=r"lower objective returned shape \(2,\).*\.mean\(\)"):
        hypergradient(problem, draw(2), y)


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_row_18_losses_that_are_python_numbers(level: str) -> None:
    parts: dict[str, Any] = {"upper": track, "lower": track} | {level: lambda x, y, b: float(track(x, y, b).detach())}
    with pytest.raises(InvalidProblem, match=rf"{level} objective returned a float, not a Tensor"):
        hypergradient(Problem(**parts), draw(2), draw(2))


# -- what an objective changes -----------------------------------------------------------------------------------------


def test_row_19_in_place_on_a_leaf_names_it() -> None:
    def lower(x: Tensor, y: dict[str, Tensor], b: Any) -> Tensor:
        y["v"].mul_(2)
        return track(x, y["u"] + y["v"], b)

    problem = Problem(upper=lambda x, y, b: far(x, y["u"] + y["v"], b), lower=lower)
    with pytest.raises(InvalidProblem, match=r"lower objective changes y's leaf 'v' in place.*instead of") as caught:
        hypergradient(problem, draw(2), {"u": draw(2), "v": draw(2)})
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_row_19_in_place_on_what_the_backward_pass_needs() -> None:
    def upper(x: Tensor, y: Tensor, b: Any) -> Tensor:
        root = (y - x).exp()
        value = root.square().sum()
        root.add_(1)
        return value

    with pytest.raises(InvalidProblem, match=r"upper objective changes .* in place.*needed for gradient computation"):
        hypergradient(Problem(upper=upper, lower=track), draw(2), draw(2))


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("variable", ["x", "y"])
@pytest.mark.parametrize("how", ["data", "no_grad"])
def test_row_20_data_edits_are_caught_by_value(level: str, variable: str, how: str) -> None:
    def edits(x: Tensor, y: Tensor, b: Any) -> Tensor:
        value, leaf = track(x, y, b), {"x": x, "y": y}[variable]
        if how == "data":
            leaf.data[0] += 1
        else:
            with torch.no_grad():
                leaf[0] += 1
        return value

    x, y = draw(2), draw(2, seed=1)
    kept = x.clone(), y.clone()
    parts: dict[str, Any] = {"upper": track, "lower": track} | {level: edits}
    with pytest.raises(InvalidProblem, match=rf"{level} objective changes {variable}'s leaf '{variable}' in place"):
        hypergradient(Problem(**parts), x, y)
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])


@pytest.mark.parametrize("how", ["plain", "data"])
def test_row_20_edits_of_the_batch(how: str) -> None:
    def edits(x: Tensor, y: Tensor, b: Tensor) -> Tensor:
        (b.data if how == "data" else b).mul_(0.9)
        return track(x, y * b, None)

    data = torch.ones(2, dtype=torch.float64)
    problem = Problem(upper=far, lower=edits, lower_data=bilevel.Full(data))
    with pytest.raises(InvalidProblem, match="lower objective changes its batch in place"):
        hypergradient(problem, draw(2), draw(2))
    assert torch.equal(data, torch.ones(2, dtype=torch.float64))


class Network(nn.Module):
    """Batch normalization between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.layers(batch)
        return output


def holders(module: nn.Module) -> dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]]:
    """Ways in which an objective can hold a module."""

    def inner(y: dict[str, Tensor], batch: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, y, (batch,))
        return output

    class Loss:
        def __init__(self) -> None:
            self.parts = {"net": [module]}

        def __call__(self, y: dict[str, Tensor], batch: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(self.parts["net"][0], y, (batch,))
            return output

        def method(self, y: dict[str, Tensor], batch: Tensor) -> Tensor:
            return self(y, batch)

    def default(y: dict[str, Tensor], batch: Tensor, net: nn.Module = module) -> Tensor:
        output: Tensor = torch.func.functional_call(net, y, (batch,))
        return output

    return {
        "closure": inner,
        "closure of a closure": lambda y, batch: inner(y, batch),
        "callable object": Loss(),
        "method": Loss().method,
        "partial": functools.partial(lambda net, y, batch: torch.func.functional_call(net, y, (batch,)), module),
        "default": default,
    }


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("holder", holders(nn.Identity()))
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_row_21_moving_buffers_are_refused_and_put_back(holder: str, level: str) -> None:
    """functional_call writes running statistics into the user's module, without a new version of the buffer."""
    torch.manual_seed(0)
    module, data = Network(), draw(6, 3)
    call, before = holders(module)[holder], buffers(module)
    plain = bilevel.functional(module)
    parts: dict[str, Any] = {
        "upper": lambda x, y, b: (plain(y, b) - x).square().mean(),
        "lower": lambda x, y, b: (plain(y, b) - x).square().mean(),
    } | {level: lambda x, y, b: (call(y, b) - x).square().mean()}
    problem = Problem(**parts, upper_data=bilevel.Full(data), lower_data=bilevel.Full(data))
    with pytest.raises(
        InvalidProblem, match=rf"{level} objective changes '.*running_mean' of Network.*functional\(module\)"
    ):
        hypergradient(problem, draw(), plain.parameters())
    assert same(before, buffers(module))


@pytest.mark.parametrize("commit", [False, True])
def test_row_21_buffers_of_functional_modules(commit: bool) -> None:
    """The user's module stays as it is; with `commit_buffers` the solver's calls move it, but not the dry run."""
    torch.manual_seed(0)
    module, data = Network(), draw(6, 3)
    before = buffers(module)
    net = bilevel.functional(module, commit_buffers=commit)
    problem = Problem(
        upper=lambda x, y, b: (net(y, b) - 1).square().mean(),
        lower=lambda x, y, b: (net(y, b) - x).square().mean(),
        regularizer=bilevel.L2(0.1),
        upper_data=bilevel.Full(data),
        lower_data=bilevel.Full(data),
    )
    oracles, x, y = open_oracles(problem, draw(), net.parameters())
    assert same(before, buffers(module))
    oracles.lower_gradient(x, y)
    assert same(before, buffers(module)) is not commit


def test_row_22_randomness_of_torch_is_fixed_for_each_step() -> None:
    problem = Problem(upper=far, lower=lambda x, y, b: (nn.functional.dropout(y, 0.5) ** 4).sum() + track(x, y, b))
    oracles, x, y = open_oracles(problem, draw(50), draw(50))
    assert torch.equal(oracles.linearize_lower(x, y, 0).hvp(y), oracles.linearize_lower(x, y, 0).hvp(y))
    assert not torch.equal(oracles.linearize_lower(x, y, 0).hvp(y), oracles.linearize_lower(x, y, 1).hvp(y))


@pytest.mark.parametrize("needs_hvp", [True, False])
@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("how", ["curvature", "slope"])
def test_row_22_randomness_of_its_own_is_refused(level: str, needs_hvp: bool, how: str) -> None:
    own = torch.Generator().manual_seed(0)

    def noisy(x: Tensor, y: Tensor, b: Any) -> Tensor:
        noise = torch.randn(y.shape, generator=own, dtype=y.dtype)
        return track(x, y, b) + (noise * (y.square() if how == "curvature" else y)).sum()

    parts: dict[str, Any] = {"upper": far, "lower": track} | {level: noisy}
    with pytest.raises(NonDeterministic, match=rf"{level} objective.*differ.*Draw from torch's global generator"):
        open_oracles(Problem(**parts), draw(9), draw(9), needs_hvp=needs_hvp)


def test_row_22_hidden_state_is_refused() -> None:
    calls: list[int] = []

    def annealed(x: Tensor, y: Tensor, b: Any) -> Tensor:
        calls.append(0)
        return len(calls) * track(x, y, b)

    with pytest.raises(NonDeterministic, match="state of its own"):
        hypergradient(Problem(upper=far, lower=annealed), draw(9), draw(9))


def test_row_23_tied_parameters_are_one_variable_with_the_summed_gradient() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    module[2].weight = module[0].weight
    net, data = bilevel.functional(module), draw(4, 3)
    y = net.parameters()
    assert list(y) == ["0.weight"]
    problem = Problem(
        upper=lambda x, y, b: net(y, b).sum(),
        lower=lambda x, y, b: (net(y, b) - x).square().sum(),
        upper_data=bilevel.Full(data),
        lower_data=bilevel.Full(data),
    )
    oracles, x, flat = open_oracles(problem, draw(), y)
    leaf = y["0.weight"].clone().requires_grad_()
    value = ((data @ leaf.T).tanh() @ leaf.T - x).square().sum()
    (expected,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(oracles.lower_gradient(x, flat)[1], expected.flatten())


def test_row_24_overlapping_views_are_refused() -> None:
    base = draw(5)
    problem = Problem(upper=far, lower=lambda x, y, b: track(x["a"] + x["b"], y, b))
    with pytest.raises(InvalidProblem, match="x: leaves 'a' and 'b' overlap in memory"):
        hypergradient(problem, {"a": base[:3], "b": base[2:]}, draw(3))
    with pytest.raises(InvalidProblem, match="shares memory between its entries"):
        hypergradient(Problem(upper=far, lower=track), base[:1].expand(3), draw(3))
    # One tensor as the start of both levels is no overlap: starts are copied.
    start = draw(3)
    found = hypergradient(Problem(upper=far, lower=track), start, start).gradient
    torch.testing.assert_close(found, 2 * (start - 5), rtol=1e-6, atol=0)


# -- what cannot be differentiated twice -------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """A square whose backward pass is declared as not differentiable: torch.autograd.grad drops it without an error."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return v.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        slope: Tensor = 2 * v * g
        return slope


class Hidden(torch.autograd.Function):
    """A square whose backward pass uses a detached copy: its second derivative vanishes without a word."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.kept = v.detach().clone()
        return v.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        slope: Tensor = 2 * ctx.kept * g
        return slope


class HiddenProduct(torch.autograd.Function):
    """A product of x and y whose backward pass uses detached copies: only the cross derivative vanishes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.kept = x.detach().clone(), y.detach().clone()
        return x * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.kept
        return y * g, x * g


def attention(y: Tensor) -> Tensor:
    query = torch.stack([y, y.sin(), y.cos()]).view(1, 1, 3, -1)
    return scaled_dot_product_attention(query, query, query).square().sum()


def quartic_in(square: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y, b: track(x, y, b) + square(y).square().sum() + square(y - x).sum()


def bilinear_in(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y, b: 0.5 * y.square().sum() + (y**4).sum() - product(x, y).sum()


def compiled() -> Callable[..., Tensor]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet: Callable[..., Tensor] = torch.compile(quartic_in(torch.square), backend="aot_eager")
    return quiet


HIDES = "hides its second derivative"
AWKWARD: dict[str, tuple[Callable[[], Callable[..., Tensor]], Callable[..., Tensor], str]] = {
    # name: (how to make the lower objective, the same in plain operations, what the trouble is called)
    "25_attention": (
        lambda: lambda x, y, b: track(x, y, b) + attention(y),
        lambda x, y, b: track(x, y, b) + attention(y),
        "attention",
    ),
    "26_once_differentiable": (lambda: quartic_in(Once.apply), quartic_in(torch.square), HIDES),
    "27_hidden": (lambda: quartic_in(Hidden.apply), quartic_in(torch.square), HIDES),
    "27_hidden_cross": (
        lambda: bilinear_in(HiddenProduct.apply),
        bilinear_in(torch.mul),
        HIDES,
    ),
    "27_mostly_hidden": (
        lambda: lambda x, y, b: 50 * track(x, y, b) + Hidden.apply(y).sum(),
        lambda x, y, b: 50 * track(x, y, b) + y.square().sum(),
        HIDES,
    ),
    "28_compiled": (compiled, quartic_in(torch.square), "double backward"),
}


@pytest.mark.filterwarnings("ignore:.*functools.lru_cache")
@pytest.mark.parametrize("name", AWKWARD)
def test_rows_25_to_28_auto_recovers_and_names_what_failed(name: str) -> None:
    make, plain, trouble = AWKWARD[name]
    x, y = 0.5 * draw(4), 0.5 * draw(4, seed=1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = hypergradient(Problem(upper=far, lower=plain), x, y, estimator=EXACT, certify=False).gradient
    with pytest.warns(SecondOrderFallback, match=rf"(?s)fall back to '\w+'.*double_backward: .*{trouble}"):
        found = hypergradient(Problem(upper=far, lower=make()), x, y, estimator=EXACT, certify=False).gradient
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*functools.lru_cache")
@pytest.mark.parametrize("name", AWKWARD)
def test_rows_25_to_28_an_explicit_way_is_refused(name: str) -> None:
    make, _, trouble = AWKWARD[name]
    problem = Problem(upper=far, lower=make(), hvp="double_backward")
    with pytest.raises(SecondOrderUnsupported, match=rf"(?s){trouble}.*first-order solver"):
        hypergradient(problem, 0.5 * draw(4), 0.5 * draw(4, seed=1))


def test_rows_25_to_28_the_way_of_the_warning_is_silent() -> None:
    x, y = 0.5 * draw(4), 0.5 * draw(4, seed=1)
    plain = Problem(upper=far, lower=quartic_in(torch.square))
    expected = hypergradient(plain, x, y, estimator=EXACT, certify=False).gradient
    problem = Problem(upper=far, lower=quartic_in(Once.apply), hvp="differences")
    with silence():
        found = hypergradient(problem, x, y, estimator=EXACT, certify=False).gradient
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_row_28_compiled_modules_are_taken_as_they_were_before() -> None:
    torch.manual_seed(0)
    module, data = nn.Linear(3, 1).double(), bilevel.Full(draw(5, 3))

    def gradient(net: Any) -> Tensor:
        problem = Problem(
            upper=lambda x, y, b: net(y, b).square().sum(),
            lower=lambda x, y, b: (net(y, b) - x).square().sum(),
            upper_data=data,
            lower_data=data,
            hvp="double_backward",
        )
        found: Tensor = hypergradient(problem, draw(), net.parameters()).gradient  # type: ignore[assignment]
        return found

    expected = gradient(bilevel.functional(module))
    with silence():
        found = gradient(bilevel.functional(torch.compile(module)))
    assert float(expected.abs()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


# -- what has no useful derivative -------------------------------------------------------------------------------------


def test_row_29_piecewise_linear_lower_objective_is_singular() -> None:
    problem = Problem(upper=far, lower=lambda x, y, b: (y - x).abs().sum())
    with pytest.raises(LinearSolveFailed, match=r"singular.*(damping|penalty)") as caught:
        hypergradient(problem, draw(3), draw(3, seed=1))
    assert caught.value.status is Status.SINGULAR


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("variable", ["x", "y"])
def test_row_30_variables_without_a_gradient(dtype: torch.dtype, variable: str) -> None:
    points = {"x": draw(2), "y": draw(2)} | {variable: torch.ones(2, dtype=dtype)}
    with pytest.raises(InvalidProblem, match=rf"{variable}: leaf '{variable}' has dtype {dtype}.*relax.*Optuna"):
        hypergradient(Problem(upper=far, lower=track), points["x"], points["y"])


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("how", ["round", "argmax", "compare"])
def test_row_31_steps_in_x_are_told(level: str, how: str) -> None:
    def step(x: Tensor) -> Tensor:
        if how == "round":
            return x.round()
        return (
            (1 - torch.eye(3).double())[x.argmax()] * x * 0 + x.argmax()
            if how == "argmax"
            else (x > 1.5).double() * x * 0 + (x > 1.5)
        )

    parts: dict[str, Any] = {"upper": lambda x, y, b: far(x, y, b), "lower": lambda x, y, b: track(x["c"], y, b)}
    whole = parts[level]
    parts[level] = lambda x, y, b: whole(x, y, b) + (step(x["s"]) * y).sum()
    x = {"c": draw(3), "s": torch.tensor([0.2, 0.4, 0.3], dtype=torch.float64)}
    with pytest.warns(
        IneffectiveHyperparameter, match=rf"leaf 's' changes the {level} objective but its gradient is zero"
    ):
        open_oracles(Problem(**parts), x, draw(3))


def test_row_31_a_zero_gradient_by_chance_is_not_told() -> None:
    """At y = 0 the weight of y² has no slope; at a minimum of f its own variables have none."""
    problem = Problem(
        upper=lambda x, y, b: far(x, y, b) + x["a"].square().sum() + x["b"].clamp_min(0).sum(),
        lower=lambda x, y, b: (x["w"].exp() * y.square()).sum() - y.sum(),
    )
    x = {"w": torch.zeros(3), "a": torch.zeros(2), "b": -torch.ones(2)}
    with silence():
        oracles, flat_x, flat_y = open_oracles(problem, x, torch.zeros(3))
    # The premise: at this point all of x has a gradient of zero, above and below.
    assert not oracles.upper_gradient(flat_x, flat_y).x.any()
    assert not oracles.linearize_lower(flat_x, flat_y).cross(torch.ones(3)).any()


def test_row_32_x_that_enters_by_the_start_alone_is_refused() -> None:
    problem = Problem(upper=far, lower=lambda x, y, b: (y - 1).square().sum(), lower_init=lambda x: 2 * x)
    with pytest.raises(InvalidProblem, match=r"only through lower_init.*zero by definition.*unroll"):
        bilevel.solve(problem, bilevel.implicit(), draw(2))
