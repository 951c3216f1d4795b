"""The values of the updates are those of torch.optim, for every setting and on every shape."""

import itertools

import pytest
import torch

from bilevel.optimizers import SGD, Adam, AdamW, Cosine, StepDecay

SGD_SETTINGS = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay, "maximize": maximize}
    for momentum, dampening, nesterov, decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.2), (False, True)
    )
    if not nesterov or (momentum > 0 and dampening == 0)
]
ADAM_SETTINGS = [
    {"betas": betas, "eps": eps, "weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize}
    for betas, eps, decay, amsgrad, maximize in itertools.product(
        ((0.9, 0.999), (0.5, 0.7), (0.0, 0.9)), (1e-8, 1e-2), (0.0, 0.2), (False, True), (False, True)
    )
]
PAIRS = [
    *[(SGD, torch.optim.SGD, settings) for settings in SGD_SETTINGS],
    *[(Adam, torch.optim.Adam, settings) for settings in ADAM_SETTINGS],
    *[(AdamW, torch.optim.AdamW, settings) for settings in ADAM_SETTINGS],
]


def gradient_at(y, step):
    """A gradient that changes with the step, and whose first entry is always 0."""
    mask = torch.ones_like(y)
    mask[..., 0] = 0
    return mask * (torch.sin(3 * y) + y + torch.cos(torch.arange(y.shape[-1], dtype=y.dtype) + step))


def start(shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def torch_path(kind, settings, y0, steps=20, lr=0.03, schedule=None):
    parameter = torch.nn.Parameter(y0.clone())
    optimizer = kind([parameter], lr=lr, foreach=False, **settings)
    scheduler = schedule(optimizer) if schedule else None
    path = []
    for step in range(steps):
        parameter.grad = gradient_at(parameter.detach(), step)
        optimizer.step()
        if scheduler:
            scheduler.step()
        path.append(parameter.detach().clone())
    return torch.stack(path)


def our_path(optimizer, y0, steps=20):
    y, state, path = y0, optimizer.init(y0), []
    for step in range(steps):
        y, state = optimizer.update(y, gradient_at(y, step), state)
        path.append(y)
    assert state.step == steps
    return torch.stack(path)


@pytest.mark.parametrize("shape", [(6,), (3, 4)], ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs", "settings"), PAIRS, ids=lambda value: str(getattr(value, "__name__", value))
)
def test_equals_torch(ours, theirs, settings, shape):
    y0 = start(shape)
    torch.testing.assert_close(
        our_path(ours(0.03, **settings), y0), torch_path(theirs, settings, y0), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (Adam, torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
        (AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_equals_torch_in_float32(ours, theirs, settings):
    y0 = start((6,), torch.float32)
    path = our_path(ours(0.03, **settings), y0)
    assert path.dtype == torch.float32
    torch.testing.assert_close(path, torch_path(theirs, settings, y0), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(SGD, torch.optim.SGD), (Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)]
)
def test_defaults_are_those_of_torch(ours, theirs):
    y0 = start((6,))
    torch.testing.assert_close(our_path(ours(0.03), y0), torch_path(theirs, {}, y0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), [(SGD, torch.optim.SGD), (AdamW, torch.optim.AdamW)])
@pytest.mark.parametrize("kind", ["cosine", "step"])
def test_a_schedule_moves_y_as_torchs_scheduler_does(ours, theirs, kind):
    y0 = start((6,))
    if kind == "cosine":
        rate = Cosine(0.03, end=0.002, steps=20)
        expected = torch_path(
            theirs, {}, y0, schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.002)
        )
    else:
        rate = StepDecay(0.03, factor=0.5, every=6)
        expected = torch_path(theirs, {}, y0, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 6, gamma=0.5))
    torch.testing.assert_close(our_path(ours(rate), y0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "optimizer", [SGD(0.1, 0.9, maximize=True), Adam(0.1, maximize=True), AdamW(0.1, maximize=True, weight_decay=0.0)]
)
def test_maximize_climbs(optimizer):
    # A peer library ignores this flag without a word.
    y = start((6,))
    state = optimizer.init(y)
    for _ in range(200):
        y, state = optimizer.update(y, -2 * (y - 1), state)
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=2e-2)


@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.1, 0.9), Adam(0.1), Adam(0.1, amsgrad=True), AdamW(0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_arguments_are_untouched_and_structure_is_kept(optimizer, dtype):
    y, gradient = start((3, 4), dtype), start((3, 4), dtype) + 1
    state = optimizer.init(y)
    y, state = optimizer.update(y, gradient, state)
    before = [tensor.clone() for tensor in (y, gradient, *state[1:])]
    new_y, new_state = optimizer.update(y, gradient, state)
    for tensor, copy in zip((y, gradient, *state[1:]), before, strict=True):
        assert torch.equal(tensor, copy)
    assert type(new_state) is type(state)
    assert new_state.step == 2
    for old, new in zip((y, *state[1:]), (new_y, *new_state[1:]), strict=True):
        assert new.shape == old.shape
        assert new.dtype == dtype


@pytest.mark.parametrize("optimizer", [SGD(0.1, 0.9, weight_decay=0.1), Adam(0.1, weight_decay=0.1), AdamW(0.1)])
def test_rows_are_independent(optimizer):
    y0 = start((3, 4))
    together = our_path(optimizer, y0)
    alone = torch.stack([our_path(optimizer, row) for row in y0], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("optimizer", [SGD(0.03, 0.9, dampening=0.1), Adam(0.03, amsgrad=True), AdamW(0.03)])
def test_two_halves_make_the_whole(optimizer):
    y0 = start((6,))
    y, state = y0, optimizer.init(y0)
    for step in range(10):
        y, state = optimizer.update(y, gradient_at(y, step), state)
    saved_y, saved = y.clone(), type(state)(*[v.clone() if isinstance(v, torch.Tensor) else v for v in state])
    y, state = saved_y, saved
    for step in range(10, 20):
        y, state = optimizer.update(y, gradient_at(y, step), state)
    assert torch.equal(y, our_path(optimizer, y0)[-1])
