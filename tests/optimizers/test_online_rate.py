"""A rate that descends its own hypergradient."""

from __future__ import annotations

import pytest
import torch

import bilevel
from bilevel.optimizers import SGD, Adam, AdamW, OnlineRate
from bilevel.status import InvalidProblem

H = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
Y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
BASES = [SGD(None), SGD(0.7, 0.9), Adam(0.3), AdamW(0.3, weight_decay=0.1)]


def objective(y):
    return 0.5 * (H * y * y).sum() + torch.cos(y).sum()


def slope(y):
    return H * y - torch.sin(y)


@pytest.mark.parametrize("base", BASES, ids=str)
def test_the_rate_moves_by_the_gradient_of_one_step(base):
    """The derivative of the objective after a step in the rate of that step, by autograd."""
    optimizer = OnlineRate(base, lr=0.05, beta=1e-3)
    y, state = optimizer.update(Y, slope(Y), optimizer.init(Y))
    for _ in range(3):
        rate = state.lr.clone().requires_grad_()
        ahead = base.with_lr(rate).update(y, slope(y), state.base)[0]
        moved, after = OnlineRate(base, lr=0.05, beta=0.0).update(y, slope(y), state)
        torch.testing.assert_close(moved, ahead.detach(), rtol=1e-13, atol=1e-14)
        (expected,) = torch.autograd.grad(objective(ahead), rate)
        following, last = optimizer.update(moved, slope(moved), after)
        torch.testing.assert_close(last.lr, state.lr - 1e-3 * expected, rtol=1e-12, atol=1e-15)
        y, state = following, last


@pytest.mark.parametrize("base", BASES, ids=str)
def test_beta_0_is_the_base(base):
    optimizer, plain = OnlineRate(base, lr=0.1, beta=0.0), base.with_lr(0.1)
    y, state = Y, optimizer.init(Y)
    z, other = Y, plain.init(Y)
    for _ in range(5):
        y, state = optimizer.update(y, slope(y), state)
        z, other = plain.update(z, slope(z), other)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-13)


def test_a_rate_too_small_grows_and_training_is_faster():
    def trained(optimizer):
        y, state = Y, optimizer.init(Y)
        for _ in range(50):
            y, state = optimizer.update(y, H * y, state)
        return float((H * y * y).sum()), float(state.lr)

    value, lr = trained(OnlineRate(SGD(None), lr=1e-3, beta=1e-3))
    slow, _ = trained(OnlineRate(SGD(None), lr=1e-3, beta=0.0))
    assert lr > 0.02
    assert value < 0.1 * slow


def test_relative_steps_do_not_depend_on_the_scale():
    rates = []
    for scale in (1e-3, 1.0, 1e3):
        optimizer = OnlineRate(Adam(0.1, eps=0.0), lr=0.01, beta=0.1, relative=True)
        y, state = Y, optimizer.init(Y)
        for _ in range(6):
            y, state = optimizer.update(y, scale * H * y, state)
        rates.append(float(state.lr))
    assert rates[0] == pytest.approx(rates[1], rel=1e-9) == pytest.approx(rates[2], rel=1e-9)
    assert rates[0] > 0.015


def test_the_rate_never_falls_below_zero():
    optimizer = OnlineRate(SGD(None), lr=0.1, beta=100.0)
    y, state = optimizer.update(Y, H * Y, optimizer.init(Y))
    _, state = optimizer.update(y, -H * Y, state)
    assert float(state.lr) == 0.0


def test_it_serves_as_a_lower_optimizer_and_is_differentiated():
    task = bilevel.problems.scalar()
    optimizer = OnlineRate(SGD(None), lr=0.1, beta=1e-2)
    solution = bilevel.solve(task.problem, bilevel.implicit(lower=optimizer), task.x0, task.y0, steps=100)
    assert float(solution.x) == pytest.approx(2.0, abs=1e-2)
    x, y0 = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    found = bilevel.metagradient(task.problem, x, y0, lower=optimizer, steps=9).gradient
    leaf = x.clone().requires_grad_()
    y, state = y0, optimizer.init(y0)
    for _ in range(9):
        y, state = optimizer.update(y, 2.0 * (y - 1.5 * leaf), state)
    (expected,) = torch.autograd.grad(0.5 * (y - 3.0).square(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_its_sensitivity_is_the_base_s_at_its_rate():
    optimizer = OnlineRate(SGD(None), lr=0.1)
    state = optimizer.init(Y)
    torch.testing.assert_close(optimizer.sensitivity(Y, state), torch.full_like(Y, 0.1))
    assert optimizer.scaled(2.0).lr == pytest.approx(0.2)


@pytest.mark.parametrize(
    "make",
    [lambda: OnlineRate(0.1), lambda: OnlineRate(SGD(0.1), lr=0.0), lambda: OnlineRate(SGD(0.1), beta=-1.0),
     lambda: OnlineRate(SGD(0.1), beta=torch.ones(())), lambda: OnlineRate(SGD(0.1), relative=1),
     lambda: OnlineRate(SGD(0.1)).with_lr(lambda x, step: 0.1)],
)  # fmt: skip
def test_options_out_of_range_are_refused(make):
    with pytest.raises(InvalidProblem):
        make()
