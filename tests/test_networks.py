"""Hypergradients through networks of all kinds, against dense second derivatives by differences of first ones.

The reference never differentiates twice: it calls a copy of the user's own module, by torch's default kernels, and
takes differences of fourth order of its gradients. Modules must come out of it bit for bit as they went in.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import parametrizations

import bilevel
from bilevel import Dense, Implicit, Problem, SecondOrderFallback, SecondOrderUnsupported, functional
from bilevel.dry_run import open_oracles

EXAMPLES = 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.head = kind(2, 2, batch_first=True), nn.Linear(2, 1)

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.head(self.cells(batch)[0][:, -1])
        return output


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.head(self.attention(batch, batch, batch, need_weights=False)[0].mean(1))
        return output


class Queries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(3, 6), nn.Linear(2, 1)

    def forward(self, batch: Tensor) -> Tensor:
        queries = self.project(batch).unsqueeze(1).chunk(3, dim=-1)
        output: Tensor = self.head(scaled_dot_product_attention(*queries, is_causal=True).mean((1, 2)))
        return output


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(2, 1, dim_feedforward=3, dropout=0.0, batch_first=True)

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.layer(batch).mean((1, 2))
        return output


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.decode(self.encode(batch).tanh()).mean(-1)
        return output


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 1)

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.head(self.table((batch.abs() * 2).long().clamp(max=3)).tanh().mean(1))
        return output


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 1))


def dense(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2), nn.GELU(), nn.Flatten(),
        nn.Linear(2, 1),
    )  # fmt: skip


def half_frozen() -> nn.Module:
    module = dense()
    module[0].requires_grad_(False)
    return module


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (dense, (3,)),
    "cnn": (convolutional, (1, 4, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM), (3, 2)),
    "gru": (lambda: Recurrent(nn.GRU), (3, 2)),
    "batch norm": (lambda: dense(nn.BatchNorm1d(4)), (3,)),
    "layer norm": (lambda: dense(nn.LayerNorm(4)), (3,)),
    "group norm": (lambda: dense(nn.GroupNorm(2, 4)), (3,)),
    "tied": (Tied, (3,)),
    "embedding": (Words, (3,)),
    "frozen": (half_frozen, (3,)),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 1)),
        (3,),
    ),
    "old weight norm": (old_weight_norm, (3,)),
    "multihead attention": (SelfAttention, (3, 4)),
    "attention": (Queries, (3, 3)),
    "transformer": (Encoder, (3, 2)),
}
ATTENTIVE = {"multihead attention", "attention", "transformer"}


def made(name: str, training: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network in float64, inputs and targets."""
    make, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().double().train(training)
    return module, draw(EXAMPLES, *shape, seed=1), draw(EXAMPLES, seed=2)


def stated(net: Callable[[Any, Tensor], Tensor], inputs: Tensor, targets: Tensor, **options: Any) -> Problem:
    """Weigh each example of the lower fit, and decay all parameters."""
    data = bilevel.Full((inputs, targets))

    def errors(y: Any, b: Any) -> Tensor:
        return (net(y, b[0]).flatten() - b[1]).square()

    return Problem(
        upper=lambda x, y, b: errors(y, b)[:3].mean() + x["weights"].square().sum(),
        lower=lambda x, y, b: (x["weights"].sigmoid() * errors(y, b)).mean(),
        regularizer=bilevel.L2(lambda x: x["decay"].exp()),
        upper_data=data,
        lower_data=data,
        **options,
    )


X = {"weights": draw(EXAMPLES, seed=3), "decay": torch.tensor(0.5, dtype=torch.float64)}


def second_differences(gradients: Callable[[Tensor], tuple[Tensor, Tensor]], y: Tensor) -> tuple[Tensor, Tensor]:
    """Return d/dy of (gradient in x, gradient in y) as `[d, p]` and `[d, d]`, by differences of fourth order."""
    step = 1e-3
    rows = []
    for unit in torch.eye(len(y), dtype=y.dtype):
        near, far = (
            [a - b for a, b in zip(gradients(y + k * step * unit), gradients(y - k * step * unit), strict=True)]
            for k in (1, 2)
        )
        rows.append([(8 * n - f) / (12 * step) for n, f in zip(near, far, strict=True)])
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def reference(
    gradients: Callable[[Tensor], tuple[Tensor, Tensor]], upper: Any, x: dict[str, Tensor], y: Tensor
) -> Tensor:
    """Return `df/dx - J^T H^-1 df/dy`, flat in the order of x (weights, then decay); `gradients` of the traced part."""
    mixed, hessian = second_differences(gradients, y)
    decay = x["decay"].exp()
    hessian = (hessian + hessian.mT) / 2 + decay * torch.eye(len(y), dtype=y.dtype)
    w = torch.linalg.solve(hessian, upper.y)
    return upper.x - torch.cat([(mixed.mT @ w)[:EXAMPLES], (decay * y @ w)[None]])


def own_gradients(module: nn.Module, inputs: Tensor, targets: Tensor, names: list[str]) -> Any:
    """Return y -> first derivatives of the traced lower objective, computed with the module itself."""
    shapes = [dict(module.named_parameters())[name].shape for name in names]

    def gradients(y: Tensor) -> tuple[Tensor, Tensor]:
        leaf, weights = y.clone().requires_grad_(), X["weights"].clone().requires_grad_()
        parts = torch.split(leaf, [shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        values |= {name: buffer.clone() for name, buffer in module.named_buffers()}
        output = torch.func.functional_call(module, values, (inputs,)).flatten()
        loss = (weights.sigmoid() * (output - targets).square()).mean()
        in_weights, in_y = torch.autograd.grad(loss, [weights, leaf])
        return in_weights, in_y

    return gradients


def bits(module: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "grads": [parameter.grad for parameter in module.parameters()],
        "training": [part.training for part in module.modules()],
        "flags": [parameter.requires_grad for parameter in module.parameters()],
        "attributes": [sorted(vars(part)) for part in module.modules()],
        "random": torch.get_rng_state(),
    }


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    states = before["state"].keys() == after["state"].keys() and all(
        torch.equal(value, after["state"][name]) for name, value in before["state"].items()
    )
    plain = all(before[name] == after[name] for name in ("grads", "training", "flags", "attributes"))
    return states and plain and torch.equal(before["random"], after["random"])


def expected_warning(name: str) -> AbstractContextManager[Any]:
    return pytest.warns(SecondOrderFallback, match="attention") if name in ATTENTIVE else nullcontext()


@pytest.mark.parametrize(
    ("name", "training"),
    [(name, True) for name in NETWORKS]
    + [(name, False) for name in ("batch norm", "transformer")]
    + [
        pytest.param(name, False, marks=pytest.mark.slow)
        for name in NETWORKS
        if name not in ("batch norm", "transformer")
    ],
)
def test_hypergradient_against_differences_of_the_modules_own_gradients(name: str, training: bool) -> None:
    module, inputs, targets = made(name, training)
    before = bits(module)
    net = functional(module)
    problem, y0 = stated(net, inputs, targets), net.parameters()
    with expected_warning(name):
        oracles, _, y = open_oracles(problem, X, y0)
    with expected_warning(name):
        found = bilevel.hypergradient(problem, X, y0, estimator=Implicit(linear=Dense(), truncate=True), certify=False)
    assert unchanged(before, bits(module))
    upper = oracles.upper_gradient(oracles.x_layout.flatten(X), y)
    expected = reference(own_gradients(module, inputs, targets, list(y0)), upper, X, y)
    torch.testing.assert_close(oracles.x_layout.flatten(found.gradient), expected, rtol=1e-6, atol=1e-8)
    assert unchanged(before, bits(module))


@pytest.mark.parametrize("where", ["elementwise", "recurrent", "attention"])
def test_dropout_is_drawn_once_for_each_step(where: str) -> None:
    """Every product of one linear solve sees the same mask; the reference asks the oracles for first derivatives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if where == "elementwise":
            module, shape = dense(nn.Dropout(0.4)), (3,)
        elif where == "recurrent":
            module, shape = Recurrent(nn.LSTM), (3, 2)
            module.cells = nn.LSTM(2, 2, num_layers=2, dropout=0.4, batch_first=True)
        else:
            module, shape = SelfAttention(), (3, 4)
            module.attention.dropout = 0.4
        module.double()
    before = bits(module)
    net = functional(module)
    problem = stated(net, draw(EXAMPLES, *shape, seed=1), draw(EXAMPLES, seed=2))
    # Attention with dropout is no fused kernel on the CPU.
    oracles, x, y = open_oracles(problem, X, net.parameters())
    estimator = Implicit(linear=Dense(), truncate=True)
    answers = {}
    for step in (0, 1):
        state = estimator.init(oracles, x, y)
        answers[step] = estimator.estimate(oracles, x, y, state, upper_step=step, lower_step=step)[0].gradient
        upper = oracles.upper_gradient(x, y, step)

        def gradients(point: Tensor, step: int = step) -> tuple[Tensor, Tensor]:
            found = oracles.lower_gradients(x, point, step, declared=False)
            return found.x, found.y

        if step == 1:
            expected = reference(gradients, upper, X, y)
            torch.testing.assert_close(answers[step], expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(answers[0], answers[1], rtol=1e-3)
    assert unchanged(before, bits(module))


@pytest.mark.parametrize("name", sorted(ATTENTIVE))
def test_fused_attention_is_refused_where_double_backward_is_insisted_on(name: str) -> None:
    module, inputs, targets = made(name)
    net = functional(module)
    problem = stated(net, inputs, targets, hvp="double_backward")
    with pytest.raises(SecondOrderUnsupported, match=r"double_backward: .*attention"):
        bilevel.hypergradient(problem, X, net.parameters())
    plain = stated(net, inputs, targets, hvp="math_attention")
    estimator = Implicit(linear=Dense(), truncate=True)
    silent = bilevel.hypergradient(plain, X, net.parameters(), estimator=estimator, certify=False).gradient
    with pytest.warns(SecondOrderFallback):
        chosen = bilevel.hypergradient(
            stated(net, inputs, targets), X, net.parameters(), estimator=estimator, certify=False
        ).gradient
    torch.testing.assert_close(silent["weights"], chosen["weights"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["weight norm", "old weight norm"])
def test_torchs_own_weight_norm_is_caught_by_the_dry_run(name: str) -> None:
    """Called without `functional`, its fused kernel gives wrong second derivatives without a word."""
    module, inputs, targets = made(name)
    buffers = dict(module.named_buffers())

    def raw(y: Any, batch: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, {**y, **buffers}, (batch,))
        return output

    y0 = {key: value.detach().clone() for key, value in module.named_parameters()}
    with pytest.raises(SecondOrderUnsupported, match=r"differs by \d+% from differences of gradients"):
        bilevel.hypergradient(stated(raw, inputs, targets, hvp="double_backward"), X, y0)


def test_batch_norm_in_training_needs_no_running_statistics() -> None:
    """In training the statistics are those of the batch, and the user's running ones neither count nor move."""
    module, inputs, targets = made("batch norm")
    net = functional(module)
    problem, estimator = stated(net, inputs, targets), Implicit(linear=Dense(), truncate=True)
    one = bilevel.hypergradient(problem, X, net.parameters(), estimator=estimator, certify=False).gradient
    module[1].running_mean.fill_(3.0)
    other = bilevel.hypergradient(problem, X, net.parameters(), estimator=estimator, certify=False).gradient
    assert torch.equal(one["weights"], other["weights"])
    assert module[1].num_batches_tracked == 0


@pytest.mark.parametrize("name", ["cnn", "lstm", "batch norm", "tied", "weight norm"])
def test_networks_in_float32_come_close(name: str) -> None:
    module, inputs, targets = made(name)
    estimator, found = Implicit(linear=Dense(), truncate=True), {}
    for dtype in (torch.float32, torch.float64):
        net = functional(copy.deepcopy(module).to(dtype))
        x = {key: leaf.to(dtype) for key, leaf in X.items()}
        problem = stated(net, inputs.to(dtype), targets.to(dtype))
        found[dtype] = bilevel.hypergradient(problem, x, net.parameters(), estimator=estimator, certify=False).gradient
    close = found[torch.float32]["weights"].double()
    torch.testing.assert_close(close, found[torch.float64]["weights"], rtol=1e-3, atol=1e-4)
