"""How the demo's decay, number of steps and retraining decay were chosen: by held-back validation digits only."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from bilevel.callbacks import Event
from bilevel.demo.methods import retrained, solvers
from bilevel.demo.training import accuracy, hold_back, logits
from bilevel.loop import solve
from bilevel.problems import clean, noisy_digits
from bilevel.problems._datasets import Part
from bilevel.problems.hyper_cleaning import Digits
from bilevel.report import Row

GRID = (0.003, 0.01, 0.02, 0.03)


def select(decays: Sequence[float] = GRID, seeds: Sequence[int] = range(5), steps: int = 40) -> list[Row]:
    """Clean with two thirds of the validation digits, and judge on the third held back.

    The demo takes the decay and the number of steps whose accuracy, averaged over seeds, is highest, and likewise the
    decay of retraining at that decay and number of steps. Only CG is looked at; all solvers then use the same numbers.
    Test digits are the same for every seed, and none of them is looked at.

    Returns:
        Rows with `decay, steps, accuracy, loss` and `retrained DECAY`, means over seeds on held-back digits.
    """
    found: dict[tuple[float, int], list[Row]] = {}
    for decay in decays:
        for seed in seeds:
            digits = noisy_digits(seed)
            fit, held = hold_back(digits.validation)
            task = clean(digits.images, digits.given, *fit, decay=decay)
            watch = _watch(digits, fit, held, decays, partial(_note, found, decay))
            solve(task.problem, solvers()["implicit (CG)"], task.x0, task.y0, steps=steps, callbacks=[watch])
    return [
        {"decay": decay, "steps": step} | {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        for (decay, step), rows in found.items()
    ]


def _note(found: dict[tuple[float, int], list[Row]], decay: float, step: int, row: Row) -> None:
    found.setdefault((decay, step), []).append(row)


def _watch(
    digits: Digits, fit: Part, held: Part, decays: Sequence[float], note: Callable[[int, Row], object]
) -> Callable[[Event], bool]:
    def watch(event: Event) -> bool:
        if event.step % 10 == 0:
            weight, bias = event.y["1.weight"], event.y["1.bias"]
            y = torch.cat([weight.T, bias.unsqueeze(0)])
            loss = F.cross_entropy(logits(y, held.inputs), held.targets)
            row: Row = {"accuracy": accuracy(y, held), "loss": float(loss)}
            for decay in decays:
                again = retrained(digits, fit, event.x, y, decay)
                row[f"retrained {decay}"] = accuracy(again, held)
            note(event.step, row)
        return False

    return watch
