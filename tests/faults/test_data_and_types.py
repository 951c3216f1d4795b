"""Faults of data, devices and dtypes, and what the dry run costs. One test a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import (
    DataExhausted,
    DataSource,
    InvalidProblem,
    Loader,
    PrecisionWarning,
    Problem,
    Shuffled,
    hypergradient,
)
from bilevel.dry_run import open_oracles


def far(x: Any, y: Tensor, _: Any) -> Tensor:
    return (y - 5).square().sum()


def track(x: Tensor, y: Tensor, _: Any) -> Tensor:
    return 0.5 * (y - x).square().sum()


def fit(x: Tensor, y: Tensor, batch: Any) -> Tensor:
    features, targets = batch
    return (features @ y - targets).square().mean() + (x * y.square()).sum()


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- data --------------------------------------------------------------------------------------------------------------


def test_row_48_empty_loader() -> None:
    with pytest.raises(DataExhausted, match="loader has length 0"):
        Loader([])
    with pytest.raises(DataExhausted, match=r"loader has length 0.*drop_last"):
        Loader(DataLoader(TensorDataset(torch.ones(3)), batch_size=4, drop_last=True))
    with pytest.raises(DataExhausted, match=r"no examples|shape"):
        Shuffled(torch.zeros(0, 2), batch_size=1)


class Nothing:
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_row_48_loader_without_a_length_that_gives_nothing() -> None:
    problem = Problem(upper=far, lower=fit, lower_data=Loader(Nothing()))
    with pytest.raises(DataExhausted, match="the loader gave no batch at all"):
        bilevel.solve(problem, bilevel.implicit(), doubles(2).exp(), doubles(2))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(doubles(4, 2, seed=i), doubles(4, seed=100 + i)) for i in range(count)]


def test_row_49_a_generator_is_refused_at_the_door() -> None:
    with pytest.raises(bilevel.InvalidProblem, match="needs batches it can iterate again"):
        Loader(batch for batch in batches(3))


def test_row_49_a_loader_is_read_again() -> None:
    problem = Problem(upper=far, lower=fit, lower_data=Loader(batches(3)))
    solution = bilevel.solve(problem, bilevel.implicit(lower_steps=5), doubles(2).exp(), doubles(2), steps=4)
    assert solution.status is bilevel.Status.COMPLETED


class RunsOut(DataSource):
    """Gives a few batches, and then what a source of one's own does at its end."""

    def __init__(self, end: Callable[[], Any], count: int) -> None:
        self.end, self.given = end, batches(count)

    @property
    def deterministic(self) -> bool:
        return False

    def batch(self, step: int, seed: int) -> Any:
        return self.given[step] if step < len(self.given) else self.end()


def stop() -> Any:
    return next(iter(()))


def exhausted() -> Any:
    raise DataExhausted("no more")


@pytest.mark.parametrize(
    ("end", "message"), [(stop, "the lower data gave no batch for step 7"), (exhausted, "no more")]
)
def test_row_49_data_that_end_in_the_middle_never_end_as_success(end: Callable[[], Any], message: str) -> None:
    """A bare StopIteration would end a caller's generator as if all were done."""
    problem = Problem(upper=far, lower=fit, lower_data=RunsOut(end, 7))
    with pytest.raises(DataExhausted, match=message):
        bilevel.solve(problem, bilevel.implicit(lower_steps=5), doubles(2).exp(), doubles(2), steps=4)

    def run() -> Iterator[Any]:
        yield bilevel.solve(problem, bilevel.implicit(lower_steps=5), doubles(2).exp(), doubles(2), steps=4)

    with pytest.raises(DataExhausted, match=message):
        list(run())


# -- devices: meta stands for a second one -----------------------------------------------------------------------------


def test_row_53_levels_on_two_devices() -> None:
    with pytest.raises(InvalidProblem, match="x is on cpu and y on meta; put both on one device"):
        hypergradient(Problem(upper=far, lower=track), torch.ones(2), torch.ones(2, device="meta"))


def test_row_53_leaves_on_two_devices() -> None:
    with pytest.raises(InvalidProblem, match="x: 'a' is on cpu but 'b' on meta; use one device"):
        hypergradient(
            Problem(upper=far, lower=track), {"a": torch.ones(2), "b": torch.ones(2, device="meta")}, torch.ones(2)
        )


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_row_53_data_on_another_device_are_listed(level: str) -> None:
    data = bilevel.Full(
        {"features": torch.ones(4, 2, device="meta"), "kept": torch.ones(4), "t": torch.ones(4, device="meta")}
    )

    def loss(x: Tensor, y: Tensor, b: Any) -> Tensor:
        return (b["features"] @ y - b["t"]).square().mean() + (x * y).sum()

    parts: dict[str, Any] = {"upper": far, "lower": track} | {level: loss, f"{level}_data": data}
    listed = r"'features' \(4, 2\) on meta; 't' \(4,\) on meta"
    with pytest.raises(
        InvalidProblem, match=rf"{level} objective mixes devices: x and y are on cpu, but {listed}"
    ) as caught:
        hypergradient(Problem(**parts), torch.ones(2), torch.ones(2))
    assert "kept" not in str(caught.value)


def test_row_53_captured_tensors_on_another_device() -> None:
    stray = torch.ones(3, 2, device="meta")
    problem = Problem(upper=far, lower=lambda x, y, b: track(x, y, b) + (stray @ y).square().sum())
    with pytest.raises(InvalidProblem, match=r"lower objective mixes devices.*captured by the function"):
        hypergradient(problem, torch.ones(2), torch.ones(2))


def test_row_53_data_that_the_objective_moves_itself_are_welcome() -> None:
    data = bilevel.Full(torch.ones(2, device="meta"))
    problem = Problem(
        upper=far, lower=lambda x, y, b: track(x, y, b) + torch.ones_like(b, device="cpu") @ y, lower_data=data
    )
    # The lower Hessian is the identity, and so is the slope of y* = x - 1.
    found = hypergradient(problem, torch.ones(2), torch.zeros(2)).gradient
    torch.testing.assert_close(found, torch.full((2,), -10.0))


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_row_54_levels_of_two_dtypes() -> None:
    with pytest.raises(InvalidProblem, match=r"x is torch.float32 and y is torch.float64; use one dtype"):
        hypergradient(Problem(upper=far, lower=track), torch.ones(2), doubles(2))
    with pytest.raises(InvalidProblem, match=r"x: 'a' is torch.float32 but 'b' is torch.float64"):
        hypergradient(Problem(upper=far, lower=track), {"a": torch.ones(2), "b": doubles(2)}, torch.ones(2))


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_row_54_promotion_warns(level: str) -> None:
    data = bilevel.Full(doubles(2))
    parts: dict[str, Any] = {"upper": far, "lower": track} | {
        level: lambda x, y, b: 0.5 * (y - x - b).square().sum(), f"{level}_data": data
    }  # fmt: skip
    with pytest.warns(PrecisionWarning, match=rf"{level} objective promotes torch.float32 variables to torch.float64"):
        found = hypergradient(Problem(**parts), torch.ones(2), torch.ones(2))
    assert found.gradient.dtype == torch.float32


def test_row_54_dtypes_that_do_not_mix_are_named() -> None:
    problem = Problem(upper=far, lower=fit, lower_data=bilevel.Full((doubles(4, 2), doubles(4))))
    message = r"lower objective mixes dtypes: x and y are torch.float32, but '\[0\]' is torch.float64; '\[1\]' is"
    with pytest.raises(InvalidProblem, match=message):
        hypergradient(problem, torch.ones(2), torch.ones(2))


def test_other_errors_pass_with_a_note() -> None:
    problem = Problem(upper=far, lower=lambda x, y, b: track(x, y @ torch.ones(3), b))
    with pytest.raises(RuntimeError) as caught:
        hypergradient(problem, torch.ones(2), torch.ones(2))
    assert caught.value.__notes__ == [
        "raised by the lower objective in the dry run at step 0, called with x: [(2,)], y: [(2,)], batch: []"
    ]


# -- what the dry run costs --------------------------------------------------------------------------------------------


class Counted:
    """Counts calls of a function, and backward passes through its value."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls, self.backwards = function, 0, 0

    def __call__(self, x: Tensor, y: Tensor, b: Any) -> Tensor:
        self.calls += 1
        y = Passes.apply(y, self)
        return self.function(x, y, b)


class Passes(torch.autograd.Function):
    """The identity, which tells a counter of each backward pass, of first and of second order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, counter: Counted) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.counter = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.counter.backwards += 1
        return g * 1.0, None


@pytest.mark.parametrize(("needs_hvp", "most"), [(True, 12), (False, 2)])
def test_dry_run_costs_about_a_dozen_gradients(needs_hvp: bool, most: int) -> None:
    """Backward passes, HVPs and cross products included; and never more calls than those and one value a level."""
    upper, lower = Counted(far), Counted(lambda x, y, b: track(x, y, b) + (y**4).sum())
    oracles, _, _ = open_oracles(Problem(upper=upper, lower=lower), doubles(3), doubles(3, seed=1), needs_hvp=needs_hvp)
    assert upper.backwards + lower.backwards <= most
    assert upper.calls + lower.calls <= most + 2
    assert oracles.counts == bilevel.Counts()  # and nothing of it is the solver's


def test_dry_run_of_many_flat_leaves_stays_cheap() -> None:
    """Leaves without a slope at the start are examined together first, one by one only if something moved."""
    upper, lower = Counted(far), Counted(lambda x, y, b: track(sum(v.square() for v in x), y, b))
    x = [torch.zeros(3, dtype=torch.float64) for _ in range(200)]
    open_oracles(Problem(upper=upper, lower=lower), x, doubles(3))
    assert upper.calls + lower.calls <= 20
