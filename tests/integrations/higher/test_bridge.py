"""The inner loops of `higher`: the same gradients where it is right, the right ones where it is wrong."""

import copy
import warnings

import pytest
import torch
from torch import nn

import bilevel
from bilevel.integrations.higher import get_diff_optim, innerloop_ctx, monkeypatch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    higher = pytest.importorskip("higher")

TRAIN = (torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3), torch.linspace(0, 1, 8).double()[:, None])
VALID = (torch.linspace(1, -2, 12, dtype=torch.float64).reshape(4, 3), torch.linspace(1, 0, 4).double()[:, None])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def loss(net, data, weights=None):
    losses = (net(data[0]) - data[1]).square()
    return losses.mean() if weights is None else (weights * losses).mean()


def unrolled(context, model, optimizer, *, hyper, steps=4, override=None, data=None, **options):
    """Return the validation loss after an inner loop, and its gradients in `hyper`."""
    weights = hyper.get("weights")
    with context(model, optimizer, override=override, **options) as (net, diffopt):
        for _ in range(steps):
            diffopt.step(loss(net, TRAIN, weights))
        value = loss(net, VALID)
    return value, torch.autograd.grad(value, [v for v in hyper.values() if v.requires_grad])


def sample_weights():
    return {"weights": torch.linspace(0.5, 1.5, 8, dtype=torch.float64)[:, None].requires_grad_()}


def two_groups(model, kind, **settings):
    first, second = list(model[0].parameters()), list(model[2].parameters())
    return kind([{"params": second, "lr": 0.2}, {"params": first}], lr=0.1, **settings)


def assert_same(ours, theirs, rtol=1e-11, atol=1e-14):
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=atol)
    for one, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


SGDS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.8, "nesterov": True},
]


@pytest.mark.parametrize("settings", SGDS, ids=str)
def test_sgd_with_groups(settings):
    model, hyper = network(), sample_weights()
    results = [
        unrolled(context, model, two_groups(model, torch.optim.SGD, **settings), hyper=hyper)
        for context in (innerloop_ctx, higher.innerloop_ctx)
    ]
    assert_same(*results)


@pytest.mark.parametrize("values", [1, 2])
def test_learned_settings(values):
    model = network()
    rates = {f"rate{k}": torch.tensor(0.1 * (k + 1), dtype=torch.float64, requires_grad=True) for k in range(values)}
    momentum = {"momentum": torch.tensor(0.5, dtype=torch.float64, requires_grad=True)}
    hyper = rates | momentum
    override = {"lr": list(rates.values()), "momentum": list(momentum.values())}
    results = [
        unrolled(context, model, two_groups(model, torch.optim.SGD, momentum=0.1), hyper=hyper, override=override)
        for context in (innerloop_ctx, higher.innerloop_ctx)
    ]
    assert_same(*results)
    assert all(float(slope.abs()) > 1e-6 for slope in results[0][1])


def test_maml():
    """Metagradients land in the model's own parameters."""
    model = network()
    results = [
        unrolled(
            context, model, torch.optim.SGD(model.parameters(), lr=0.1),
            hyper=dict(model.named_parameters()), copy_initial_weights=False,
        )
        for context in (innerloop_ctx, higher.innerloop_ctx)
    ]  # fmt: skip
    assert_same(*results)


def test_gradients_in_the_first_weights():
    model, found = network(), []
    for context in (innerloop_ctx, higher.innerloop_ctx):
        with context(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (net, diffopt):
            for _ in range(3):
                diffopt.step(loss(net, TRAIN))
            found.append(torch.autograd.grad(loss(net, VALID), list(net.parameters(time=0))))
            middle = list(net.parameters(time=2))
            assert len(middle) == 4
    assert_same((found[0][0], found[0]), (found[1][0], found[1]))


def test_state_of_the_optimizer_goes_on():
    for kind, settings in [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})]:
        model = network()
        optimizer = kind(model.parameters(), lr=0.1, **settings)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model, TRAIN).backward()
            optimizer.step()
        expected = copy.deepcopy(model)
        going_on = kind(expected.parameters(), lr=0.1, **settings)
        going_on.load_state_dict(optimizer.state_dict())
        with innerloop_ctx(model, optimizer) as (net, diffopt):
            for _ in range(3):
                diffopt.step(loss(net, TRAIN))
                going_on.zero_grad()
                loss(expected, TRAIN).backward()
                going_on.step()
            for weight, wanted in zip(net.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(weight, wanted, rtol=1e-12, atol=1e-14)


def test_clipping_by_a_callback():
    def clip(gradients):
        return [gradient / (1 + gradient.norm()) for gradient in gradients]

    model, results = network(), []
    for context in (innerloop_ctx, higher.innerloop_ctx):
        hyper = sample_weights()
        with context(model, torch.optim.SGD(model.parameters(), lr=0.5)) as (net, diffopt):
            for _ in range(3):
                diffopt.step(loss(net, TRAIN, hyper["weights"]), grad_callback=clip)
            value = loss(net, VALID)
        results.append((value, torch.autograd.grad(value, hyper["weights"])))
    assert_same(*results)


def test_frozen_and_unused_parameters_stay():
    model, results = network(), []
    model[0].weight.requires_grad_(False)
    model.add_module("unused", nn.Identity())
    model[1].register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    for context in (innerloop_ctx, higher.innerloop_ctx):
        hyper = sample_weights()
        with context(model, torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)) as (net, diffopt):
            for _ in range(2):
                weights = diffopt.step(loss(net, TRAIN, hyper["weights"]))
            results.append((loss(net, VALID), torch.autograd.grad(loss(net, VALID), hyper["weights"])))
    assert_same(*results)
    torch.testing.assert_close(weights[0], model[0].weight)


def test_tied_weights_and_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 1)).double()
    model[2].weight = model[0].weight
    before, results = copy.deepcopy(model.state_dict()), []
    for context in (innerloop_ctx, higher.innerloop_ctx):
        hyper = sample_weights()
        with context(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (net, diffopt):
            for _ in range(3):
                diffopt.step(loss(net, TRAIN, hyper["weights"]))
            net.eval()  # running statistics of the inner loop, in the copy
            value = loss(net, VALID)
            results.append((value, torch.autograd.grad(value, hyper["weights"])))
    assert_same(*results)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.training


def test_recurrent_layers():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, inputs):
            return self.head(self.lstm(inputs[..., None])[0][:, -1])

    torch.manual_seed(0)
    model, results = Reader().double(), []
    for context in (innerloop_ctx, higher.innerloop_ctx):
        results.append(
            unrolled(context, model, torch.optim.SGD(model.parameters(), lr=0.1), hyper=sample_weights(), steps=2)
        )
    assert_same(*results, rtol=1e-9)


def test_without_a_graph():
    model = network()
    with innerloop_ctx(model, torch.optim.Adam(model.parameters(), lr=0.1), track_higher_grads=False) as (net, steps):
        for _ in range(3):
            weights = steps.step(loss(net, TRAIN))
        assert all(weight.is_leaf and weight.requires_grad for weight in weights)
        with pytest.raises(bilevel.InvalidProblem, match="not kept"):
            net.parameters(time=2)


def test_weights_by_hand():
    model = network()
    net = monkeypatch(model, copy_initial_weights=False)
    diffopt = get_diff_optim(torch.optim.SGD(model.parameters(), lr=0.1), model.parameters())
    with pytest.raises(bilevel.InvalidProblem, match="pass params"):
        diffopt.step(loss(net, TRAIN))
    weights = list(net.fast_params)
    for _ in range(2):
        value = (net(TRAIN[0], params=weights) - TRAIN[1]).square().mean()
        weights = diffopt.step(value, params=weights)
    expected = unrolled(
        higher.innerloop_ctx, model, torch.optim.SGD(model.parameters(), lr=0.1),
        hyper=dict(model.named_parameters()), copy_initial_weights=False, steps=2,
    )  # fmt: skip
    value = (net(VALID[0], params=weights) - VALID[1]).square().mean()
    assert_same((value, torch.autograd.grad(value, list(model.parameters()))), expected)
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_adam_is_that_of_higher_up_to_where_eps_stands():
    model, hyper = network(), sample_weights()
    results = [
        unrolled(context, model, torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1, eps=0.0), hyper=hyper)
        for context in (innerloop_ctx, higher.innerloop_ctx)
    ]
    assert_same(*results, rtol=1e-9)


# -- where `higher` is wrong -------------------------------------------------------------------------------------------

WRONG_THERE = [
    (torch.optim.SGD, {"maximize": True}),
    (torch.optim.SGD, {"maximize": True, "momentum": 0.9}),
    (torch.optim.Adam, {"maximize": True}),
    (torch.optim.Adam, {"amsgrad": True, "eps": 1e-3}),
    (torch.optim.Adam, {"eps": 1e-2, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"weight_decay": 0.3}),
    (torch.optim.AdamW, {"weight_decay": 0.3, "amsgrad": True, "maximize": True}),
]


@pytest.mark.parametrize(("kind", "settings"), WRONG_THERE, ids=str)
def test_values_are_those_of_torch(kind, settings):
    model = network()
    trained = copy.deepcopy(model)
    optimizer = kind(trained.parameters(), lr=0.05, **settings)
    for _ in range(4):
        optimizer.zero_grad()
        loss(trained, TRAIN).backward()
        optimizer.step()
    with innerloop_ctx(model, kind(model.parameters(), lr=0.05, **settings)) as (net, diffopt):
        for _ in range(4):
            diffopt.step(loss(net, TRAIN))
        for weight, wanted in zip(net.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(weight, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kind", "settings"), WRONG_THERE, ids=str)
def test_derivatives_are_those_of_finite_differences(kind, settings):
    model = network()

    def value(weights, rate):
        hyper = {"weights": weights, "rate": rate}
        optimizer = kind(model.parameters(), lr=0.05, **settings)
        return unrolled(innerloop_ctx, model, optimizer, hyper=hyper, override={"lr": [rate]})

    weights, rate = sample_weights()["weights"], torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    _, (in_weights, in_rate) = value(weights, rate)
    along = torch.linspace(-1, 2, 8, dtype=torch.float64)[:, None]
    for h in (1e-5, 1e-6):
        ahead = value((weights + h * along).detach().requires_grad_(), rate)[0]
        behind = value((weights - h * along).detach().requires_grad_(), rate)[0]
        assert float((ahead - behind).detach()) / (2 * h) == pytest.approx(
            float((in_weights * along).sum()), rel=1e-5, abs=1e-9
        )
        faster, slower = ((rate + s * h).detach().requires_grad_() for s in (1, -1))
        slope = float((value(weights, faster)[0] - value(weights, slower)[0]).detach()) / (2 * h)
        assert slope == pytest.approx(float(in_rate), rel=1e-5, abs=1e-9)


def test_higher_is_wrong_there():
    """What the two tests above guard against; when `higher` mends it, the page on migration is to be changed."""
    model = network()
    ascent = [
        unrolled(context, model, torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), hyper=sample_weights())
        for context in (innerloop_ctx, higher.innerloop_ctx)
    ]
    assert float((ascent[0][0] - ascent[1][0]).detach().abs()) > 1e-3
    with pytest.raises(ValueError, match="not supported by higher"):
        unrolled(higher.innerloop_ctx, model, torch.optim.AdamW(model.parameters()), hyper=sample_weights())


# -- the door ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_refused():
    model = network()
    for optimizer, match in [
        (torch.optim.RMSprop(model.parameters()), "supported are torch.optim.SGD, Adam and AdamW"),
        (torch.optim.SGD(network(1).parameters(), lr=0.1), "that the model does not have"),
    ]:
        with pytest.raises(bilevel.InvalidProblem, match=match), innerloop_ctx(model, optimizer):
            pass
    rates = {"lr": [torch.tensor(0.1)] * 3}
    with (
        pytest.raises(bilevel.InvalidProblem, match="3 values for 1 parameter groups"),
        innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1), override=rates),
    ):
        pass
    net = monkeypatch(model)
    with pytest.raises(AttributeError):
        net.weight = torch.zeros(1)  # would have no effect
    with pytest.raises(bilevel.InvalidProblem, match="expected 4 weights"):
        net.update_params([torch.zeros(1)])


def test_a_state_of_another_model_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model[0].weight]["momentum_buffer"] = torch.zeros(2, 2)  # torch says so at its first step only
    with (
        pytest.raises(bilevel.InvalidProblem, match=r"momentum_buffer has shape \(2, 2\), its parameter \(5, 3\)"),
        innerloop_ctx(model, optimizer),
    ):
        pass


def test_momentum_brought_in_on_the_way():
    model, results = network(), []
    for context in (innerloop_ctx, higher.innerloop_ctx):
        hyper = sample_weights()
        with context(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (net, diffopt):
            for step in range(4):
                override = {"momentum": [0.5]} if step == 2 else None
                diffopt.step(loss(net, TRAIN, hyper["weights"]), override=override)
            value = loss(net, VALID)
            results.append((value, torch.autograd.grad(value, hyper["weights"])))
    assert_same(*results)


def test_a_scheduler_may_have_driven_the_rate():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    results = [unrolled(c, model, optimizer, hyper=sample_weights()) for c in (innerloop_ctx, higher.innerloop_ctx)]
    assert_same(*results)
