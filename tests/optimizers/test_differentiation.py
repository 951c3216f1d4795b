"""Derivatives through chains of updates: against finite differences, and against `higher` where that is right."""

import warnings

import pytest
import torch

from bilevel.optimizers import SGD, Adam, AdamW, Cosine, StepDecay

TARGET = torch.tensor([0.4, -1.1, 2.0, 0.7], dtype=torch.float64)
START = torch.tensor([0.9, -0.3, 1.7, -2.0], dtype=torch.float64)
X = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)


def lower_gradient(x, y):
    return x.exp() * y + torch.cos(y + x.sum())


def unroll(optimizer, x, y0=START, steps=5):
    y, state = y0, optimizer.init(y0)
    for _ in range(steps):
        y, state = optimizer.update(y, lower_gradient(x, y), state, x)
    return ((y - TARGET) ** 2).sum()


def assert_derivative(function, x, rtol=1e-6):
    """The derivative of function at x, against central differences at two step sizes."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-6
    for h in (1e-4, 2e-5):
        difference = torch.stack(
            [(function(x.detach() + h * e) - function(x.detach() - h * e)) / (2 * h) for e in torch.eye(4).double()]
        )
        torch.testing.assert_close(gradient, difference, rtol=rtol, atol=1e-8 + 20 * h * h)


FIXED = [
    SGD(0.1),
    SGD(0.1, 0.9),
    SGD(0.1, 0.9, dampening=0.4),
    SGD(0.1, 0.9, nesterov=True, weight_decay=0.3),
    SGD(0.05, 0.5, maximize=True, weight_decay=0.3),
    Adam(0.1),
    Adam(0.1, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.3),
    Adam(0.1, amsgrad=True, betas=(0.6, 0.3)),
    Adam(0.1, eps_root=1e-2),
    Adam(0.1, maximize=True),
    AdamW(0.1, weight_decay=0.3, amsgrad=True),
]


@pytest.mark.parametrize("optimizer", FIXED, ids=str)
def test_through_the_lower_gradient(optimizer):
    assert_derivative(lambda x: unroll(optimizer, x), X)


@pytest.mark.parametrize("optimizer", FIXED, ids=str)
def test_through_the_start(optimizer):
    assert_derivative(lambda y0: unroll(optimizer, X, y0), START)


LEARNED = {
    "lr": SGD(lambda x, step: 0.1 * x[0].exp(), 0.9),
    "lr per entry": SGD(lambda x, step: 0.1 * x.exp()),
    "lr per step": SGD(lambda x, step: 0.1 * x[step % 4].exp()),
    "momentum": SGD(0.1, lambda x, step: x[2].sigmoid()),
    "momentum, Nesterov": SGD(0.1, lambda x, step: x[2].sigmoid(), nesterov=True),
    "dampening": SGD(0.1, 0.8, dampening=lambda x, step: x[1].sigmoid()),
    "weight decay": SGD(0.1, 0.8, weight_decay=lambda x, step: x.exp()),
    "schedule": SGD(Cosine(lambda x, step: 0.2 * x[0].exp(), end=lambda x, step: 0.01 * x[1].exp(), steps=5)),
    "step decay": SGD(StepDecay(lambda x, step: 0.2 * x[0].exp(), factor=lambda x, step: x[1].sigmoid(), every=2)),
    "Adam lr": Adam(lambda x, step: 0.1 * x.exp()),
    "Adam betas": Adam(0.1, betas=(lambda x, step: x[0].sigmoid(), lambda x, step: x[1].sigmoid())),
    "Adam weight decay": Adam(0.1, weight_decay=lambda x, step: x[0].exp()),
    "AdamW weight decay": AdamW(0.1, weight_decay=lambda x, step: x[0].exp()),
}


@pytest.mark.parametrize("optimizer", LEARNED.values(), ids=LEARNED.keys())
def test_through_hyperparameters(optimizer):
    def outer(x):
        y, state = START, optimizer.init(START)
        for _ in range(5):
            y, state = optimizer.update(y, lower_gradient(X, y), state, x)
        return ((y - TARGET) ** 2).sum()

    x = X.clone().requires_grad_()
    used = torch.autograd.grad(outer(x), x)[0] != 0
    assert used.any()
    assert_derivative(outer, X)


def test_through_a_tensor_hyperparameter():
    lr = torch.tensor([0.1, 0.2, 0.05, 0.1], dtype=torch.float64)
    assert_derivative(lambda lr: unroll(SGD(lr, 0.9), X), lr)
    assert_derivative(lambda lr: unroll(Adam(lr), X), lr)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.2},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=str,
)
def test_sgd_agrees_with_higher(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        higher = pytest.importorskip("higher")

    x = X.clone().requires_grad_()
    y = START.clone().requires_grad_()
    theirs = higher.optim.DifferentiableSGD(torch.optim.SGD([y], lr=0.1, **settings), [y])
    for _ in range(5):
        loss = (x.exp() * y * y / 2 + torch.sin(y + x.sum())).sum()
        (y,) = theirs.step(loss, params=[y])
    expected = torch.autograd.grad(((y - TARGET) ** 2).sum(), x)[0]
    ours = torch.autograd.grad(unroll(SGD(0.1, **settings), x), x)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_first_momentum_buffer_is_part_of_the_graph():
    # torch.optim detaches it: with differentiable=True its derivative is wrong without a word.
    y0 = START.clone().requires_grad_()
    optimizer = SGD(0.1, 0.9)
    y, _ = optimizer.update(y0, 2 * y0, optimizer.init(y0))
    (slope,) = torch.autograd.grad(y.sum(), y0)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.8))


@pytest.mark.parametrize("optimizer", [Adam(0.01), Adam(0.01, amsgrad=True), AdamW(0.01), Adam(0.01, eps_root=1e-8)])
def test_adam_derivative_is_finite_at_a_zero_gradient(optimizer):
    def outer(x):
        y, state = START, optimizer.init(START)
        mask = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        for _ in range(5):
            y, state = optimizer.update(y, mask * lower_gradient(x, y), state)
        return ((y - TARGET) ** 2).sum()

    assert_derivative(outer, X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adam_derivative_at_a_zero_gradient_is_the_true_one(dtype):
    optimizer = Adam(0.01, eps=1e-3)
    gradient = torch.zeros(2, dtype=dtype, requires_grad=True)
    y = torch.ones(2, dtype=dtype)
    after, state = optimizer.update(y, gradient, optimizer.init(y))
    again, _ = optimizer.update(after, gradient, state)
    assert torch.autograd.grad(again.sum(), gradient, retain_graph=True)[0].isfinite().all()
    (slope,) = torch.autograd.grad(after.sum(), gradient, create_graph=True)
    torch.testing.assert_close(slope, torch.full_like(slope, -0.01 / 1e-3))
    assert torch.autograd.grad(slope.sum(), gradient)[0].isfinite().all()


def test_second_derivative_of_the_unroll():
    x = X.clone().requires_grad_()
    for optimizer in (SGD(0.1, 0.9), Adam(0.1)):
        assert torch.autograd.gradgradcheck(lambda x, o=optimizer: unroll(o, x, steps=3), (x,))


@pytest.mark.parametrize("optimizer", [SGD(0.1, 0.9), Adam(0.1), AdamW(0.1)])
def test_works_under_vmap_and_jvp(optimizer):
    batch = torch.stack([X, 2 * X, -X])
    values = torch.func.vmap(lambda x: unroll(optimizer, x))(batch)
    torch.testing.assert_close(values, torch.stack([unroll(optimizer, x) for x in batch]))
    slopes = torch.func.vmap(torch.func.grad(lambda x: unroll(optimizer, x)))(batch)
    leaf = batch[1].clone().requires_grad_()
    torch.testing.assert_close(slopes[1], torch.autograd.grad(unroll(optimizer, leaf), leaf)[0])


FORMULAS = {
    "plain": SGD(lambda x, step: x[0].exp()),
    "decay": SGD(lambda x, step: x[0].exp(), weight_decay=lambda x, step: x[1].sigmoid()),
    "momentum": SGD(lambda x, step: x[0].exp(), lambda x, step: x[2].sigmoid(), weight_decay=0.3),
    "Nesterov": SGD(lambda x, step: x[0].exp(), lambda x, step: x[2].sigmoid(), nesterov=True, weight_decay=0.3),
    "maximize": SGD(0.1, 0.9, maximize=True, weight_decay=lambda x, step: x[1].exp()),
    "numbers": SGD(0.1, 0.9),
}


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
@pytest.mark.parametrize("optimizer", FORMULAS.values(), ids=FORMULAS)
def test_the_formula_of_an_update_is_its_derivative(optimizer, shape, step):
    x = X.clone().requires_grad_()
    y, gradient = (v.reshape(shape).clone().requires_grad_() for v in (START, TARGET))
    state = optimizer.init(y)._replace(step=step)
    buffer = (0.3 * X.reshape(shape) if state.buffer.numel() else state.buffer).clone().requires_grad_()
    state = state._replace(buffer=buffer)
    after, after_state = optimizer.update(y, gradient, state, x)
    a, b = torch.cos(after).detach(), torch.sin(after_state.buffer).detach()
    inputs = [y, gradient, buffer, x]
    expected = torch.autograd.grad([after, after_state.buffer], inputs, [a, b], materialize_grads=True)

    found = optimizer.linearized(y.detach(), gradient.detach(), state._replace(buffer=buffer.detach()), x)
    torch.testing.assert_close(found.y, after.detach(), rtol=0, atol=0)
    torch.testing.assert_close(found.state.buffer, after_state.buffer.detach(), rtol=0, atol=0)
    pulled = found.pull(a, (b,))
    in_x = torch.zeros_like(X)
    if found.learned:
        (in_x,) = torch.autograd.grad(found.learned, [x], pulled.learned)
    for one, other in zip([pulled.y, pulled.gradient, pulled.buffers[0], in_x], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)


def test_updates_without_a_formula_say_so():
    y = START.clone()
    for optimizer in (SGD(0.1, 0.9, dampening=0.1), SGD(torch.full_like(y, 0.1)), Adam(0.1)):
        assert optimizer.linearized(y, y, optimizer.init(y), X) is None
