"""What the graph of a step keeps alive: not the weights before it, where no operation saved them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SGD, Problem
from bilevel.dry_run import open_oracles
from bilevel.linearization import LARGE, DoubleBackward, leaves_of, sources
from bilevel.training import Cotangent, Training, tensors_of

INPUTS = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
    """A first layer, whose weights no operation saves, and a small second one, whose weights are saved."""
    inside = (INPUTS @ y["first"].T).tanh()
    return (x.exp() * (inside @ y["last"] - 1).square()).mean()


def opened(first: int = 30, **fields: Any) -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = {
        "first": torch.randn(first, 3000, generator=generator, dtype=torch.float64) / 60,
        "last": torch.randn(first, generator=generator, dtype=torch.float64),
    }
    problem = Problem(upper=lambda x, y, b: y["last"].square().sum() + y["first"].sum(), lower=layer, **fields)
    return open_oracles(problem, torch.zeros((), dtype=torch.float64), y, trains=True)


@pytest.mark.parametrize("learned", [False, True])
def test_weights_are_freed_once_the_step_is_made(learned: bool) -> None:
    oracles, x, y = opened()
    assert y.numel() > LARGE
    rate = (lambda x, step: 0.1 * x.exp()) if learned else 0.1
    training = Training(oracles, SGD(rate, 0.9), x)
    state = training.advance(0, training.start(y))
    after, pull = training.linearize(1, state)
    gone = weakref.ref(state.y.untyped_storage())
    del state
    gc.collect()
    assert gone() is None
    a = Cotangent(torch.ones_like(y), tuple(torch.zeros_like(t) for t in tensors_of(after.optimizer)), x * 0, x, x)
    assert bool(pull(a).y.isfinite().all())


def test_a_regularizer_still_finds_them() -> None:
    oracles, x, y = opened(regularizer=bilevel.L2(lambda x: x.exp()))
    training = Training(oracles, SGD(0.1, 0.9), x)
    state = training.start(y)
    _, pull = training.linearize(0, state)
    zero = torch.zeros_like(y)
    a = Cotangent(torch.ones_like(y), (zero,), torch.zeros(1, dtype=torch.float64), x, x)
    expected = torch.autograd.functional.vjp(
        lambda y, x: y - 0.1 * (_slope(oracles, x, y) + x.exp() * y), (y, x[0]), torch.ones_like(y)
    )[1]
    found = pull(a)
    torch.testing.assert_close(found.y, expected[0])
    torch.testing.assert_close(found.x[0], expected[1])


def _slope(oracles: Any, x: Tensor, y: Tensor) -> Tensor:
    nested = oracles.y_layout.nest(oracles.y_layout.views(y))
    (slope,) = torch.autograd.grad(layer(x, nested, None), y, create_graph=True)
    return slope


@pytest.mark.parametrize("first", [3, 30])
def test_products_are_the_same_whether_y_is_held_or_not(first: int) -> None:
    oracles, x, y = opened(first)
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one, other = (
        DoubleBackward(oracles.lower_at(0), oracles.x_layout, oracles.y_layout, x, y, held=held)
        for held in (True, False)
    )
    torch.testing.assert_close(one.gradient, other.gradient, rtol=0, atol=0)
    torch.testing.assert_close(one.hvp(v), other.hvp(v), rtol=0, atol=0)
    torch.testing.assert_close(one.hvps(torch.stack([v, -v]), 2), other.hvps(torch.stack([v, -v]), 2))
    torch.testing.assert_close(one.cross(v)[0], other.cross(v)[0], rtol=0, atol=0)
    (in_y, in_x), (same_y, same_x) = one.both_products(v), other.both_products(v)
    torch.testing.assert_close(in_y, same_y, rtol=0, atol=0)
    torch.testing.assert_close(in_x[0], same_x[0], rtol=0, atol=0)


def test_sources_are_the_leaves() -> None:
    oracles, _, y = opened(3)
    for source, leaf in zip(sources(oracles.y_layout, y), leaves_of(oracles.y_layout, y), strict=True):
        assert torch.equal(source, leaf)
        assert source.requires_grad
        assert not source.is_leaf
