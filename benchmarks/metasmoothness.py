"""What each remedy does to the metasmoothness of a training run, to its metagradient, and to how well it trains.

    python -m benchmarks.metasmoothness --json FILE [--quick]

A small convolutional network on 500 digits of 8 by 8 pixels; x are the logarithms of the weights of these examples, f
the cross-entropy on 500 others. Each row changes one thing of the row it is compared with (`base`): SGD for most, Adam
for those about `eps_root`. Mean over the seeds of data, start and directions; `spread` is the standard deviation of the
score over seeds.

`gain` says whether the metagradient is of use: after a step of x by `H` against its signs, the decrease of f over the
decrease that the metagradient predicts. 1 is what a linear f would give; below 0 the step makes f larger. `gain_tenth`
is the same after a step of a tenth of that length.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, pstdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel
from bilevel import SGD, Adam, BilevelWarning, Full, Optimizer, Problem, Shuffled
from bilevel.problems.cells import small_split
from bilevel.report import Row, table, write_json

COLUMNS = (
    "remedy",
    "base",
    "score",
    "spread",
    "curvature",
    "gain",
    "gain_tenth",
    "growth",
    "validation_loss",
    "accuracy",
)
H = 0.1
"""Length of the steps of x: a change of each weight by about a tenth."""
DIRECTIONS = 4


@dataclass(frozen=True)
class Setup:
    """A training run.

    Args:
        activation: after each convolution.
        pool: "max" or "average", twice, over 2 by 2 pixels.
        logits: factor of the last logits.
        normalized: batch normalization before each activation.
        width: channels of the first convolution; the second has twice as many.
        batch: examples a step.
        lower: optimizer of the weights.
        steps: of training.
    """

    activation: type[nn.Module] = nn.ReLU
    pool: str = "max"
    logits: float = 1.0
    normalized: bool = False
    width: int = 8
    batch: int = 32
    lower: Optimizer[Any] = SGD(0.1, 0.9)  # noqa: RUF009  # a frozen value
    steps: int = 100

    def net(self) -> nn.Module:
        """Return the network, at random."""
        layers: list[nn.Module] = []
        for come, leave in ((1, self.width), (self.width, 2 * self.width)):
            layers.append(nn.Conv2d(come, leave, 3, padding=1))
            layers += [nn.BatchNorm2d(leave)] if self.normalized else []
            layers += [self.activation(), nn.MaxPool2d(2) if self.pool == "max" else nn.AvgPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * self.width, 10))


PLAIN = Setup()
ADAM = Setup(lower=Adam(3e-3))
REMEDIES: dict[str, tuple[str, Setup]] = {
    "none: SGD, relu, max pooling": ("", PLAIN),
    "tanh": ("SGD", replace(PLAIN, activation=nn.Tanh)),
    "GELU": ("SGD", replace(PLAIN, activation=nn.GELU)),
    "average pooling": ("SGD", replace(PLAIN, pool="average")),
    "logits / 10": ("SGD", replace(PLAIN, logits=0.1)),
    "batch normalization": ("SGD", replace(PLAIN, normalized=True)),
    "4 times as wide": ("SGD", replace(PLAIN, width=32)),
    "4 times the batch": ("SGD", replace(PLAIN, batch=128)),
    "lr / 4": ("SGD", replace(PLAIN, lower=SGD(0.025, 0.9))),
    "tanh, lr / 4": ("SGD", replace(PLAIN, activation=nn.Tanh, lower=SGD(0.025, 0.9))),
    "tanh, 4 times the batch": ("SGD", replace(PLAIN, activation=nn.Tanh, batch=128)),
    "tanh, 4 times as wide": ("SGD", replace(PLAIN, activation=nn.Tanh, width=32)),
    "logits / 10, lr x 10": ("SGD", replace(PLAIN, logits=0.1, lower=SGD(1.0, 0.9))),
    "GELU, average pooling": ("SGD", replace(PLAIN, activation=nn.GELU, pool="average")),
    "GELU, average pooling, lr / 4": (
        "SGD", replace(PLAIN, activation=nn.GELU, pool="average", lower=SGD(0.025, 0.9)),
    ),
    "none: Adam, relu, max pooling": ("", ADAM),
    "eps_root = 1e-8": ("Adam", replace(ADAM, lower=Adam(3e-3, eps_root=1e-8))),
    "eps_root = 1e-6": ("Adam", replace(ADAM, lower=Adam(3e-3, eps_root=1e-6))),
    "eps_root = 1e-4": ("Adam", replace(ADAM, lower=Adam(3e-3, eps_root=1e-4))),
    "Adam, GELU, average pooling": ("Adam", replace(ADAM, activation=nn.GELU, pool="average")),
    "the same, eps_root = 1e-6": (
        "Adam", replace(ADAM, activation=nn.GELU, pool="average", lower=Adam(3e-3, eps_root=1e-6)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A setup with its data and start: what a seed makes of it."""

    problem: Problem
    x0: Tensor
    y0: dict[str, Tensor]
    setup: Setup
    model: Any
    held_out: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, setup: Setup, seed: int) -> Run:
        """Return the run of a seed."""
        split = small_split(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = bilevel.functional(setup.net())

        def losses(y: Any, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(setup.logits * model(y, images), labels, reduction="none")

        problem = Problem(
            upper=lambda x, y, batch: losses(y, *batch).mean(),
            lower=lambda x, y, batch: (x[batch[2]].exp() * losses(y, batch[0], batch[1])).mean(),
            upper_data=Full(tuple(split.validation)),
            lower_data=Shuffled(tuple(split.train), setup.batch, with_index=True),
        )
        held_out = (split.validation.inputs, split.validation.targets)
        return cls(problem, torch.zeros(len(split.train.targets)), model.parameters(), setup, model, held_out)

    def figures(self, seed: int) -> dict[str, float]:
        """Return what is measured of one seed."""
        options: dict[str, Any] = {"lower": self.setup.lower, "steps": self.setup.steps}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)  # that the score is low is what the table is about
            smooth = bilevel.metasmoothness(
                self.problem, self.x0, self.y0, h=H, directions=DIRECTIONS, seed=seed, **options
            )
            at = bilevel.metagradient(self.problem, self.x0, self.y0, **options)
            gain, gain_tenth = (self._gain(at, length, options) for length in (H, H / 10))
        assert at.run is not None
        assert at.certificate.growth is not None
        images, labels = self.held_out
        with torch.no_grad():
            right = (self.model(at.run.y, images).argmax(-1) == labels).double().mean()
        return {
            "score": float(smooth.score), "curvature": float(smooth.curvature.mean()),
            "gain": gain, "gain_tenth": gain_tenth, "growth": float(at.certificate.growth),
            "validation_loss": float(at.run.value), "accuracy": float(right),
        }  # fmt: skip

    def _gain(self, at: bilevel.Hypergradient, length: float, options: dict[str, Any]) -> float:
        """Return the decrease of f over what the metagradient predicts, after a step against its signs."""
        moved = self.x0 - length * at.gradient.sign()
        # Only the value is wanted there, for which one step back is enough.
        after = bilevel.metagradient(self.problem, moved, self.y0, truncate=1, **options)
        assert at.run is not None
        assert after.run is not None
        return float(at.run.value - after.run.value) / (length * float(at.gradient.abs().sum()))


def measure(names: Sequence[str], seeds: Sequence[int], *, steps: int | None = None) -> list[Row]:
    """Return a row for each remedy."""
    rows = []
    for name in names:
        base, setup = REMEDIES[name]
        setup = setup if steps is None else replace(setup, steps=steps)
        seen = [Run.of(setup, seed).figures(seed) for seed in seeds]
        averages = {key: mean(figures[key] for figures in seen) for key in seen[0]}
        spread = pstdev(figures["score"] for figures in seen)
        rows.append({"remedy": name, "base": base, "spread": spread, "seeds": len(seeds), **averages})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="where to write the rows")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: does it run?")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--remedies", nargs="*", choices=list(REMEDIES), help="only these")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = measure(
        options.remedies or list(REMEDIES), range(1 if options.quick else options.seeds),
        steps=5 if options.quick else None,
    )  # fmt: skip
    write_json(options.json, rows)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
