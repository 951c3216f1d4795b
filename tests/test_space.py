"""Search spaces: exact inverses, derivatives, ends of ranges, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Curve, InvalidProblem, PerExample, PerLayer, PerStep, PerUnit, Real, Space, Weights
from bilevel.space import check_space

SPACES: dict[str, Space] = {
    "linear": Real(-2.0, 5.0),
    "log": Real(1e-6, 1e2, log=True),
    "narrow": Real(0.3, 0.3000001),
    "per layer": PerLayer(Real(1e-3, 1.0, log=True)),
    "knots": Curve(Real(0.0, 1.0), 4),
    "weights": Weights(ratio=50.0),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_return_to_themselves(space: Space, dtype: torch.dtype, generator: torch.Generator) -> None:
    value = space.value(torch.rand(20, generator=generator, dtype=dtype))
    coordinate = space.coordinate(value)
    assert coordinate.dtype == dtype
    assert bool(((coordinate >= 0) & (coordinate <= 1)).all())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(space.value(coordinate), value, rtol=100 * eps, atol=0)


@pytest.mark.parametrize("space", [SPACES["linear"], SPACES["log"]], ids=["linear", "log"])
def test_coordinates_return_to_themselves(space: Space, generator: torch.Generator) -> None:
    coordinate = torch.rand(20, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(space.coordinate(space.value(coordinate)), coordinate, rtol=1e-12, atol=1e-14)


def test_coordinates_of_weights_return_up_to_a_shift(generator: torch.Generator) -> None:
    space = Weights(ratio=50.0)
    coordinate = 0.2 + 0.5 * torch.rand(20, generator=generator, dtype=torch.float64)
    shift = space.coordinate(space.value(coordinate)) - coordinate
    torch.testing.assert_close(shift, shift[:1].expand(20), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("step", [1e-4, 1e-6])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_derivatives_are_those_of_finite_differences(space: Space, step: float, generator: torch.Generator) -> None:
    coordinate = (0.1 + 0.8 * torch.rand(6, generator=generator, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(6, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad((weights * space.value(coordinate)).sum(), coordinate)
    moves = step * torch.eye(6, dtype=torch.float64)
    with torch.no_grad():
        differences = torch.stack(
            [(weights * (space.value(coordinate + move) - space.value(coordinate - move))).sum() for move in moves]
        )
    torch.testing.assert_close(differences / (2 * step), found, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("space", [Real(0.1, 0.7), Real(3e-7, 0.3, log=True), Real(-1e-3, 7.0)], ids=str)
def test_ends_are_reached_and_never_passed(space: Real, dtype: torch.dtype) -> None:
    coordinate = torch.linspace(0, 1, 1001, dtype=dtype).requires_grad_()
    traced = space.value(coordinate)
    value = traced.detach()
    assert float(value[0]) == pytest.approx(torch.tensor(space.low, dtype=dtype).item(), rel=1e-6)
    assert float(value[-1]) == pytest.approx(torch.tensor(space.high, dtype=dtype).item(), rel=1e-6)
    low, high = (torch.tensor(end, dtype=dtype) for end in (space.low, space.high))
    assert bool(((value >= low) & (value <= high)).all())
    (slope,) = torch.autograd.grad(traced.sum(), coordinate)
    assert bool((slope > 0).all())  # also at both ends, where a sigmoid would have none


def test_starts() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    assert float(Real(1.0, 3.0).value(Real(1.0, 3.0).start((), like))) == 2.0
    log = Real(1e-4, 1.0, log=True)
    assert float(log.value(log.start((), like))) == pytest.approx(1e-2)
    chosen = PerUnit(Real(1e-4, 1.0, log=True, initial=0.1))
    assert chosen.value(chosen.start((3,), like)).tolist() == pytest.approx([0.1] * 3)
    assert Weights().value(Weights().start((4,), like)).tolist() == [1.0] * 4


def test_weights_have_mean_one_and_a_bounded_ratio(generator: torch.Generator) -> None:
    value = Weights(ratio=7.0).value(torch.rand(30, generator=generator, dtype=torch.float64))
    assert float(value.mean()) == pytest.approx(1.0, rel=1e-12)
    assert float(value.max() / value.min()) <= 7.0
    extreme = Weights(ratio=7.0).value(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert float(extreme[1] / extreme[0]) == pytest.approx(7.0, rel=1e-12)


def test_knots_are_joined_by_lines() -> None:
    space = Curve(Real(0.0, 10.0), 3)
    coordinate = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    found = [float(space.at(coordinate, step, 5)) for step in (0, 1, 2, 3, 4, 9)]
    assert found == pytest.approx([0.0, 5.0, 10.0, 7.5, 5.0, 5.0])
    assert float(space.at(coordinate, 0, 1)) == 0.0


REFUSED: dict[str, tuple[Any, str]] = {
    "wrong order": (lambda: Real(1.0, 0.0), "low must be less than high"),
    "one point": (lambda: Real(1.0, 1.0), "low must be less than high"),
    "no number": (lambda: Real("0", 1.0), "must be a finite number"),  # type: ignore[arg-type]
    "a flag": (lambda: Real(False, True), "must be a finite number"),
    "infinite": (lambda: Real(0.0, float("inf")), "must be a finite number"),
    "NaN": (lambda: Real(float("nan"), 1.0), "must be a finite number"),
    "log from zero": (lambda: Real(0.0, 1.0, log=True), "starts above 0"),
    "start outside": (lambda: Real(0.0, 1.0, initial=2.0), "lies outside"),
    "ratio": (lambda: Weights(ratio=1.0), "must be a finite number > 1"),
    "few knots": (lambda: Curve(Real(0.0, 1.0), 1), "at least 2"),
    "no range": (lambda: PerStep(0.1), "repeats a Real"),  # type: ignore[arg-type]
    "nested": (lambda: PerLayer(PerUnit(Real(0.0, 1.0))), "repeats a Real"),  # type: ignore[arg-type]
    "value outside": (lambda: Real(0.0, 1.0).coordinate(torch.tensor(1.5)), "must lie in [0.0, 1.0]"),
    "value NaN": (lambda: Real(0.0, 1.0).coordinate(torch.tensor(float("nan"))), "must lie in [0.0, 1.0]"),
    "weights of another mean": (lambda: Weights().coordinate(torch.tensor([1.0, 2.0])), "mean 1"),
    "weights too far apart": (lambda: Weights(2.0).coordinate(torch.tensor([0.5, 1.5])), "more than ratio=2"),
}


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_space_is_refused(make: Any, text: str) -> None:
    with pytest.raises(InvalidProblem, match=re.escape(text)):
        make()


ALLOWED: dict[str, tuple[type[Space], ...]] = {"weight_decay": (Real, PerLayer), "lr": (Real,), "momentum": (Real,)}


@pytest.mark.parametrize(
    "entry", [range(3), [16, 32], ("relu", "tanh"), {1, 2}, "adam", 3, True, 0.1, None, (1e-5, 1e-1)], ids=str
)
def test_integers_and_choices_go_to_optuna(entry: Any) -> None:
    with pytest.raises(InvalidProblem, match=r"must be Real, got .*Optuna.*bilevel\.integrations\.optuna"):
        check_space({"lr": entry}, ALLOWED)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("learning_rate", "lr"), ("weight-decay", "weight_decay"), ("momentun", "momentum"), ("L2", "weight_decay")]
)  # fmt: skip
def test_unknown_names_get_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(InvalidProblem, match=f"Did you mean '{meant}'"):
        check_space({name: Real(0.0, 1.0)}, ALLOWED)


@pytest.mark.parametrize("space", [{}, None, Real(0.0, 1.0), [("lr", Real(0.0, 1.0))]], ids=str)
def test_a_space_names_something(space: Any) -> None:
    with pytest.raises(InvalidProblem, match="must name what to tune"):
        check_space(space, ALLOWED)


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(InvalidProblem, match="takes Real, not PerExample"):
        check_space({"lr": PerExample(Real(0.0, 1.0))}, ALLOWED)
    with pytest.raises(InvalidProblem, match="is the class PerLayer"):
        check_space({"weight_decay": PerLayer}, ALLOWED)


def test_allowed_spaces_pass() -> None:
    space = {"weight_decay": PerLayer(Real(0.0, 1.0)), "lr": Real(1e-3, 1.0, log=True)}
    assert check_space(space, ALLOWED) == space
    value: Tensor = space["lr"].value(torch.ones(()))
    assert float(value) == pytest.approx(1.0)
