"""Modules as functions: same numbers, exact second derivatives, and a user's module that nothing touches."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from bilevel.modules import functional
from bilevel.status import InvalidProblem


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def old_weight_norm(module, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, **options)


def settled(module):
    """Let the power iteration of spectral_norm converge."""
    module.double()
    zeros = torch.zeros(1, 3, 4) if "Conv1d" in type(module).__name__ else torch.zeros(1, 4)
    with torch.no_grad():
        for _ in range(300):
            module(zeros.double())
    return nn.Sequential(module, nn.Tanh())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x, weights=False):
        return self.attention(x, x, x, need_weights=weights)[0]


class Queries(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.project(x).chunk(3, dim=-1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False)
        self.again = nn.Linear(3, 4, bias=False)
        self.decode.weight = nn.Parameter(torch.randn(4, 3))
        self.again.weight = self.decode.weight

    def forward(self, x):
        return self.decode(self.encode(x).tanh()) + self.again(self.encode(x))


class Buffered(nn.Module):
    """Moves one buffer in place and replaces another."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.count += 1
        self.mean = 0.5 * self.mean + 0.5 * (x * self.weight).mean(0)
        return x * self.weight + self.mean * self.count


def frozen_half():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    return net


MODULES = {
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2)
        ),
        (5, 1, 4, 4),
    ),
    "lstm": (Recurrent, (5, 3, 3)),
    "attention": (Attentive, (2, 3, 4)),
    "sdpa": (Queries, (2, 3, 4)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True),
        (2, 3, 4),
    ),
    "batch_norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()), (6, 4)),
    "instance_norm": (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (2, 3, 5)),
    "tied": (Tied, (5, 4)),
    "frozen": (frozen_half, (5, 4)),
    "buffered": (Buffered, (5, 3)),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()), (5, 4)),
    "weight_norm_last": (lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2), dim=2), (2, 2, 4)),
    "weight_norm_whole": (lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=None), (5, 4)),
    "old_weight_norm": (lambda: nn.Sequential(old_weight_norm(nn.Linear(4, 3)), nn.Tanh()), (5, 4)),
    "old_weight_norm_last": (lambda: old_weight_norm(nn.Linear(4, 3), dim=1), (5, 4)),
    "spectral_norm": (lambda: settled(parametrizations.spectral_norm(nn.Linear(4, 3))), (5, 4)),
    "spectral_norm_dim": (lambda: settled(parametrizations.spectral_norm(nn.Conv1d(3, 2, 2), dim=1)), (2, 3, 4)),
    "spectral_norm_vector": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3), "bias"), (5, 4)),
    "old_spectral_norm": (lambda: settled(nn.utils.spectral_norm(nn.Linear(4, 3))), (5, 4)),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh()), (5, 3)),
}


def loss(output):
    target = torch.arange(output.numel(), dtype=torch.float64).sin().reshape(output.shape)
    return (output - target).square().mean() + output.sin().sum()


def hvp(net, y, v, x):
    y = {name: value.detach().requires_grad_() for name, value in y.items()}
    gradients = torch.autograd.grad(loss(net(y, x)), list(y.values()), create_graph=True)
    product = sum((g * v[name]).sum() for g, name in zip(gradients, y, strict=True))
    return torch.cat([h.reshape(-1) for h in torch.autograd.grad(product, list(y.values()), materialize_grads=True)])


def gradient(net, y, x):
    y = {name: value.detach().requires_grad_() for name, value in y.items()}
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(net(y, x)), list(y.values()))])


def contents(module):
    """All of a module that a call could change."""
    flags = [part.training for part in module.modules()]
    flags += [getattr(part, "track_running_stats", None) for part in module.modules()]
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return flags, [(name, tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors]


def unchanged(before, after):
    return before[0] == after[0] and all(
        name == other and tensor is same and torch.equal(value, now) and grad == other_grad
        for (name, tensor, value, grad), (other, same, now, other_grad) in zip(before[1], after[1], strict=True)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_values_equal_the_modules_and_leave_it_alone(name, training):
    make, shape = MODULES[name]
    module = seeded(make).train(training)
    x = draw(*shape)
    expected = copy.deepcopy(module)(x) if not name.startswith("old_weight") else None
    before = contents(module)
    net = functional(module)
    y = net.parameters()
    for _ in range(2):
        output = net(y, x)
        if expected is None:
            expected = module(x)
        assert torch.allclose(output, expected, rtol=1e-12, atol=1e-14)
    gradient(net, y, x)
    assert unchanged(before, contents(module))
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in MODULES if name != "orthogonal"])
def test_double_backward_against_differences(name, training):
    make, shape = MODULES[name]
    net = functional(seeded(make).train(training))
    x = draw(*shape, seed=1)
    y = {key: value + 0.1 * draw(*value.shape, seed=2) for key, value in net.parameters().items()}
    v = {key: draw(*value.shape, seed=3) for key, value in y.items()}
    with sdpa_kernel(SDPBackend.MATH):
        exact = hvp(net, y, v, x)
        for step in (1e-5, 1e-6):
            forth = gradient(net, {key: y[key] + step * v[key] for key in y}, x)
            back = gradient(net, {key: y[key] - step * v[key] for key in y}, x)
            assert torch.allclose(exact, (forth - back) / (2 * step), rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("normalize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_torchs_normalizations_still_hide_second_derivatives(normalize):
    """What `functional` avoids; if this fails, torch has mended it and our plain version may go."""
    module = seeded(lambda: settled(normalize(nn.Linear(4, 3))))
    x = draw(5, 4)
    plain = functional(module)

    def theirs(y, inputs):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, {**y, **buffers}, (inputs,))

    y = plain.parameters()
    v = {name: draw(*value.shape, seed=3) for name, value in y.items()}
    assert torch.allclose(theirs(y, x), plain(y, x), rtol=1e-10)
    right, wrong = (hvp(net, y, v, x) for net in (plain, theirs))
    assert float((right - wrong).norm() / right.norm()) > 0.02


def test_parameters_are_detached_copies_of_the_trainable():
    module = seeded(frozen_half)
    net = functional(module)
    y = net.parameters()
    assert list(y) == ["2.weight", "2.bias"]
    assert net.frozen == ("0.weight", "0.bias")
    assert not any(value.requires_grad for value in y.values())
    y["2.bias"].fill_(9.0)
    assert not torch.equal(net.parameters()["2.bias"], y["2.bias"])
    assert not torch.equal(module[2].bias, y["2.bias"])


def test_later_changes_of_the_module_change_nothing():
    module = seeded(frozen_half)
    net = functional(module)
    y, x = net.parameters(), draw(5, 4)
    before = net(y, x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(net(y, x), before)


def test_all_frozen_is_refused():
    with pytest.raises(InvalidProblem, match=r"functional\(Linear\): all 2 parameters are frozen; .*requires_grad_"):
        functional(nn.Linear(2, 2).requires_grad_(False))


def test_names_of_y_are_checked():
    net = functional(nn.Linear(2, 2))
    y = net.parameters()
    with pytest.raises(InvalidProblem, match=r"Linear: parameters missing: \['bias'\], unknown: \['scale'\]"):
        net({"weight": y["weight"], "scale": y["bias"]}, torch.ones(1, 2))


def test_tied_parameters_are_one():
    module = seeded(Tied)
    net = functional(module)
    y, x = net.parameters(), draw(5, 4)
    assert list(y) == ["encode.weight", "decode.weight"]
    assert net.tied == {"decode.weight": ("again.weight",)}
    leaves = {name: value.requires_grad_() for name, value in y.items()}
    (ours,) = torch.autograd.grad(loss(net(leaves, x)), [leaves["decode.weight"]])
    twin = copy.deepcopy(module)
    (theirs,) = torch.autograd.grad(loss(twin(x)), [twin.decode.weight])
    assert torch.allclose(ours, theirs, rtol=1e-13)
    exported = net.module({name: value + 1 for name, value in y.items()})
    assert exported.again.weight is exported.decode.weight
    assert isinstance(exported.decode.weight, nn.Parameter)


def test_tied_buffers_are_one():
    net = nn.ModuleList([Buffered(), Buffered()]).double()
    net[1].count = net[0].count
    chain = nn.Sequential(*net)
    expected = copy.deepcopy(chain)(draw(5, 3))
    pure = functional(chain)
    assert torch.equal(pure(pure.parameters(), draw(5, 3)), expected)
    assert float(chain[0].count) == 0.0


@pytest.mark.parametrize("name", MODULES)
def test_exported_module_gives_the_same_values(name):
    make, shape = MODULES[name]
    module = seeded(make)
    before = contents(module)
    net = functional(module).eval()
    x = draw(*shape)
    y = {key: value + 0.1 * draw(*value.shape) for key, value in net.parameters().items()}
    exported = net.module(y)
    assert type(exported) is type(module) or "norm" in name
    assert not exported.training
    assert [p.requires_grad for p in exported.parameters()] == [p.requires_grad for p in module.parameters()]
    assert torch.allclose(exported(x), net(y, x), rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.zero_()
    assert unchanged(before, contents(module))
    assert all(float(value.abs().sum()) > 0 for value in y.values())


def test_modes():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).double()
    module[2].running_mean.fill_(3.0)
    net = functional(module.train())
    y, x = net.parameters(), draw(6, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert not torch.equal(net(y, x), net(y, x))
        torch.manual_seed(2)
        first = net(y, x)
        torch.manual_seed(2)
        assert torch.equal(first, net(y, x))
    still = net.eval()
    assert torch.equal(still(y, x), still(y, x))
    assert torch.equal(still(y, x), copy.deepcopy(module).eval()(x))
    again = still.train()
    assert torch.allclose(again(y, x).mean(0), torch.zeros(4).double(), atol=1e-12)
    assert module.training
    module[2].eval()
    mixed = functional(module)
    assert (mixed.working[1].training, mixed.working[2].training) == (True, False)
    exported = mixed.module(y)
    assert (exported[1].training, exported[2].training, exported[2].track_running_stats) == (True, False, True)


def test_buffers_are_committed_on_request():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), Buffered()).double()
    twin = copy.deepcopy(module)
    x = draw(6, 4)
    net = functional(module, commit_buffers=True)
    y = net.parameters()
    for _ in range(3):
        assert torch.allclose(net(y, x), twin(x), rtol=1e-13)
    assert int(module[1].num_batches_tracked) == 3
    for (name, ours), (_, theirs) in zip(module.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-13), name
        assert not ours.requires_grad
    assert torch.allclose(net.eval()(y, x)[:, 0].detach(), twin.eval()(x)[:, 0].detach(), rtol=1e-12)
    assert torch.equal(net.module(y)[1].running_mean, module[1].running_mean)
    assert "committed" in net.summary()


def test_vectorized_over_blocks_with_double_backward():
    net = functional(seeded(MODULES["batch_norm"][0]))
    x = draw(3, 6, 4)
    y = {name: torch.stack([value + 0.1 * draw(*value.shape, seed=i) for i in range(3)])
         for name, value in net.parameters().items()}  # fmt: skip
    v = {name: draw(*value.shape, seed=5) for name, value in y.items()}

    def product(call):
        leaves = {name: value.detach().requires_grad_() for name, value in y.items()}
        losses = call(leaves)
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), create_graph=True)
        inner = sum((g * v[name]).sum() for g, name in zip(gradients, leaves, strict=True))
        return torch.autograd.grad(inner, list(leaves.values()))

    together = product(lambda leaves: torch.func.vmap(lambda one, inputs: loss(net(one, inputs)))(leaves, x))
    apart = product(
        lambda leaves: torch.stack([loss(net({n: value[i] for n, value in leaves.items()}, x[i])) for i in range(3)])
    )
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_inputs_and_options_are_passed_on():
    net = functional(seeded(Attentive))
    y, x = net.parameters(), draw(2, 3, 4)
    assert torch.allclose(net(y, x, weights=True), net(y, x), rtol=1e-12)
    bilinear = functional(nn.Bilinear(2, 3, 1))
    assert bilinear(bilinear.parameters(), torch.ones(5, 2), torch.ones(5, 3)).shape == (5, 1)


def test_derived_weights_do_not_keep_the_graph_alive():
    net = functional(old_weight_norm(nn.Linear(4, 3)))
    y = {name: value.requires_grad_() for name, value in net.parameters().items()}
    alive = weakref.ref(y["weight_v"])
    net(y, torch.ones(2, 4))
    del y
    gc.collect()
    assert alive() is None


def test_wrappers_are_taken_off():
    module = seeded(frozen_half)
    y, x = functional(module).parameters(), draw(5, 4)
    expected = module(x)
    compiled = torch.compile(module, backend="eager")
    inside = nn.Sequential(torch.compile(nn.BatchNorm1d(4), backend="eager"), module).double()
    in_place = copy.deepcopy(module)
    in_place.compile(backend="eager")
    for wrapped in (compiled, nn.DataParallel(module), in_place):
        net = functional(wrapped)
        assert list(net.parameters()) == list(y)
        assert torch.equal(net(y, x), expected)
        hvp(net, y, y, x)
    net = functional(inside, commit_buffers=True)
    assert "0.weight" in net.parameters()
    net(net.parameters(), x)
    assert float(inside[0]._orig_mod.running_mean.abs().sum()) > 0


def test_distributed_data_parallel_is_taken_off():
    module = seeded(frozen_half)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(module)
        net = functional(wrapped)
        assert list(net.parameters()) == ["2.weight", "2.bias"]
        assert torch.equal(net(net.parameters(), draw(5, 4)), module(draw(5, 4)))
    finally:
        destroy_process_group()


def test_sharded_modules_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        sharded = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(InvalidProblem, match="the module is sharded"):
            functional(sharded)
    finally:
        destroy_process_group()


def test_modules_that_are_no_functions_are_refused():
    with pytest.raises(InvalidProblem, match=r"parameters \['weight', 'bias'\] have no shape yet"):
        functional(nn.LazyLinear(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(InvalidProblem, match="a scripted module"):
        functional(scripted)
    stubborn = nn.Linear(2, 2)
    stubborn.handle = (i for i in range(3))
    with pytest.raises(InvalidProblem, match="Linear cannot be copied"):
        functional(stubborn)


def test_summary():
    module = nn.Sequential(Tied(), nn.BatchNorm1d(4), nn.Linear(4, 1))
    module[2].bias.requires_grad_(False)
    lines = functional(module).summary().splitlines()
    assert lines[0] == "Sequential: 36 trainable numbers in 5 tensors"
    assert lines[1:3] == ["frozen: 1 tensors", "  2.bias"]
    assert lines[3:5] == ["tied: 1 tensors", "  0.decode.weight = 0.again.weight"]
    assert lines[5] == "buffers: 3 tensors, changes discarded after each call"
