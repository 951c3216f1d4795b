"""RCIG: the head is the minimizer, the gradient is the derivative, the clip bounds, rates follow the losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import bilevel
from bilevel.dry_run import open_oracles
from bilevel.problems import Part
from bilevel.problems import distillation as dd
from bilevel.problems.distillation.rates import Rate, adam_on_quadratic
from bilevel.problems.distillation.rcig import clipped, margin
from bilevel.problems.distillation.ridge_head import ridge_head
from bilevel.status import InvalidProblem, NonFinite

EXACT = bilevel.CG(tol=1e-14, max_steps=300)
RATES = (Rate(1e-3), Rate(1e-3))


def stated(data: Part, network: dd.Network, *, temperature: bool = True, ipc: int = 2) -> dd.Distillation:
    task = dd.distillation(
        data, network, ipc=ipc, loss="mse", learn_targets=True, learn_temperature=temperature, batch_size=None
    )
    # Away from equal targets, where the margin has a kink.
    generator = torch.Generator().manual_seed(1)
    task.x0["targets"] += 0.05 * torch.randn(task.x0["targets"].shape, generator=generator, dtype=torch.float64)
    return task


def test_the_ridge_head_minimizes_its_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((5, 7), generator=generator, dtype=torch.float64)
    targets = torch.randn((5, 3), generator=generator, dtype=torch.float64)
    head = (features.T @ ridge_head(features, targets, 0.1)).requires_grad_()
    loss = 0.5 * (targets - features @ head).square().sum() + 0.05 * head.square().sum()
    (gradient,) = torch.autograd.grad(loss, head)
    assert float(gradient.abs().max()) < 1e-12
    with pytest.raises(NonFinite, match="Raise l2"):
        ridge_head(features * float("nan"), targets, 0.1)


def test_the_inner_objective_is_stationary_in_the_head(data: Part, network: dd.Network) -> None:
    # g is stated with the best head; moving that head by hand must not change it to first order.
    task, solver = stated(data, network), dd.RCIG(network, l2=0.1)
    weights = network.start(3, torch.float64)
    inner = solver.linearized_problem(task.problem, weights)
    d = {name: 0.1 * torch.ones_like(w) for name, w in weights.items() if name.startswith("body.")}
    images, targets = task.x0["images"], task.x0["targets"]
    features, along = network.linearized(weights, d, images)
    rest = targets - along @ weights["head.weight"].T
    l2 = 0.1 * len(images)
    head = (features.T @ ridge_head(features, rest, l2)).requires_grad_()
    loss = 0.5 * ((rest - features @ head).square().sum() + l2 * head.square().sum()) / targets.numel()
    assert torch.allclose(loss, inner.lower(task.x0, d, None), rtol=1e-12)
    (gradient,) = torch.autograd.grad(loss, head)
    assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("temperature", [True, False])
def test_the_hypergradient_is_the_derivative(
    data: Part, network: dd.Network, temperature: bool, difference: Callable[..., list[float]]
) -> None:
    task = stated(data, network, temperature=temperature)
    solver = dd.RCIG(network, l2=0.05, linear=EXACT, clip=False)
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0)

    def value(at: torch.Tensor) -> torch.Tensor:
        inner = solver.opened(oracles, y)
        lower = inner.linearize_lower(at, at.new_zeros(inner.y_layout.size))
        d = EXACT.solve(bilevel.linear.Operator(lower.hvp), -lower.gradient).value
        return inner.upper_value(at, d)

    estimate, _ = solver.estimate(oracles, x, y, RATES)
    assert float(estimate.certificate.lower_gradient_norm) < 1e-12
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = float(estimate.gradient @ direction)
    for found in difference(value, x, direction):
        assert found == pytest.approx(exact, rel=1e-6)
    assert float(value(x)) == pytest.approx(float(estimate.upper_value))
    # Without the implicit part it would not be.
    direct = solver.opened(oracles, y).upper_gradient(x, x.new_zeros(y.numel() - CLASS_PART)).x
    assert abs(float(direct @ direction) - exact) > 1e-4 * abs(exact)


CLASS_PART = 3 * 3 * 4 + 3
"""Numbers in the head of the tiny network, which is not part of d."""


def test_the_clip_bounds_the_implicit_part_leaf_by_leaf(data: Part, network: dd.Network) -> None:
    network = replace(network, head_scale=1.0)  # so that the linearized body says much
    task = stated(data, network, ipc=4)
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0)
    free = dd.RCIG(network, l2=1e-7, linear=EXACT, clip=False)
    bound = replace(free, clip=True)
    whole, cut = (solver.estimate(oracles, x, y, RATES)[0].gradient for solver in (free, bound))
    inner = free.opened(oracles, y)
    lower = inner.linearize_lower(x, x.new_zeros(inner.y_layout.size))
    d = EXACT.solve(bilevel.linear.Operator(lower.hvp), -lower.gradient).value
    direct = inner.upper_gradient(x, d).x
    layout = oracles.x_layout
    was_cut = []
    for implicit, kept, limit in zip(*(layout.views(v) for v in (whole - direct, cut - direct, direct)), strict=True):
        assert float(kept.norm()) <= float(limit.norm()) * (1 + 1e-9) + 1e-12
        was_cut.append(float(implicit.norm()) > float(limit.norm()))
        factor = min(1.0, float(limit.norm()) / max(float(implicit.norm()), 1e-300))
        assert torch.allclose(kept, factor * implicit, atol=1e-9)
    assert any(was_cut)


def test_clipped_scales_only_what_is_longer() -> None:
    layout = bilevel.layout.Layout.of({"a": torch.zeros(2), "b": torch.zeros(1)}, name="x")
    found = clipped(layout, torch.tensor([3.0, 4.0, 1.0]), torch.tensor([1.0, 0.0, -2.0]))
    assert torch.allclose(found, torch.tensor([0.6, 0.8, 1.0]))


def test_the_margin_is_capped() -> None:
    targets = torch.tensor([[0.9, 0.0, 0.0], [0.10, 0.05, 0.0]])
    assert float(margin(targets, 3)) == pytest.approx((1 / 6 + 0.05) / 2)
    assert margin(None, 3) == 0.0


def test_adam_descends_a_quadratic_and_says_when_it_rose() -> None:
    h = torch.diag(torch.tensor([1.0, 10.0], dtype=torch.float64))
    b = torch.tensor([1.0, -2.0], dtype=torch.float64)
    slow = adam_on_quadratic(lambda v: h @ v, b, 0.01, 150)
    assert not slow.rose
    assert torch.allclose(slow.product, h @ slow.value)
    assert torch.allclose(slow.value, torch.linalg.solve(h, b), atol=0.1)
    assert adam_on_quadratic(lambda v: h @ v, b, 1.0, 20).rose
    assert adam_on_quadratic(lambda v: h @ v * float("inf"), b, 0.1, 3).rose


def test_rates_follow_the_losses() -> None:
    control = dd.RateControl(
        start=1.0, up=2.0, back=0.5, trials=10, every=4, shrink=0.5, often=0.5, grow=3.0, seldom=1.0
    )
    assert control.tuned(lambda lr: lr < 5) == Rate(4.0)  # 1, 2, 4, 8 fails: half of it
    assert replace(control, trials=2).tuned(lambda lr: True) == Rate(4.0)
    assert replace(control, trials=0).tuned(lambda lr: False) == Rate(1.0)

    def after(*rose: bool) -> Rate:
        rate = Rate(1.0)
        for each in rose:
            rate = control.followed(rate, rose=each)
        return rate

    assert after(True, False, True, False) == Rate(0.5)
    assert after(False, False, False, False) == Rate(3.0)
    assert after(True, False, False, False) == Rate(1.0)
    assert after(True, False) == Rate(1.0, 2, 1)


def test_adam_and_conjugate_gradients_agree_in_the_end(data: Part, network: dd.Network) -> None:
    task = stated(data, network)
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0)
    exact, _ = dd.RCIG(network, l2=0.5, linear=EXACT).estimate(oracles, x, y, RATES)
    adam = dd.RCIG(network, l2=0.5, lower_steps=600, linear_steps=600)
    found, rates = adam.estimate(oracles, x, y, (Rate(1e-2), Rate(1e-2)))
    assert torch.allclose(found.gradient, exact.gradient, atol=1e-3 * float(exact.gradient.norm()))
    assert float(found.certificate.residual) < 0.05
    assert found.certificate.status is bilevel.Status.APPROXIMATE
    assert exact.certificate.status is bilevel.Status.CONVERGED
    wild, _ = adam.estimate(oracles, x, y, (Rate(1e-2), Rate(1e300)))
    assert wild.certificate.status is bilevel.Status.NON_FINITE
    assert bool(wild.gradient.isfinite().all())
    assert rates[0].runs == rates[1].runs == 1


def test_steps_are_replayed_and_options_act(data: Part, network: dd.Network) -> None:
    task = stated(data, network)
    base = dd.RCIG(network, lower_steps=3, linear_steps=3, pool=dd.Pool(2, (1, 2), 3), rates=dd.RateControl(trials=3))

    def ends(solver: dd.RCIG, steps: int = 4) -> bilevel.Solution:
        return bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps)

    whole, half = ends(base), ends(base, 2)
    again = bilevel.solve(task.problem, base, task.x0, task.y0, steps=2, resume=half)
    assert torch.equal(whole.state.x, again.state.x)
    assert torch.equal(whole.state.average, again.state.average)
    assert whole.state.rates[0].runs == 4
    for change in (
        {"l2": 0.1}, {"lower_steps": 5}, {"linear_steps": 5}, {"linear": bilevel.CG()}, {"flip": True},
        {"subset": 2}, {"pool": dd.Pool(2, (1, 2), 3, seed=1)}, {"upper": bilevel.Adam(0.1)},
        {"temperature": bilevel.SGD(1.0)}, {"subset": 2, "seed": 1}, {"rates": dd.RateControl(start=0.1, trials=0)},
    ):  # fmt: skip
        other = ends(replace(base, **change))
        assert not torch.equal(whole.state.x, other.state.x), change
    assert torch.equal(ends(replace(base, average=0.0)).state.average, whole.state.x)
    assert dd.RCIG.averaged(whole)["images"].shape == task.x0["images"].shape


def test_outside_the_subset_nothing_moves(data: Part, network: dd.Network) -> None:
    task = stated(data, network)
    oracles, x, y = open_oracles(task.problem, task.x0, task.y0)
    solver = dd.RCIG(network, linear=EXACT, subset=2, clip=False)
    gradient = oracles.x_layout.unflatten(solver.estimate(oracles, x, y, RATES)[0].gradient)
    moving = gradient["images"].flatten(1).norm(dim=1) > 0
    assert int(moving.sum()) == 2
    # The kept part of the gradient is that of the whole set: the others count as constants, they are not left out.
    whole, _ = replace(solver, subset=None).estimate(oracles, x, y, RATES)
    images = oracles.x_layout.unflatten(whole.gradient)["images"]
    assert torch.allclose(gradient["images"][moving], images[moving], rtol=1e-8, atol=1e-12)


def test_bad_options_are_refused(network: dd.Network) -> None:
    linear = dd.mlp(shape=(1, 4, 4), classes=3)
    with pytest.raises(InvalidProblem, match="has no weights"):
        dd.RCIG(linear)
    for change in ({"l2": 0.0}, {"lower_steps": 0}, {"linear_steps": 0}, {"subset": 0}, {"average": 1.0}):
        with pytest.raises(InvalidProblem, match="RCIG"):
            dd.RCIG(network, **change)
    for change in ({"start": 0.0}, {"up": 1.0}, {"back": 1.0}, {"every": 0}, {"often": 2.0}, {"trials": -1}):
        with pytest.raises(InvalidProblem, match="RateControl"):
            dd.RateControl(**change)


def test_a_session_can_be_saved_and_loaded(data: dd.Part, network: dd.Network) -> None:
    task, solver = stated(data, network), dd.RCIG(network, linear=bilevel.CG(), pool=dd.Pool(2, (1, 2), 3))
    sessions = [bilevel.Session(task.problem, solver, task.x0, task.y0) for _ in range(2)]
    for _ in range(2):
        sessions[0].step()
    sessions[1].load_state_dict(sessions[0].state_dict())
    for session in sessions:
        session.step()
    first, second = (session.x for session in sessions)
    assert all(torch.equal(first[name], second[name]) for name in first)
