"""What options mean, which are refused, and the helpers that change the step length."""

import dataclasses
import functools
import math
import pickle

import pytest
import torch

from bilevel import F2SA, HypergradientDescent, OneStep, Unrolled
from bilevel.optimizers import LBFGS, SGD, Adam, AdamW, Cosine, Optimizer, Power, Sign, StepDecay
from bilevel.status import InvalidProblem

Y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
G = torch.tensor([0.3, 0.8, -1.0], dtype=torch.float64)


def move(optimizer, y=Y, gradient=G, x=None):
    return optimizer.update(y, gradient, optimizer.init(y), x)[0] - y


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(-0.1), "lr=-0.1"),
        (lambda: SGD(math.nan), "lr=nan"),
        (lambda: SGD(math.inf), "lr=inf"),
        (lambda: SGD(True), "lr=True"),
        (lambda: SGD("0.1"), "lr='0.1'"),
        (lambda: SGD(torch.tensor(1)), "lr is a tensor of torch.int64"),
        (lambda: SGD(float), "lr="),
        (lambda: SGD(0.1, 1.1), "momentum=1.1"),
        (lambda: SGD(0.1, None), "momentum=None"),
        (lambda: SGD(0.1, 0.9, dampening=2.0), "dampening=2.0"),
        (lambda: SGD(0.1, weight_decay=-1.0), "weight_decay=-1.0"),
        (lambda: SGD(0.1, nesterov=True), "nesterov=True needs momentum"),
        (lambda: SGD(0.1, 0.9, nesterov=True, dampening=0.1), "nesterov=True needs momentum"),
        (lambda: SGD(0.1, 0.9, nesterov="no"), "nesterov='no'"),
        (lambda: SGD(0.1, maximize=1), "maximize=1"),
        (lambda: Adam(None), "lr=None"),
        (lambda: Adam(-1.0), "lr=-1.0"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas\[1\]=1.0"),
        (lambda: Adam(betas=(-0.1, 0.9)), r"betas\[0\]=-0.1"),
        (lambda: Adam(betas=(0.9,)), "must be a tuple of two"),
        (lambda: Adam(betas=0.9), "must be a tuple of two"),
        (lambda: Adam(eps=-1e-8), "eps=-1e-08"),
        (lambda: Adam(eps=torch.tensor(1e-8)), "eps must be a number"),
        (lambda: Adam(eps_root=-1.0), "eps_root=-1.0"),
        (lambda: AdamW(amsgrad=None), "amsgrad=None"),
        (lambda: AdamW(weight_decay="x"), "weight_decay='x'"),
        (lambda: AdamW(maximize=0), "maximize=0"),
        (lambda: Cosine(0.1, steps=0), "steps=0"),
        (lambda: Cosine(0.1, steps=1.5), "steps=1.5"),
        (lambda: Cosine(math.inf, steps=5), "start=inf"),
        (lambda: Cosine(0.1, "0", steps=5), "end='0'"),
        (lambda: StepDecay(0.1, -0.5, 3), "factor=-0.5"),
        (lambda: StepDecay(0.1, 0.5, True), "every=True"),
        (lambda: LBFGS(memory=0), "memory=0"),
        (lambda: LBFGS(max_steps=-1), "max_steps=-1"),
        (lambda: LBFGS(tol=0.0), "tol=0.0"),
        (lambda: LBFGS(tol=True), "tol=True"),
        (lambda: LBFGS(max_trials=0), "max_trials=0"),
        (lambda: LBFGS(patience=True), "patience=True"),
        (lambda: LBFGS().minimize(lambda y: (y.sum(), y), Y, tol=-1.0), "tol=-1.0"),
        (lambda: LBFGS().minimize(lambda y: (y.sum(), y), Y, max_steps=2.0), "max_steps=2.0"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(InvalidProblem, match=message):
        make()


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_unknown_options_are_refused(kind):
    with pytest.raises(TypeError, match="lookahead"):
        kind(0.1, lookahead=True)


def test_optimizers_are_values():
    assert SGD(0.1, 0.9) == SGD(0.1, 0.9)
    assert SGD(0.1) != SGD(0.2)
    assert hash(Adam(0.1)) == hash(Adam(0.1))
    assert pickle.loads(pickle.dumps(AdamW(Cosine(0.1, steps=3)).scaled(0.5))) == AdamW(Cosine(0.1, steps=3)).scaled(
        0.5
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        SGD(0.1).lr = 0.2
    with pytest.raises(TypeError):
        Optimizer()


def test_an_integer_or_numpy_number_serves():
    import numpy as np

    torch.testing.assert_close(move(SGD(1)), -G)
    torch.testing.assert_close(move(SGD(np.float64(0.5))), -0.5 * G)


def test_missing_lr_is_told():
    optimizer = SGD(None, 0.9)
    assert optimizer.needs_lr
    state = optimizer.init(Y)
    for call in (
        lambda: optimizer.update(Y, G, state),
        lambda: optimizer.scaled(0.5),
        lambda: optimizer.sensitivity(G, state),
    ):
        with pytest.raises(InvalidProblem, match=r"1 / \(largest curvature of the lower objective\).*with_lr"):
            call()
    supplied = optimizer.with_lr(0.25)
    assert supplied == SGD(0.25, 0.9)
    assert not supplied.needs_lr


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
@pytest.mark.parametrize(
    "lr",
    [0.1, torch.tensor(0.1), torch.tensor([0.1, 0.2, 0.3]), lambda x, step: 0.1, Cosine(0.1, steps=9)],
    ids=["number", "0-dim", "vector", "function", "schedule"],
)
def test_scaled_and_with_lr(kind, lr):
    optimizer = kind(lr)
    assert not optimizer.needs_lr
    torch.testing.assert_close(move(optimizer.scaled(0.5)), 0.5 * move(optimizer))
    torch.testing.assert_close(move(optimizer.scaled(0.5).scaled(4.0)), 2 * move(optimizer))
    torch.testing.assert_close(move(kind(7.0).with_lr(lr)), move(optimizer))


def test_helpers_keep_the_other_options():
    for optimizer in (
        SGD(0.1, 0.9, nesterov=True, weight_decay=0.2, maximize=True),
        Adam(0.1, betas=(0.5, 0.6), eps=1e-3, eps_root=1e-4, weight_decay=0.2, amsgrad=True, maximize=True),
        AdamW(0.1, betas=(0.5, 0.6), eps=1e-3, eps_root=1e-4, weight_decay=0.2, amsgrad=True, maximize=True),
    ):
        assert optimizer.with_lr(0.3).with_lr(0.1) == optimizer
        assert optimizer.scaled(2.0).scaled(0.5) == optimizer


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf, True, "2"])
def test_bad_factors_are_refused(factor):
    with pytest.raises(InvalidProblem, match="factor="):
        SGD(0.1).scaled(factor)


def test_functions_see_x_and_step():
    seen = []

    def rate(x, step):
        seen.append((x["rate"], step))
        return 0.1

    optimizer = SGD(rate)
    y, state = Y, optimizer.init(Y)
    for _ in range(3):
        y, state = optimizer.update(y, G, state, {"rate": 7})
    assert seen == [(7, 0), (7, 1), (7, 2)]


@pytest.mark.parametrize(
    ("make", "name", "taken"),
    [
        (lambda wrong: Adam(lr=wrong), "lr", "step"),
        (lambda wrong: AdamW(weight_decay=wrong), "weight_decay", "step"),
        (lambda wrong: SGD(0.1, momentum=wrong), "momentum", "step"),
        (lambda wrong: Adam(betas=(0.9, wrong)), r"betas\[1\]", "step"),
        (lambda wrong: Sign(wrong), "lr", "step"),
        (lambda wrong: Cosine(wrong, steps=3), "start", "step"),
        (lambda wrong: SGD(0.1).with_lr(wrong), "lr", "step"),
        (lambda wrong: OneStep(lr=wrong), "lr", "step"),
        (lambda wrong: F2SA(penalty=wrong), "penalty", "step"),
        (lambda wrong: SGD(lambda: 0.1), "lr", ""),
        (lambda wrong: SGD(lambda x, y, step: 0.1), "lr", "x, y, step"),
        (lambda wrong: SGD(lambda x, *, step: 0.1), "lr", r"x, step"),
        (lambda wrong: SGD(functools.partial(lambda rate, step: rate, 0.1)), "lr", "step"),
        (lambda wrong: HypergradientDescent(upper=Adam(lr=wrong)), "lr", "step"),
        (lambda wrong: Unrolled(lower=SGD(lr=wrong)), "lr", "step"),
    ],
)
def test_a_function_of_other_arguments_is_refused_when_it_is_given(make, name, taken):
    with pytest.raises(InvalidProblem, match=rf"{name} is a function of \({taken}\).*Write {name}=lambda x, step: "):
        make(lambda step: 0.1)


def test_a_class_is_no_schedule():
    with pytest.raises(InvalidProblem, match=r"penalty must be .*Power"):
        F2SA(penalty=Power)


def signed(x, step, scale=0.1):
    return scale


class Silent:
    """A function that does not tell its signature."""

    __signature__ = "unknown"

    def __call__(self, x, step):
        return 0.1


@pytest.mark.parametrize(
    "rate",
    [
        signed,
        lambda *both: 0.1,
        lambda x, *rest: 0.1,
        lambda a, b: 0.1,
        functools.partial(signed, scale=0.1),
        functools.partial(lambda scale, x, step: scale, 0.1),
        Power(0.1, 0.5, limit=0.1),
        StepDecay(0.1, 0.5, 10),
        Silent(),
        Silent().__call__,
    ],
)
def test_functions_of_two_arguments_pass_however_they_are_made(rate):
    torch.testing.assert_close(move(SGD(rate)), -0.1 * G)


def test_a_builtin_without_a_signature_passes():
    # max(x, step) is x at step 0.
    torch.testing.assert_close(move(SGD(max), x=0.25), -0.25 * G)


def test_one_rate_a_row():
    y, gradient = torch.stack([Y, Y]), torch.stack([G, G])
    rates = torch.tensor([[0.1], [0.3]], dtype=torch.float64)
    torch.testing.assert_close(move(SGD(rates), y, gradient), -rates * gradient)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1, 3)])
def test_a_tensor_that_does_not_broadcast_is_refused(shape):
    with pytest.raises(InvalidProblem, match=r"lr has shape .* step 0.*\(3,\)"):
        move(SGD(torch.ones(shape)))
    with pytest.raises(InvalidProblem, match=r"betas\[1\] has shape"):
        move(Adam(betas=(0.9, torch.full(shape, 0.9))))


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_a_float64_rate_keeps_float32_variables(kind):
    rate = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    optimizer = kind(rate)
    y, state = optimizer.update(Y.float(), G.float(), optimizer.init(Y.float()))
    assert y.dtype == torch.float32
    y, _ = optimizer.update(y, G.float(), state)
    assert y.dtype == torch.float32


def test_momentum_zero_keeps_no_buffer():
    assert SGD(0.1).init(Y).buffer.numel() == 0
    assert SGD(0.1, 0.9).init(Y).buffer.shape == Y.shape
    assert Adam().init(Y).largest.numel() == 0


def test_dampening_spares_the_first_step():
    optimizer = SGD(1.0, 0.5, dampening=0.25)
    y, state = optimizer.update(Y, G, optimizer.init(Y))
    torch.testing.assert_close(state.buffer, G)
    _, state = optimizer.update(y, G, state)
    torch.testing.assert_close(state.buffer, 0.5 * G + 0.75 * G)


def test_eps_root_bounds_the_slope():
    zero = torch.zeros_like(Y)
    steep = Adam(0.1).sensitivity(zero, Adam(0.1).init(Y))
    torch.testing.assert_close(steep, torch.full_like(Y, 0.1 / 1e-8))
    gentle = Adam(0.1, eps_root=1e-6).sensitivity(zero, Adam(0.1).init(Y))
    assert bool((gentle <= 0.1 / 1e-3).all())


SENSITIVE = [
    SGD(0.1),
    SGD(0.1, maximize=True),
    SGD(0.1, 0.9, dampening=0.3, weight_decay=0.2),
    SGD(lambda x, step: 0.1 / (1 + step), 0.9, nesterov=True),
    SGD(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), lambda x, step: 0.9),
    Adam(0.1),
    Adam(0.1, betas=(0.5, 0.7), eps=1e-2),
    Adam(0.1, weight_decay=0.5, maximize=True),
    Adam(0.1, betas=(0.8, 0.3), amsgrad=True),
    Adam(0.1, eps_root=1e-2, amsgrad=True),
    Adam(lambda x, step: 0.1 / (1 + step), betas=(torch.tensor(0.9), lambda x, step: 0.99)),
    AdamW(0.1, weight_decay=0.5),
    AdamW(0.1, amsgrad=True, maximize=True),
]


@pytest.mark.parametrize("optimizer", SENSITIVE, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_sensitivity_is_the_diagonal_of_the_jacobian(optimizer, rows):
    y = Y if rows == 1 else torch.stack([Y, -2 * Y])
    gradient = G if rows == 1 else torch.stack([G, 3 * G])
    state = optimizer.init(y)
    for step in range(4):
        jacobian = torch.func.jacrev(lambda g, s=state: optimizer.update(y, g, s)[0])(gradient)
        jacobian = jacobian.reshape(y.numel(), y.numel())
        expected = -jacobian.diagonal().reshape(y.shape)
        assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))
        found = optimizer.sensitivity(gradient, state, None, y)
        assert found.shape == y.shape
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
        gradient_now = torch.where(torch.arange(3) == step % 3, 0.1, 1.0) * gradient
        state = optimizer.update(y, gradient_now, state)[1]


def test_sensitivity_with_coupled_decay_asks_for_y():
    optimizer = Adam(0.1, weight_decay=0.1)
    with pytest.raises(InvalidProblem, match="needs y"):
        optimizer.sensitivity(G, optimizer.init(Y))
    AdamW(0.1, weight_decay=0.1).sensitivity(G, optimizer.init(Y))


def test_sama_closed_form():
    # Without bias correction and eps, as the paper has it, far from the start.
    optimizer, y = Adam(0.1, betas=(0.9, 0.99), eps=0.0), torch.zeros(1, dtype=torch.float64)
    state = optimizer.init(y)._replace(step=100_000, mean=y + 0.2, square=y + 0.5)
    gradient = y + 0.7
    v = 0.99 * 0.5 + 0.01 * 0.7**2
    expected = 0.1 * (0.1 * 0.99 * 0.5 - 0.9 * 0.01 * 0.7 * 0.2) / v**1.5
    torch.testing.assert_close(optimizer.sensitivity(gradient, state), y + expected, rtol=1e-12, atol=0)
