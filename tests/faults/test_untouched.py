"""What belongs to the user is theirs: no refused call and no finished call changes it, compared by value."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import bilevel
from bilevel import BilevelError, BilevelWarning, Problem


class Network(nn.Module):
    """Two layers with batch normalization and dropout, a weight-normalized one, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 4),
            nn.BatchNorm1d(4),
            nn.Dropout(0.2),
            nn.Tanh(),
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 1)),
        ).double()
        self.layers[0].bias.requires_grad_(False)

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.layers(batch).squeeze(-1)
        return output


@dataclass
class Belongings:
    """All that one user brings along."""

    module: nn.Module
    array: np.ndarray
    tensor: Tensor
    x0: dict[str, Tensor]
    y0: dict[str, Tensor]
    loader_generator: torch.Generator
    sampler_generator: torch.Generator
    problem: Problem

    def values(self) -> dict[str, Any]:
        """Return copies of everything, random states included."""
        return {
            "module": {name: tensor.clone() for name, tensor in self.module.state_dict().items()},
            "training": [part.training for part in self.module.modules()],
            "requires_grad": [parameter.requires_grad for parameter in self.module.parameters()],
            "attributes": [sorted(vars(part)) for part in self.module.modules()],
            "grads": [None if p.grad is None else p.grad.clone() for p in self.module.parameters()],
            "array": self.array.copy(),
            "tensor": self.tensor.clone(),
            "x0": {name: leaf.detach().clone() for name, leaf in self.x0.items()},
            "y0": {name: leaf.detach().clone() for name, leaf in self.y0.items()},
            "leaf flags": [(leaf.requires_grad, leaf.grad) for leaf in (*self.x0.values(), *self.y0.values())],
            "generators": [self.loader_generator.get_state(), self.sampler_generator.get_state()],
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
            "python": random.getstate(),
            "modes": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def belongings() -> Belongings:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    module = Network()
    module.layers[2].eval()
    next(module.parameters()).grad = torch.full((4, 3), 7.0, dtype=torch.float64)  # stale, and none of our business
    generator = torch.Generator().manual_seed(0)
    array = np.random.default_rng(0).standard_normal((12, 3))
    tensor = torch.randn(12, generator=generator, dtype=torch.float64)
    own, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    dataset = TensorDataset(torch.from_numpy(array), tensor)
    loader = DataLoader(dataset, batch_size=6, sampler=RandomSampler(dataset, generator=other), generator=own)
    net = bilevel.functional(module)
    y0 = net.parameters()
    next(iter(y0.values())).requires_grad_()
    problem = Problem(
        upper=lambda x, y, b: (net(y, b[0]) - b[1]).square().mean(),
        lower=lambda x, y, b: (x["scale"].exp() * (net(y, b[0]) - b[1]).square()).mean(),
        regularizer=bilevel.L2(lambda x: x["decay"].exp()),
        upper_data=bilevel.Full((array, tensor)),
        lower_data=bilevel.Loader(loader),
    )
    x0 = {"scale": torch.zeros((), dtype=torch.float64), "decay": torch.full((), 2.0, dtype=torch.float64)}
    return Belongings(module, array, tensor, x0, y0, own, other, problem)


def raw(mine: Belongings, y: dict[str, Tensor], batch: Any) -> Tensor:
    """Call the user's own module, whose running statistics move."""
    output: Tensor = torch.func.functional_call(mine.module, y, (batch[0],))
    return output


def edits(x: Any, y: Any, b: Any) -> Tensor:
    b[0].mul_(0.5)
    return x["scale"] * b[0].sum()


Change = Callable[[Belongings], dict[str, Any]]
REFUSED: dict[str, Change] = {
    # how the problem differs from one that runs
    "batch norm": lambda mine: {"upper": lambda x, y, b: (raw(mine, y, b) - b[1]).square().mean()},
    "batch norm below": lambda mine: {"lower": lambda x, y, b: (raw(mine, y, b) - b[1]).square().mean()},
    "edits of a batch": lambda mine: {"upper": edits},
    "nan": lambda mine: {"upper": lambda x, y, b: x["scale"].log() + raw(mine, y, b).sum()},
    "python number": lambda mine: {"lower": lambda x, y, b: float(raw(mine, y, b).sum().detach())},
    "error": lambda mine: {"lower": lambda x, y, b: raw(mine, y, b) @ torch.ones(2).double()},
    "unused": lambda mine: {"regularizer": None},
    "own randomness": lambda mine: {
        "upper": lambda x, y, b: x["scale"] + torch.rand((), generator=mine.own_randomness)
    },
    "no second derivative": lambda mine: {
        "hvp": "forward_over_reverse",
        "lower": lambda x, y, b: Once.apply(x["scale"]),
    },
    "constraint": lambda mine: {"constraint": lambda x, y, b: x["scale"]},
}


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


DOORS: dict[str, Callable[[Problem, Belongings], Any]] = {
    "solve": lambda problem, mine: bilevel.solve(problem, bilevel.implicit(), mine.x0, mine.y0, steps=2),
    "session": lambda problem, mine: bilevel.Session(problem, bilevel.implicit(), mine.x0, mine.y0),
    "hypergradient": lambda problem, mine: bilevel.hypergradient(problem, mine.x0, mine.y0),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("how", REFUSED)
def test_a_refused_call_changes_nothing(how: str, door: str) -> None:
    mine = belongings()
    mine.own_randomness = torch.Generator().manual_seed(9)  # type: ignore[attr-defined]
    problem = replace(mine.problem, **REFUSED[how](mine))
    before = mine.values()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        with pytest.raises((BilevelError, RuntimeError)):
            DOORS[door](problem, mine)
    after = mine.values()
    assert [name for name in before if not same(before[name], after[name])] == []


@pytest.mark.parametrize("ending", ["completed", "callback error", "diverged", "nan later"])
def test_a_finished_call_changes_nothing(ending: str) -> None:
    mine = belongings()
    before = mine.values()
    lr = 1e6 if ending == "diverged" else 0.05
    solver = bilevel.HypergradientDescent(
        lower=bilevel.SGD(lr=lr), lower_steps=3, estimator=bilevel.Implicit(truncate=True)
    )
    problem = mine.problem
    if ending == "nan later":
        upper = problem.upper
        problem = replace(problem, upper=lambda x, y, b: upper(x, y, b) + 1e-3 * (0.05 - x["scale"]).log())

    def fail(event: bilevel.Event) -> bool:
        raise KeyError("the user's own")

    def run() -> Any:
        callbacks = [fail] if ending == "callback error" else []
        return bilevel.solve(problem, solver, mine.x0, mine.y0, steps=3, callbacks=callbacks)

    if ending == "callback error":
        with pytest.raises(KeyError, match="the user's own"):
            run()
    elif ending == "nan later":
        with pytest.raises(bilevel.NonFinite):
            run()
    else:
        solution = run()
        assert solution.status.ok is (ending == "completed")
    after = mine.values()
    assert [name for name in before if not same(before[name], after[name])] == []


def test_what_is_returned_shares_no_memory_with_what_was_given() -> None:
    mine = belongings()
    before = mine.values()
    solution = bilevel.solve(mine.problem, bilevel.implicit(lower_steps=2), mine.x0, mine.y0, steps=0)
    one = bilevel.solve(mine.problem, bilevel.implicit(lower_steps=2), mine.x0, mine.y0, steps=2)
    found = bilevel.hypergradient(
        mine.problem, mine.x0, mine.y0, estimator=bilevel.Implicit(truncate=True), certify=False
    )
    kept = copy.deepcopy(one.best_x)
    for variables in (solution.x, solution.y, solution.best_x, one.x, one.y, one.best_y, found.gradient):
        for leaf in variables.values():
            leaf.fill_(99.0)
    after = mine.values()
    assert [name for name in before if not same(before[name], after[name])] == []
    assert same(kept, one.best_x)
