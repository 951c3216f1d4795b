"""What every ready problem promises: it opens, it repeats itself, and its judge looks at data of its own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import pytest
import torch

import bilevel
from bilevel import problems
from bilevel.dry_run import open_oracles
from bilevel.layout import named_leaves
from bilevel.problems import Task
from bilevel.problems._datasets import diabetes, shares, standardized

SLOW = {
    "glyphs",
    "hyper_cleaning_mlp", "learning_rates", "data_selection", "robustness_audit", "weight_decays", "augmentation",
}  # fmt: skip
# What implicit differentiation refuses: sets, kinks, constraints, several lower solutions.
OTHER: dict[str, Callable[[], bilevel.Solver]] = {
    "box": bilevel.ProxF2SA, "ineq": bilevel.LVHBA, "lasso1": bilevel.MEHA, "llc": bilevel.LVHBA, "mc": bilevel.BAMM,
    "mci": bilevel.LVHBA, "svm_primal": bilevel.LVHBA, "wl": bilevel.MEHA, "cell_search": bilevel.darts,
    **dict.fromkeys(("lasso", "elastic_net", "sparse_group", "svm"), bilevel.SparseDescent),
}  # fmt: skip
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in problems.ready]
REAL = {
    "ridge": "test_mse", "logistic_regression": "test_accuracy", "hyper_cleaning": "f1",
    "lasso": "test_r2", "elastic_net": "features", "sparse_group": "groups", "svm": "support_vectors",
    "svm_primal": "wrong_labels_found", "feature_selection": "noise_kept", "long_tail": "rare_accuracy",
    "coreset": "weight_of_coreset", "meta_weight_net": "weight_wrong", "augmentation": "shift",
    "glyphs": "interval", "sine": "test_mse", "learning_rates": "test_loss",
    "data_selection": "good", "robustness_audit": "change",
}  # fmt: skip


def factory(name: str) -> Callable[..., Task]:
    made: Callable[..., Task] = getattr(problems, name)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_opens_and_makes_two_steps(name: str) -> None:
    task = factory(name)()
    assert task.name == name.replace("_", "-")
    assert task.source
    before = [leaf.clone() for _, leaf in named_leaves(task.x0)]
    solver = task.solver or OTHER.get(name, bilevel.implicit)()
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=2)
    assert solution.status.ok, solution.message
    assert all(bool((a == b).all()) for a, (_, b) in zip(before, named_leaves(task.x0), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_problem(name: str) -> None:
    seeded = "seed" in inspect.signature(factory(name)).parameters
    one, two, other = (factory(name)(seed=s) if seeded else factory(name)() for s in (0, 0, 1))
    values = []
    for task in (one, two, other):
        oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=False, trains=bool(task.solvers))
        upper, (lower, gradient) = oracles.upper_gradient(x, y), oracles.lower_gradient(x, y)
        values.append(torch.cat([upper.value.view(1), lower.view(1), upper.y.flatten(), gradient.flatten()]))
    assert bool((values[0] == values[1]).all())
    assert not seeded or not bool((values[0] == values[2]).all())


@pytest.mark.parametrize(("name", "key"), REAL.items())
def test_judges_with_the_promised_numbers(name: str, key: str) -> None:
    task = factory(name)()
    assert task.evaluate is not None
    numbers = task.evaluate(task.x0, task.y0)
    assert key in numbers
    assert all(isinstance(value, float) for value in numbers.values())


@pytest.mark.parametrize(("name", "key"), [("ridge", "test_mse"), ("logistic_regression", "test_loss")])
def test_solving_lowers_the_validation_loss(name: str, key: str) -> None:
    task = factory(name)()
    solution = bilevel.solve(task.problem, bilevel.implicit(), task.x0, task.y0, steps=20)
    uppers = solution.history["upper_value"]
    assert uppers[-1] < uppers[0]
    assert task.evaluate is not None
    assert task.evaluate(solution.best_x, solution.best_y)[key] < 1.0


def test_parts_of_a_split_are_disjoint_and_complete() -> None:
    data = diabetes()
    numbered = data._replace(targets=torch.arange(len(data.targets)))
    split = shares(numbered, 0.5, 0.25, seed=0)
    assert [len(part.targets) for part in split] == [221, 111, 110]
    together = torch.cat([part.targets for part in split]).sort().values
    assert bool((together == torch.arange(442)).all())


def test_standardization_uses_the_training_part_only() -> None:
    split = shares(diabetes(), 0.5, 0.25, seed=0)
    train, validation, _ = standardized(split)
    torch.testing.assert_close(train.inputs.mean(0), torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(train.inputs.std(0), torch.ones(10, dtype=torch.float64))
    assert validation.inputs.mean(0).abs().max() > 1e-3
    assert bool((shares(diabetes(), 0.5, 0.25, seed=0).train.inputs == split.train.inputs).all())


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(bilevel.MissingPackage, match=r"scikit-learn.*pip install 'bilevel\[data\]'"):
        problems.ridge()
