"""check_second_order: faults are found where they are, kinks are no faults, and the module stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

import bilevel
from bilevel import InvalidProblem, Verdict, check_second_order
from bilevel.check._probe import Probe


class Square(torch.autograd.Function):
    """x^2, with a backward that saves a detached tensor (faults row 27)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.x * gradients[0]


class OnceOnly(torch.autograd.Function):
    """x^2, to be differentiated once (faults row 26)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0]


class Downstream(torch.autograd.Function):
    """x^2, whose backward cuts what comes from above out of the second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0].detach()


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Inside(nn.Module):
    """A faulty operation in the code of a module whose own parts are right."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(Square.apply(self.first(x)))  # type: ignore[no-untyped-call]
        return output


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def batch(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def between(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer(), nn.Tanh(), nn.Linear(6, 2))


RIGHT = {
    "tanh": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), (9, 4)),
    "relu": (
        lambda: nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)), (99, 4)
    ),
    "explicit weight norm": (between(lambda: bilevel.weight_norm(nn.Linear(6, 6))), (9, 4)),
    "last dim": (between(lambda: bilevel.weight_norm(nn.Linear(6, 6), dim=1)), (9, 4)),
    "one norm": (between(lambda: bilevel.weight_norm(nn.Linear(6, 6), dim=None)), (9, 4)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(36, 3),
        ),
        (8, 1, 8, 8),
    ),
    "recurrent": (lambda: nn.LSTM(4, 5), (6, 2, 4)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)), (9, 4)),
}  # fmt: skip

FAULTY = {
    "fused weight norm": (between(lambda: parametrizations.weight_norm(nn.Linear(6, 6))), "2", "WRONG"),
    "spectral norm": (between(lambda: parametrizations.spectral_norm(nn.Linear(6, 6))), "2", "WRONG"),
    "once differentiable": (between(lambda: Apply(OnceOnly.apply)), "2", "MISSING"),
    "detached": (between(lambda: Apply(Square.apply)), "2", "VANISHES"),
    "cut": (between(lambda: Apply(Downstream.apply)), "2", "WRONG"),
    "in a part's own code": (
        between(lambda: nn.Sequential(nn.Linear(6, 4), Inside(), nn.Linear(2, 6))),
        "2.1",
        "WRONG",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_modules_have_no_suspects(name: str) -> None:
    make, shape = RIGHT[name]
    report = check_second_order(seeded(make), batch(*shape))
    assert report.ok, report
    assert "no fault found" in str(report)


@pytest.mark.parametrize("name", FAULTY)
def test_the_faulty_part_is_named_and_no_other(name: str) -> None:
    make, layer, verdict = FAULTY[name]
    report = check_second_order(seeded(make), batch(9, 4))
    assert [(part.name, part.verdict.name) for part in report.suspects] == [(layer, verdict)], report
    assert report.whole.verdict.faulty
    assert not report.ok
    assert report.suspects[0].advice in str(report)


def test_row_25_fused_attention_is_missing_and_the_advice_helps() -> None:
    layer = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    report = check_second_order(layer, batch(3, 5, 8))
    (suspect,) = report.suspects
    assert (suspect.name, suspect.verdict) == ("self_attn", Verdict.MISSING)
    assert "sdpa_kernel(SDPBackend.MATH)" in suspect.advice
    with sdpa_kernel(SDPBackend.MATH):
        assert check_second_order(layer, batch(3, 5, 8)).ok


def test_the_advice_for_weight_norm_helps() -> None:
    net = seeded(FAULTY["fused weight norm"][0])
    report = check_second_order(net, batch(9, 4))
    assert "bilevel.weight_norm(layer)" in report.suspects[0].advice
    assert "bilevel.functional(module)" in report.suspects[0].advice
    before = net(batch(9, 4))
    assert bilevel.weight_norm(net[2]) is net[2]
    torch.testing.assert_close(net(batch(9, 4)), before)
    assert check_second_order(net, batch(9, 4)).ok


def test_old_weight_norm_is_found_too() -> None:
    with pytest.warns(FutureWarning):
        net = seeded(between(lambda: nn.utils.weight_norm(nn.Linear(6, 6))))
    report = check_second_order(net, batch(9, 4))
    assert [part.name for part in report.suspects] == ["2"]
    assert "weight normalization" in report.suspects[0].advice


def test_kinks_are_told_apart() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)))
    report = check_second_order(net, batch(999, 4))
    kinds = {layer.kind: layer for layer in report.layers}
    assert kinds["ReLU"].verdict is Verdict.KINK
    assert kinds["ReLU"].spread > 1e-3
    assert kinds["Linear"].verdict is Verdict.RIGHT
    assert not Verdict.KINK.faulty


def test_a_fault_beside_kinks_is_still_found() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 64), nn.ReLU(), Apply(Square.apply), nn.Linear(64, 2)))
    report = check_second_order(net, batch(99, 4))
    assert [part.name for part in report.suspects] == ["2"]
    assert report.whole.verdict.faulty


def test_a_point_on_a_kink_is_no_fault() -> None:
    report = check_second_order(nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU()), torch.zeros(3, 4))
    assert report.ok
    assert report.layers[1].verdict is Verdict.KINK


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_users_changes(training: bool) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), parametrizations.spectral_norm(nn.Linear(6, 2))
        )

    module = seeded(make).train(training)
    given = batch(9, 4)
    kept, inputs, random = copy.deepcopy(module.state_dict()), given.clone(), torch.get_rng_state()
    check_second_order(module, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(given, inputs)
    assert all(torch.equal(kept[name], now) for name, now in module.state_dict().items())
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in module.parameters())
    assert module.training is training
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_the_users_loss_is_the_one_that_counts() -> None:
    net, labels = seeded(RIGHT["tanh"][0]), torch.arange(9) % 2
    assert check_second_order(net, batch(9, 4), lambda output: F.cross_entropy(output, labels)).ok
    report = check_second_order(net, batch(9, 4), lambda output: Square.apply(output).sum())  # type: ignore[no-untyped-call]
    assert [part.name for part in report.suspects] == ["(whole)"]


def test_arguments_of_any_kind() -> None:
    attention = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    q = batch(2, 5, 8)
    assert check_second_order(attention, (q, q, q)).ok
    assert check_second_order(attention, {"query": q, "key": q, "value": q}).ok
    words = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 2))
    assert check_second_order(words, torch.arange(6)).ok


def test_frozen_parts_are_left_out() -> None:
    net = seeded(FAULTY["fused weight norm"][0])
    net[2].requires_grad_(False)
    net[0].requires_grad_(False)
    assert check_second_order(net, batch(9, 4)).whole.verdict is Verdict.RIGHT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_second_order(lambda x: x, batch(2)), "takes an nn.Module"),
        (lambda: check_second_order(nn.Linear(2, 2), batch(2), tol=0.0), "tol"),
        (lambda: check_second_order(nn.Linear(2, 2).requires_grad_(False), batch(2)), "trainable"),
        (lambda: check_second_order(nn.Linear(2, 2), batch(3)), "cannot be called in float64"),
        (lambda: check_second_order(nn.Linear(2, 2), batch(2), lambda o: o.detach().sum()), "the loss does not depend"),
        (lambda: bilevel.weight_norm(nn.Tanh()), "no tensor 'weight'"),
    ],
)
def test_wrong_calls_are_told(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        call()


def test_products_and_differences_of_a_function_with_a_known_hessian() -> None:
    point, direction = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, -1.0]).double()
    probe = Probe(lambda tensors: (tensors[0] ** 3).sum() + tensors[0].prod(), [point], [direction], 1e-5)
    # H = diag(6 p) + [[0, 1], [1, 0]]
    expected = torch.tensor([6.0 - 1.0, -12.0 + 1.0]).double()
    torch.testing.assert_close(probe.product(), expected)
    torch.testing.assert_close((probe.gradient(1e-5) - probe.gradient(-1e-5)) / 2e-5, expected, rtol=1e-8, atol=1e-8)
    assert probe.finding().verdict is Verdict.RIGHT


def test_infinite_derivatives_are_told() -> None:
    probe = Probe(lambda tensors: tensors[0].sqrt().sum(), [torch.zeros(2).double()], [torch.ones(2).double()], 1e-5)
    assert probe.finding().verdict is Verdict.NON_FINITE


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_torchs_but_for_second_derivatives(dim: int | None) -> None:
    one, other = (seeded(lambda: nn.Linear(5, 3)) for _ in range(2))
    ours, theirs = bilevel.weight_norm(one, dim=dim), parametrizations.weight_norm(other, dim=dim)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = batch(4, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
