"""The values of the schedules are those of torch's schedulers."""

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from bilevel.optimizers import Cosine, Knots, Power, StepDecay
from bilevel.status import InvalidProblem


def torch_rates(make, steps, lr=0.3):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("steps", "end"), [(1, 0.0), (7, 0.0), (50, 0.05)])
def test_cosine_equals_torch(steps, end):
    schedule = Cosine(0.3, end=end, steps=steps)
    expected = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, steps, eta_min=end), steps + 1)
    assert [schedule(None, step) for step in range(steps + 1)] == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_cosine_stays_at_its_end():
    schedule = Cosine(0.3, end=0.1, steps=5)
    assert [schedule(None, step) for step in (5, 6, 10, 1000)] == [0.1] * 4


@pytest.mark.parametrize(("factor", "every"), [(0.1, 3), (0.9, 1), (2.0, 4)])
def test_step_decay_equals_torch(factor, every):
    schedule = StepDecay(0.3, factor, every)
    expected = torch_rates(lambda o: lr_scheduler.StepLR(o, every, gamma=factor), 15)
    assert [schedule(None, step) for step in range(15)] == pytest.approx(expected, rel=1e-12)


def test_schedules_nest():
    schedule = Cosine(StepDecay(1.0, 0.5, 10), end=lambda x, step: x, steps=20)
    assert schedule(0.2, 0) == 1.0
    assert schedule(0.2, 10) == pytest.approx(0.35)
    assert schedule(0.2, 20) == 0.2


def test_power_grows_and_decays_to_its_limit():
    growing, decaying = Power(2.0, 0.5, offset=4.0, limit=4.0), Power(1.0, -1.0, limit=0.3)
    assert [growing(None, step) for step in (0, 5, 12, 13, 1000)] == [2.0, 3.0, 4.0, 4.0, 4.0]
    assert [decaying(None, step) for step in (0, 1, 4)] == [1.0, 0.5, 0.3]
    assert Power(3.0, 2.0)(None, 2) == 27.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "a"}, "start"),
        ({"exponent": float("nan")}, "exponent"),
        ({"offset": 0.0}, "finite number > 0"),
        ({"limit": float("nan")}, "limit"),
    ],
)
def test_power_refuses_bad_options(options, message):
    with pytest.raises(InvalidProblem, match=message):
        Power(**{"start": 1.0, "exponent": 1.0, **options})


def test_knots_interpolate_logarithms_and_stay_at_the_last():
    x = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    schedule = Knots(steps=9)
    expected = np.exp(np.interp(np.minimum(np.arange(12), 8), [0, 4, 8], x.numpy()))
    assert [float(schedule(x, step)) for step in range(12)] == pytest.approx(expected, rel=1e-12)
    plain = Knots(lambda x: x["rates"], steps=9, log=False)
    assert [float(plain({"rates": x}, step)) for step in (0, 2, 4, 100)] == [0.0, 1.0, 2.0, -1.0]


def test_knots_one_for_each_step_and_one_for_all():
    x = torch.tensor([3.0, 1.0, 2.0])
    assert [float(Knots(steps=3, log=False)(x, step)) for step in range(4)] == [3.0, 1.0, 2.0, 2.0]
    assert [float(Knots(steps=3, log=False)(x[:1], step)) for step in range(3)] == [3.0] * 3
    assert float(Knots(steps=1, log=False)(x, 0)) == 3.0


def test_knots_have_the_weights_of_the_interpolation_as_gradient():
    x = torch.tensor([0.5, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    value = Knots(steps=9)(x, 3)
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, value.detach() * torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Knots(torch.ones(3), steps=3),
        lambda: Knots(steps=0),
        lambda: Knots(steps=3, log=1),
        lambda: Knots(steps=3)({"rates": torch.ones(3)}, 0),
        lambda: Knots(steps=3)(torch.ones(2, 2), 0),
    ],
)
def test_what_are_no_knots_is_refused(make):
    with pytest.raises(InvalidProblem, match=r"Knots|steps|log"):
        make()
