"""The five-minute door: what it tunes, in which forms data may come, what comes back, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import bilevel
from bilevel import (
    SGD,
    Curve,
    DataExhausted,
    InvalidProblem,
    NonFinite,
    PerExample,
    PerInput,
    PerLayer,
    PerParameter,
    PerStep,
    PerUnit,
    Real,
    Tuned,
    Weights,
)
from bilevel.tuning import Loss
from bilevel.tuning.decay import Decay

DECAY = Real(1e-4, 1.0, log=True)
Pair = tuple[Tensor, Tensor]


def draw(n: int, seed: int, features: int = 6) -> Pair:
    """Return points of three classes, the first two features telling them apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    centers = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    inputs = torch.randn(n, features, generator=generator)
    inputs[:, :2] += 0.7 * centers[labels]
    return inputs, labels


TRAIN, VALIDATION, TEST = draw(60, 0), draw(80, 1), draw(200, 2)


def linear(features: int = 6, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(features, outputs)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def tune(
    space: Any, model: nn.Module | None = None, train: Any = TRAIN, validation: Any = VALIDATION, **options: Any
) -> Tuned:
    given: dict[str, Any] = {"steps": 4, "train_steps": 15} | options
    return bilevel.tune(linear() if model is None else model, train, validation, space, **given)


# -- what it tunes ---------------------------------------------------------------------------------------------------


def noise(inputs: Tensor, strength: Any, generator: torch.Generator) -> Tensor:
    noisy: Tensor = inputs + strength * torch.randn(inputs.shape, generator=generator)
    return noisy


ALL: dict[str, Any] = {
    "weight_decay": DECAY, "label_smoothing": Real(0.0, 0.5), "class_weight": Weights(),
    "data_weight": PerExample(Real(0.0, 1.0)), "augment": Real(0.0, 1.0), "lr": Real(0.01, 0.3, log=True),
    "momentum": Real(0.0, 0.9),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_each_hyperparameter_moves_and_helps(name: str) -> None:
    options: dict[str, Any] = {"augment": noise} if name == "augment" else {}
    if name == "momentum":
        options["optimizer"] = SGD(0.05)
    if name != "weight_decay":
        options["weight_decay"] = 1e-2
    tuned = tune({name: ALL[name]}, steps=12, **options)
    assert tuned.status.ok
    assert list(tuned.values) == [name]
    assert tuned.validation["loss"] < tuned.initial
    assert tuned.solution.x[name].ne(0.5).any()


def test_everything_at_once_through_the_training_of_a_network() -> None:
    model = network()
    space = ALL | {
        "weight_decay": PerUnit(DECAY), "lr": Curve(Real(0.01, 0.3, log=True), 3), "momentum": PerStep(Real(0.0, 0.9)),
        "augment": {"first": Real(0.0, 1.0), "second": Real(0.0, 0.5)},
    }  # fmt: skip

    def both(inputs: Tensor, strength: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return noise(noise(inputs, strength["first"], generator), strength["second"], generator)

    tuned = tune(space, model, augment=both, batch_size=20, test=TEST, steps=8)
    assert isinstance(tuned.solver, bilevel.Metagradient)
    assert tuned.validation["loss"] < tuned.initial
    assert tuned.values["lr"].shape == (3,)
    assert tuned.values["momentum"].shape == (15,)
    assert tuned.values["data_weight"].shape == (60,)
    assert float(tuned.values["class_weight"].mean()) == pytest.approx(1.0)
    assert {name: len(value) for name, value in tuned.values["weight_decay"].items()} == {"0": 8, "2": 3}
    assert 0 <= tuned.values["augment.first"] <= 1
    assert tuned.test is not None
    assert set(tuned.test) == {"loss", "error"}
    assert tuned.certificate is not None


@pytest.mark.parametrize(
    ("space", "size", "names"),
    [
        (DECAY, None, None),
        (PerLayer(DECAY), 2, {"0", "2"}),
        (PerLayer(DECAY, layers=("2",)), 1, {"2"}),
        (PerUnit(DECAY), 11, {"0", "2"}),
        (PerInput(DECAY), 6 + 1 + 8 + 1, {"0.weight", "0.bias", "2.weight", "2.bias"}),
        (PerParameter(DECAY), 6 * 8 + 8 + 8 * 3 + 3, {"0.weight", "0.bias", "2.weight", "2.bias"}),
    ],
    ids=["one", "layers", "one layer", "units", "inputs", "entries"],
)
def test_decays_reach_the_entries_they_belong_to(space: Any, size: int | None, names: set[str] | None) -> None:
    parameters = dict(network().named_parameters())
    decay = Decay.of(space, parameters)
    assert decay.size == size
    values = torch.arange(1.0, 1 + (size or 1)) if size else torch.tensor(2.0)
    layout = bilevel.layout.Layout.of({name: value.detach() for name, value in parameters.items()}, name="y")
    (spread,) = bilevel.L2(weight=lambda x: decay.dealt(values)).coefficients(None, layout)
    by_name = layout.unflatten(spread.expand(layout.size))
    if names is None:
        assert float(spread) == 2.0
        return
    assert set(decay.named(values)) == names
    first, last = by_name["0.weight"], by_name["2.weight"]
    if isinstance(space, PerUnit):
        assert first[:, 0].tolist() == by_name["0.bias"].tolist() == list(range(1, 9))
        assert last[:, 5].tolist() == [9.0, 10.0, 11.0]
    elif isinstance(space, PerInput):
        assert first[3].tolist() == list(range(1, 7))
        assert by_name["0.bias"].tolist() == [7.0] * 8
        assert last[0].tolist() == list(range(8, 16))
    elif isinstance(space, PerLayer) and space.layers is not None:
        assert float(first.abs().max()) == 0
        assert last.unique().tolist() == [1.0]
    elif isinstance(space, PerLayer):
        assert (first.unique().tolist(), last.unique().tolist()) == ([1.0], [2.0])
    else:
        assert spread.tolist() == values.tolist()


@pytest.mark.slow
def test_a_linear_model_with_decay_is_solved_implicitly_and_certified() -> None:
    tuned = tune({"weight_decay": PerInput(DECAY)}, steps=40, test=TEST)
    assert isinstance(tuned.solver, bilevel.HypergradientDescent)
    assert tuned.plan is not None
    assert tuned.plan.recommended == "implicit(linear=Dense())"
    assert tuned.certificate is not None
    assert float(tuned.certificate.error_estimate) < 1e-3  # type: ignore[arg-type]
    one = tune({"weight_decay": DECAY}, steps=40)
    assert tuned.validation["loss"] < one.validation["loss"] < one.initial
    with torch.no_grad():
        assert float(F.cross_entropy(tuned.model(VALIDATION[0]), VALIDATION[1])) == pytest.approx(
            tuned.validation["loss"]
        )


def test_the_model_is_what_training_with_the_values_gives() -> None:
    tuned = tune(
        {"weight_decay": DECAY, "lr": Real(0.05, 0.2, log=True), "label_smoothing": Real(0.0, 0.3)}, network(), steps=3
    )
    again, values = network(), tuned.values
    optimizer = torch.optim.SGD(again.parameters(), lr=values["lr"], momentum=0.9, weight_decay=values["weight_decay"])
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(again(TRAIN[0]), TRAIN[1], label_smoothing=values["label_smoothing"]).backward()
        optimizer.step()
    for one, other in zip(tuned.model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_hypergradient_is_that_of_finite_differences() -> None:
    """One float64 step through everything that a space can hold, against differences of whole trainings."""
    from bilevel.tuning import held_out, state, training

    model = network().double()
    like = next(model.parameters())
    examples = training(TRAIN, like, 20, indexed=True)
    space = ALL | {"lr": Curve(Real(0.01, 0.3, log=True), 3), "weight_decay": PerLayer(DECAY)}
    stated = state(
        model, examples, held_out(VALIDATION, like, "validation"), space, Loss(None, 3), augment=noise,
        optimizer=SGD(0.1, momentum=0.9), train_steps=6, weight_decay=0.0,
    )  # fmt: skip
    estimator = bilevel.Unrolled(lower=stated.optimizer, steps=6, restart=True)
    found = bilevel.hypergradient(stated.problem, stated.x0, stated.net.parameters(), estimator=estimator).gradient
    metagradient = torch.cat([found[name].flatten() for name in stated.x0])
    generator = torch.Generator().manual_seed(0)
    along = {name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for name, leaf in stated.x0.items()}
    direction = torch.cat([along[name].flatten() for name in stated.x0])
    for step in (1e-4, 1e-5):
        ends = []
        for sign in (1, -1):
            x = {name: leaf + sign * step * along[name] for name, leaf in stated.x0.items()}
            solution = bilevel.solve(
                stated.problem, bilevel.Metagradient(lower=stated.optimizer, lower_steps=6, upper=SGD(0.0)), x,
                stated.net.parameters(), steps=1,
            )  # fmt: skip
            ends.append(solution.history["upper_value"][0])
        difference = (float(ends[0]) - float(ends[1])) / (2 * step)
        assert difference == pytest.approx(float(metagradient @ direction), rel=1e-5)


def test_the_training_loss_is_that_of_torch(generator: torch.Generator) -> None:
    outputs, targets = torch.randn(9, 4, generator=generator, dtype=torch.float64), torch.arange(9) % 4
    weights = torch.rand(4, generator=generator, dtype=torch.float64)
    smoothing = torch.tensor(0.2, dtype=torch.float64)
    loss = Loss.of(None, outputs, targets, (0, 3))
    torch.testing.assert_close(
        loss.training(outputs, targets, smoothing, weights, None),
        F.cross_entropy(outputs, targets, weights, label_smoothing=0.2), rtol=1e-12, atol=0,
    )  # fmt: skip
    ones = torch.ones(9, dtype=torch.float64)
    torch.testing.assert_close(
        loss.training(outputs, targets, smoothing, None, ones),
        F.cross_entropy(outputs, targets, label_smoothing=0.2), rtol=1e-12, atol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        loss.training(outputs, targets, None, None, 2 * ones), 2 * F.cross_entropy(outputs, targets), rtol=1e-12, atol=0
    )


def test_regression_and_losses_of_ones_own() -> None:
    inputs, _ = TRAIN
    targets, wanted = inputs[:, :1] - inputs[:, 1:2], VALIDATION[0][:, :1] - VALIDATION[0][:, 1:2]
    space = {"weight_decay": DECAY}
    squared = tune(space, linear(6, 1), (inputs, targets), (VALIDATION[0], wanted))
    assert "error" not in squared.validation
    flat = tune(space, linear(6, 1), (inputs, targets.squeeze(1)), (VALIDATION[0], wanted.squeeze(1)))
    assert flat.validation["loss"] == pytest.approx(squared.validation["loss"], rel=1e-4)
    own = tune(space, linear(6, 1), (inputs, targets), (VALIDATION[0], wanted), loss=F.mse_loss)
    assert own.validation["loss"] == pytest.approx(squared.validation["loss"], rel=1e-4)
    huber = tune({"data_weight": PerExample(Real(0.0, 1.0))}, linear(6, 1), (inputs, targets), (VALIDATION[0], wanted),
                 loss=lambda outputs, t: F.huber_loss(outputs, t, reduction="none").squeeze(1))  # fmt: skip
    assert huber.status.ok


# -- forms of data ---------------------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """A data set that is no TensorDataset."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def __len__(self) -> int:
        return len(self.pair[0])

    def __getitem__(self, index: int) -> Any:
        return self.pair[0][index], int(self.pair[1][index])


FORMS: dict[str, Callable[[Pair], Any]] = {
    "tensors": lambda pair: pair,
    "list": list,
    "arrays": lambda pair: (pair[0].double().numpy(), pair[1].numpy().astype(np.int32)),
    "frame": lambda pair: (pd.DataFrame(pair[0].numpy()), pd.Series(pair[1].numpy())),
    "mixed frame": lambda pair: (pd.DataFrame(pair[0].numpy()).astype({0: "object"}), pair[1].tolist()),
    "tensor data set": lambda pair: TensorDataset(*pair),
}


@pytest.mark.parametrize("form", FORMS)
def test_data_in_memory_may_come_in_any_form(form: str) -> None:
    make, space = FORMS[form], {"weight_decay": DECAY, "data_weight": PerExample(Real(0.0, 1.0))}
    plain = tune(space, batch_size=20, steps=2)
    found = tune(space, train=make(TRAIN), validation=make(VALIDATION), test=make(TEST), batch_size=20, steps=2)
    assert found.validation["loss"] == pytest.approx(plain.validation["loss"], rel=1e-5)


@pytest.mark.slow
def test_data_sets_and_loaders_are_read_batch_by_batch() -> None:
    space = {"weight_decay": DECAY}
    loader = DataLoader(Rows(TRAIN), batch_size=20, shuffle=True)
    held = DataLoader(Rows(VALIDATION), batch_size=30)
    random = torch.random.get_rng_state()
    first, second = (tune(space, train=loader, validation=held) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert first.values == second.values
    whole = tune(space, train=loader, validation=VALIDATION)
    assert whole.validation["loss"] == pytest.approx(first.validation["loss"], rel=1e-5)
    weighted = tune({"data_weight": PerExample(Real(0.0, 1.0))}, train=Rows(TRAIN), batch_size=20, weight_decay=0.1)
    assert weighted.values["data_weight"].shape == (60,)
    batches = [(TRAIN[0][:30], TRAIN[1][:30]), (TRAIN[0][30:], TRAIN[1][30:])]
    assert tune(space, train=batches).status.ok


@pytest.mark.slow
def test_the_device_is_that_of_the_model(device: str) -> None:
    model, pair = network().to(device), tuple(part.to(device) for part in TRAIN)
    space = {"weight_decay": PerUnit(DECAY), "augment": Real(0.0, 1.0), "lr": Real(0.01, 0.2, log=True)}

    def jitter(inputs: Tensor, strength: Any, generator: torch.Generator) -> Tensor:
        moved: Tensor = inputs + strength * torch.randn(inputs.shape, generator=generator, device=inputs.device)
        return moved

    for train, batch_size in ((pair, 20), (tuple(part.numpy() for part in TRAIN), None), (Rows(TRAIN), 20)):
        tuned = tune(
            space,
            model,
            train,
            Rows(VALIDATION),
            test=DataLoader(Rows(TEST), 50),
            augment=jitter,
            batch_size=batch_size,
        )
        assert {parameter.device for parameter in tuned.model.parameters()} == {next(model.parameters()).device}
        assert tuned.validation["loss"] <= tuned.initial


# -- what comes back -------------------------------------------------------------------------------------------------


def test_nothing_of_the_users_changes() -> None:
    model, inputs = network().eval(), TRAIN[0].clone()
    before = copy.deepcopy(model.state_dict())
    tuned = tune({"weight_decay": PerLayer(DECAY)}, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert torch.equal(TRAIN[0], inputs)
    assert tuned.model is not model
    assert type(tuned.model) is type(model)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tuned.initial = 0.0  # type: ignore[misc]


def test_text_and_pictures() -> None:
    pytest.importorskip("matplotlib")
    tuned = tune({"weight_decay": PerLayer(DECAY), "label_smoothing": Real(0.0, 0.5)}, network(), test=TEST)
    text = str(tuned)
    assert re.search(r"validation loss [\d.]+ -> [\d.]+, error", text)
    assert "test loss" in text
    assert re.search(r"weight_decay: 0 [\de.-]+, 2 [\de.-]+", text)
    assert tuned.plot_history().get_ylabel() == "validation loss"
    assert len(tuned.plot_values().lines) == 3


@pytest.mark.slow
def test_seeds_repeat_and_differ() -> None:
    space = {"weight_decay": DECAY, "augment": Real(0.0, 1.0)}
    runs = [tune(space, network(), augment=noise, batch_size=20, seed=seed) for seed in (0, 0, 1)]
    assert runs[0].values == runs[1].values
    assert runs[0].values != runs[2].values


@pytest.mark.slow
def test_batch_normalization_and_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    tuned = tune(
        {"weight_decay": PerLayer(DECAY), "lr": Real(0.01, 0.1, log=True)},
        model,
        batch_size=20,
        steps=6,
        train_steps=40,
    )
    assert not tuned.model.training
    norm = tuned.model[1]  # type: ignore[index]
    with torch.no_grad():
        hidden = tuned.model[0](TRAIN[0])  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert tuned.validation["loss"] < 1.0
    assert model[1].num_batches_tracked == 0


def test_a_solver_of_ones_choice_callbacks_and_time() -> None:
    seen: list[int] = []
    tuned = tune(
        {"weight_decay": DECAY}, steps=9, solver=bilevel.implicit(linear=bilevel.CG(max_steps=5)),
        callbacks=[lambda event: seen.append(event.step) or event.step == 2],  # type: ignore[func-returns-value]
    )  # fmt: skip
    assert tuned.plan is None
    assert seen == [1, 2]
    assert tuned.status.name == "STOPPED"
    assert tune({"weight_decay": DECAY}, steps=9, max_seconds=0.0).status.name == "TIME_LIMIT"
    own = bilevel.Metagradient(upper=bilevel.Sign(0.1), schedule=bilevel.Binomial(4))
    learned = tune({"lr": Real(1e-2, 1e-1, log=True)}, network(), solver=own, train_steps=6, steps=2)
    assert isinstance(learned.solver, bilevel.Metagradient)
    assert (learned.solver.lower_steps, learned.solver.schedule) == (6, bilevel.Binomial(4))
    assert learned.values["lr"] != pytest.approx(10**-1.5)
    adam = tune({"lr": Real(1e-3, 1e-1, log=True)}, network(), optimizer=bilevel.Adam(1e-2, eps_root=1e-8))
    assert isinstance(adam.solver.lower, bilevel.Adam)  # type: ignore[attr-defined]
    assert adam.validation["loss"] <= adam.initial


def test_flat_training_losses_are_trained_not_solved() -> None:
    tuned = tune({"label_smoothing": Real(0.0, 0.5)})  # softmax does not see a shift of all outputs
    assert tuned.plan is not None
    assert tuned.plan.facts.flat
    assert isinstance(tuned.solver, bilevel.Metagradient)


def test_training_that_explodes_is_left_behind() -> None:
    inputs, targets = TRAIN[0], TRAIN[0][:, :1]
    space = {"lr": Real(1e-3, 1e3, log=True, initial=1e-2)}
    tuned = tune(
        space, linear(6, 1), (inputs, targets), (VALIDATION[0], VALIDATION[0][:, :1]), steps=8, train_steps=60,
        optimizer=SGD(1e-2), upper=bilevel.Sign(0.35),
    )  # fmt: skip
    assert tuned.validation["loss"] <= tuned.initial
    assert tuned.values["lr"] < 1.0
    assert all(parameter.isfinite().all() for parameter in tuned.model.parameters())


# -- what is refused -------------------------------------------------------------------------------------------------


def dead(inputs: Tensor, strength: Any, generator: torch.Generator) -> Tensor:
    return inputs


def once() -> Iterator[Pair]:
    yield TRAIN


class UsedUp:
    """A loader that gives its batches once."""

    def __init__(self) -> None:
        self.left = [TRAIN]

    def __iter__(self) -> Iterator[Pair]:
        while self.left:
            yield self.left.pop()


HOLE = TRAIN[0].clone()
HOLE[7, 2] = float("nan")
OK: dict[str, Any] = {"weight_decay": DECAY}
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no training examples": (
        lambda: tune(OK, train=(TRAIN[0][:0], TRAIN[1][:0])),
        DataExhausted, "train has no examples"),
    "an empty loader": (lambda: tune(OK, train=[]), DataExhausted, "length 0"),
    "an empty data set": (
        lambda: tune(OK, train=Rows((TRAIN[0][:0], TRAIN[1][:0])), batch_size=1),
        DataExhausted, "no examples"),
    "empty validation": (lambda: tune(OK, validation=[]), DataExhausted, "validation has no examples"),
    "a generator": (lambda: tune(OK, train=once()), InvalidProblem, "iterate again"),
    "a generator to validate": (lambda: tune(OK, validation=once()), InvalidProblem, "only once"),
    "a used-up loader": (lambda: tune(OK, train=UsedUp()), DataExhausted, "no batch"),
    "NaN in inputs": (lambda: tune(OK, train=(HOLE, TRAIN[1])), NonFinite, "row 7"),
    "NaN in a loader": (
        lambda: tune(OK, train=DataLoader(TensorDataset(HOLE, TRAIN[1]), 5)),
        NonFinite, "train: 1 rows"),
    "NaN in validation": (lambda: tune(OK, validation=(HOLE, TRAIN[1])), NonFinite, "validation: 1 rows"),
    "NaN in a frame": (lambda: tune(OK, test=(pd.DataFrame(HOLE.numpy()), TRAIN[1])), NonFinite, "test: 1 rows"),
    "texts": (lambda: tune(OK, train=(np.array([["a"]]), np.array([1]))), InvalidProblem, "train inputs: not numbers"),
    "rows that differ": (lambda: tune(OK, train=(TRAIN[0], TRAIN[1][:9])), InvalidProblem, "one row an example"),
    "three parts": (lambda: tune(OK, train=[(*TRAIN, TRAIN[1])]), InvalidProblem, "got 3 parts"),
    "no data": (lambda: tune(OK, train=None), InvalidProblem, "once or not at all"),
    "a data set without batch size": (lambda: tune(OK, train=Rows(TRAIN)), InvalidProblem, "say batch_size"),
    "batch size of a loader": (lambda: tune(OK, train=[TRAIN], batch_size=5), InvalidProblem, "is that of the loader"),
    "a batch size too large": (lambda: tune(OK, batch_size=61), InvalidProblem, "from 1 to the 60"),
    "labels beyond the outputs": (lambda: tune(OK, train=(TRAIN[0], TRAIN[1] + 1)), InvalidProblem, "run from"),
    "labels below zero": (lambda: tune(OK, train=(TRAIN[0], TRAIN[1] - 1)), InvalidProblem, "run from -1 to 1"),
    "labels of validation": (
        lambda: tune(OK, validation=(TRAIN[0], 9 * TRAIN[1])), InvalidProblem, "run from 0 to 18"),
    "data elsewhere": (
        lambda: tune(OK, train=(TRAIN[0].to("meta"), TRAIN[1])), InvalidProblem, "train is on meta and cpu"),
    "labels of another shape": (
        lambda: tune(OK, train=(TRAIN[0], TRAIN[1][:, None])),
        InvalidProblem, "integer targets"),
    "targets that do not fit": (lambda: tune(OK, train=(TRAIN[0], TRAIN[0])), InvalidProblem, "do not fit targets"),
    "a loss that is no loss": (lambda: tune(OK, loss=lambda outputs, t: 1.0), InvalidProblem, "one number an example"),
    "a loss by name": (lambda: tune(OK, loss="mse"), InvalidProblem, "loss must be a function"),
    "no space": (lambda: tune({}), InvalidProblem, "must name what to tune"),
    "an unknown name": (lambda: tune({"learning_rate": Real(0.0, 1.0)}), InvalidProblem, "Did you mean 'lr'?"),
    "an integer space": (lambda: tune({"lr": range(3)}), InvalidProblem, "Optuna"),
    "choices": (lambda: tune({"weight_decay": [0.1, 0.2]}), InvalidProblem, "Optuna"),
    "a choice of augmentations": (
        lambda: tune({"augment": {"kind": ["flip"]}}, augment=noise),
        InvalidProblem, "Optuna"),
    "a wrong kind": (lambda: tune({"weight_decay": PerStep(DECAY)}), InvalidProblem, "not PerStep"),
    "negative decays": (lambda: tune({"weight_decay": Real(-1.0, 1.0)}), InvalidProblem, "must be >= 0"),
    "smoothing above 1": (lambda: tune({"label_smoothing": Real(0.0, 2.0)}), InvalidProblem, "at most 1"),
    "layers that are none": (
        lambda: tune({"weight_decay": PerLayer(DECAY, ("3",))}, network()),
        InvalidProblem, "touches nothing"),
    "layers without parameters": (
        lambda: tune({"weight_decay": PerLayer(DECAY, ("1",))}, network()),
        InvalidProblem, "touches nothing"),
    "inputs of no matrix": (
        lambda: tune({"weight_decay": PerInput(DECAY)}, nn.BatchNorm1d(6), loss=lambda o, t: o.mean(1)),
        InvalidProblem, "touches nothing"),
    "smoothing of a regression": (
        lambda: tune({"label_smoothing": Real(0.0, 0.1)}, linear(6, 6), (TRAIN[0], TRAIN[0]), (TRAIN[0], TRAIN[0])),
        InvalidProblem, "touches nothing"),
    "class weights of one's own loss": (
        lambda: tune({"class_weight": Weights()}, loss=F.cross_entropy), InvalidProblem, "touches nothing"),
    "weights of examples in a mean": (
        lambda: tune({"data_weight": PerExample(Real(0.0, 1.0))}, loss=F.cross_entropy), InvalidProblem, "no mean"),
    "weights of examples in a loader": (
        lambda: tune({"data_weight": PerExample(Real(0.0, 1.0))}, train=[TRAIN]), InvalidProblem, "not as a loader"),
    "augment without a function": (lambda: tune({"augment": Real(0.0, 1.0)}), InvalidProblem, "pass augment="),
    "augment without a strength": (lambda: tune(OK, augment=noise), InvalidProblem, "no strength"),
    "augment that ignores it": (
        lambda: tune({"augment": Real(0.0, 1.0), **OK}, augment=dead), InvalidProblem, "'augment'"),
    "momentum of Adam": (
        lambda: tune({"momentum": Real(0.0, 1.0)}, optimizer=bilevel.Adam(0.1)),
        InvalidProblem, "take SGD"),
    "frozen": (lambda: tune(OK, linear().requires_grad_(False)), InvalidProblem, "frozen"),
    "no module": (lambda: tune(OK, lambda x: x), InvalidProblem, "torch.nn.Module"),  # type: ignore[arg-type]
    "no steps": (lambda: tune(OK, steps=0), InvalidProblem, "steps must be an int of at least 1"),
    "steps of no training": (lambda: tune(OK, train_steps=1.5), InvalidProblem, "train_steps must be an int"),
    "a negative decay": (lambda: tune(OK, weight_decay=-1.0), InvalidProblem, "weight_decay must be >= 0"),
    "a solver by name": (lambda: tune(OK, solver="implicit"), InvalidProblem, "or 'auto'"),
    "an optimizer of torch": (
        lambda: tune(OK, optimizer=torch.optim.SGD(linear().parameters(), 0.1)), InvalidProblem, "from_torch"),
    "two upper optimizers": (
        lambda: tune(OK, upper=bilevel.Adam(0.1), solver=bilevel.implicit()), InvalidProblem, "belongs to a solver"),
    "a rate that a solver does not see": (
        lambda: tune({"lr": Real(0.01, 0.1)}, solver=bilevel.implicit()), InvalidProblem, "'lr'"),
    "an upper optimizer that is none": (lambda: tune(OK, upper=0.1), InvalidProblem, "upper must be an Optimizer"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_at_the_door(make: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        make()
