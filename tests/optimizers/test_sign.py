"""Steps by sign, normalized, and on counts."""

from __future__ import annotations

import pytest
import torch

from bilevel.optimizers import Cosine, CountSteps, L1Normalized, Sign
from bilevel.status import InvalidProblem

G = torch.tensor([3.0, -0.5, 0.0, 1e-12], dtype=torch.float64)
Y = torch.ones(4, dtype=torch.float64)


def test_sign_ignores_the_size() -> None:
    optimizer = Sign(0.25)
    y, state = optimizer.update(Y, G, optimizer.init(Y))
    assert y.tolist() == [0.75, 1.25, 1.0, 0.75]
    assert state.step == 1
    assert torch.equal(optimizer.update(Y, 1e6 * G, state)[0], y)
    assert torch.equal(optimizer.scaled(2.0).update(Y, G, state)[0], optimizer.with_lr(0.5).update(Y, G, state)[0])


def test_rates_may_fall() -> None:
    optimizer = Sign(Cosine(1.0, steps=2))
    y, state = optimizer.update(Y, G, optimizer.init(Y))
    assert y[0] == 0.0
    assert optimizer.update(Y, G, state)[0][0] == 0.5


def test_l1_normalized_moves_entries_by_lr_on_average() -> None:
    optimizer = L1Normalized(0.1)
    for factor in (1e-6, 1.0, 1e6):
        y, _ = optimizer.update(Y, factor * G, optimizer.init(Y))
        assert float((y - Y).abs().mean()) == pytest.approx(0.1)
    assert torch.equal(optimizer.update(Y, 0 * G, optimizer.init(Y))[0], Y)
    assert torch.equal(optimizer.scaled(3.0).update(Y, G, optimizer.init(Y))[0], L1Normalized(0.1 * 3.0).update(
        Y, G, optimizer.init(Y))[0])  # fmt: skip


def test_counts_stay_whole_and_in_range() -> None:
    optimizer, c = CountSteps(0.5, largest=2.0), torch.tensor([0.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    state, g = optimizer.init(c), torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    seen = []
    for _ in range(40):
        after, state = optimizer.update(c, g, state)
        seen.append((after != c).double())
        c = after
        assert bool((c == c.round()).all())
        assert bool(((c >= 0) & (c <= 2)).all())
    assert c.tolist() == [0.0, 2.0, 2.0, 0.0]


def test_a_random_share_of_the_counts_may_change() -> None:
    optimizer, c = CountSteps(0.3, seed=5), torch.full((10_000,), 5.0)
    after, state = optimizer.update(c, torch.ones(10_000), optimizer.init(c))
    changed = after != c
    assert 0.27 < float(changed.double().mean()) < 0.33
    assert torch.equal(optimizer.update(c, torch.ones(10_000), optimizer.init(c))[0], after)
    assert not torch.equal(optimizer.update(c, torch.ones(10_000), state)[0], after)
    fewer = optimizer.scaled(0.5).update(c, torch.ones(10_000), optimizer.init(c))[0]
    assert 0.12 < float((fewer != c).double().mean()) < 0.18


def test_greedy_counts_follow_the_largest_gradients() -> None:
    optimizer = CountSteps(lambda x, step: 0.5 if step == 0 else 0.25, greedy=True)
    c = torch.ones(4, dtype=torch.float64)
    c, state = optimizer.update(c, G, optimizer.init(c))
    assert c.tolist() == [0.0, 2.0, 1.0, 1.0]
    assert optimizer.update(c, G, state)[0].tolist() == [0.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "make",
    [lambda: Sign(-1.0), lambda: L1Normalized(float("nan")), lambda: CountSteps(1.5), lambda: CountSteps(seed=-1),
     lambda: CountSteps(0.5).scaled(2.0)],
)  # fmt: skip
def test_options_out_of_range_are_refused(make) -> None:
    with pytest.raises(InvalidProblem):
        make()
