"""Problems that learn weights, masks and magnitudes, against plain training and the usual simple ways.

    python -m benchmarks.problems --json FILE [--problems NAME ...] [--seeds 1 2 3] [--quick]

Everything that a way leaves open (decay, learning rate, price of a column, when to stop) is chosen for each seed on
validation data, for all ways of a problem alike; the test data are looked at once, after that. One row for each
problem, seed and way: problem, seed, way, settings (what was chosen), measure (accuracy; mse for feature selection),
validation, test, seconds (of the CPU, choices included), and what the problem adds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from sklearn.linear_model import Lasso
from torch import Tensor
from torch.nn import functional as F

import bilevel
from benchmarks.classifiers import LOOK, accuracy, held_out, linear, network, parts, scores, sgd
from bilevel import SGD, Adam, Session
from bilevel.problems import Task, augmentation, coreset, feature_selection, long_tail, meta_weight_net
from bilevel.problems._datasets import Part, Split, patients
from bilevel.problems.augmentation import KINDS, STARTS
from bilevel.problems.feature_selection import chosen, held_back, hidden, ridge_weights
from bilevel.report import Row, table, write_json
from bilevel.solvers import Metagradient, implicit, unrolled

NOISE = 40
"""Columns of noise in feature selection."""
REAL = 10
"""Measurements in feature selection."""
PRICES = (0.1, 0.2, 0.5, 1.0)
RIDGE_DECAYS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DECAYS = (0.001, 0.003, 0.01, 0.03)
ALPHAS = (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
CORESET_DECAYS = (0.001, 0.003, 0.01, 0.03, 0.1)
SIZE = 50
"""Digits of a coreset."""
DRAWS = 50
"""Random coresets, and random magnitudes of augmentation."""
LONG = 5
"""Random magnitudes that are judged after as many steps as the final training."""
PLAIN_RATES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
LEARNED_RATES = (0.1, 0.2, 0.4)
STEPS = 1500
"""SGD steps of every network that is judged."""
HAND = (0.1, 0.15, 0.1, 0.1)
"""Magnitudes chosen by hand, in the order of `KINDS`."""


class Clock:
    """CPU seconds since it was made or last read."""

    def __init__(self) -> None:
        self._begin = time.process_time()

    def read(self) -> float:
        """Return the seconds, and begin anew."""
        begin, self._begin = self._begin, time.process_time()
        return self._begin - begin


def feature_selection_ways(seed: int, share: float) -> Iterator[Row]:
    """Compare a learned mask with all columns, the real ones alone, and columns ranked by correlation."""
    clock = Clock()
    split, held = held_back(hidden(patients(seed, torch.float64, "cpu"), NOISE, seed))
    both = Part(*(torch.cat(parts) for parts in zip(split.validation, held, strict=True)))

    def ridge(columns: int) -> Row:
        def error(part: Part, decay: float) -> float:
            weights = ridge_weights(Part(split.train.inputs[:, :columns], split.train.targets), decay)
            return float((part.inputs[:, :columns] @ weights - part.targets).square().mean())

        validation, decay = min((error(both, decay), decay) for decay in RIDGE_DECAYS)
        return {"settings": f"decay {decay}", "validation": validation, "test": error(split.test, decay)}

    for way, columns in (("all columns", REAL + NOISE), ("real columns alone", REAL)):
        kept = {"features": columns, "noise_kept": columns - REAL}
        yield {"way": way, **ridge(columns), **kept, "seconds": clock.read()}
    yield {"way": "lasso", **_lasso(split, both), "seconds": clock.read()}
    correlation = (split.train.inputs.T @ split.train.targets).abs()
    runs = [_refit(correlation, split, both, decay) for decay in RIDGE_DECAYS]
    yield {"way": "by correlation", **_best(runs), "seconds": clock.read()}
    runs = []
    for price in cut(PRICES, share):
        task = feature_selection(seed, noise=NOISE, strength=price)
        x = bilevel.solve(task.problem, implicit(), task.x0, task.y0, steps=scaled(task.steps, share)).best_x
        assert isinstance(x, Tensor)
        for decay in RIDGE_DECAYS:
            row = _refit(x, split, held, decay)
            runs.append(row | {"settings": f"strength {price}, {row['settings']}"})
    yield {"way": "learned", **_best(runs), "seconds": clock.read()}


def _refit(order: Tensor, split: Split, held: Part, decay: float) -> Row:
    said = chosen(order, split, held, decay, REAL)
    kept = {name: said[name] for name in ("features", "noise_kept")}
    return {"settings": f"decay {decay}", "validation": said["held_mse"], "test": said["test_mse"], **kept}


def _lasso(split: Split, held: Part) -> Row:
    runs: list[Row] = []
    for alpha in ALPHAS:
        model = Lasso(alpha, fit_intercept=False).fit(split.train.inputs.numpy(), split.train.targets.numpy())
        y = torch.tensor(model.coef_)
        kept = {"features": int((y != 0).sum()), "noise_kept": int((y[REAL:] != 0).sum())}
        errors = {"validation": _error(held, y), "test": _error(split.test, y)}
        runs.append({"settings": f"alpha {alpha}", **errors, **kept})
    return _best(runs)


def _error(part: Part, y: Tensor) -> float:
    return float((part.inputs @ y - part.targets).square().mean())


def _best(runs: list[Row]) -> Row:
    return min(runs, key=lambda row: float(row["validation"]))


def long_tail_ways(seed: int, share: float) -> Iterator[Row]:
    """Compare learned class weights with none, with inverse frequency, and with training on the balanced digits too."""
    clock, task, test = Clock(), long_tail(seed), held_out()
    train, validation = parts(task)
    counts = train.targets.bincount().float()
    decays = cut(DECAYS, share)

    def row(way: str, part: Part, logs: dict[float, Tensor]) -> Row:
        """Train with each decay and its class weights, `exp` of the logarithms; keep the best decay."""
        runs = [(linear(part, decay, logs[decay].exp()[part.targets]), decay) for decay in decays]
        y, decay = max(runs, key=lambda run: accuracy(scores(run[0], validation), validation))
        rare = Part(test.inputs[test.targets >= 7], test.targets[test.targets >= 7])
        return {
            "way": way, "settings": f"decay {decay}", "validation": accuracy(scores(y, validation), validation),
            "test": accuracy(scores(y, test), test), "rare": accuracy(scores(y, rare), rare), "seconds": clock.read(),
        }  # fmt: skip

    yield row("plain", train, dict.fromkeys(decays, torch.zeros(10)))
    yield row("inverse frequency", train, dict.fromkeys(decays, (counts.sum() / 10 / counts).log()))
    learned = {}
    for decay in decays:
        own = long_tail(seed, decay=decay)
        solution = bilevel.solve(own.problem, implicit(), own.x0, own.y0, steps=scaled(own.steps, share))
        learned[decay] = solution.best_x
    yield row("learned", train, learned)
    yield _pooled(train, validation, test, share) | {"seconds": clock.read()}


def _pooled(train: Part, validation: Part, test: Part, share: float) -> Row:
    """Train without weights on training and validation digits; the decay is chosen by five folds of the latter."""
    folds = [torch.arange(fold, len(validation.targets), 5) for fold in cut(range(5), share)]

    def joined(rows: Tensor) -> Part:
        return Part(*(torch.cat([a, b[rows]]) for a, b in zip(train, validation, strict=True)))

    def folded(decay: float) -> float:
        found = []
        for fold in folds:
            rest = torch.ones(len(validation.targets), dtype=torch.bool)
            rest[fold] = False
            out = Part(validation.inputs[fold], validation.targets[fold])
            found.append(accuracy(scores(linear(joined(rest), decay), out), out))
        return fmean(found)

    found, decay = max((folded(decay), decay) for decay in cut(DECAYS, share))
    y = linear(joined(torch.ones(len(validation.targets), dtype=torch.bool)), decay)
    rare = Part(test.inputs[test.targets >= 7], test.targets[test.targets >= 7])
    return {
        "way": "plain, validation digits too", "settings": f"decay {decay}", "validation": found,
        "test": accuracy(scores(y, test), test), "rare": accuracy(scores(y, rare), rare),
    }  # fmt: skip


def coreset_ways(seed: int, share: float) -> Iterator[Row]:
    """Compare a learned coreset with random ones, balanced ones, the best balanced one, and the whole pool."""
    clock, task, test = Clock(), coreset(seed, size=SIZE), held_out()
    pool, validation = parts(task)
    orders = [torch.randperm(len(pool.targets), generator=_generator(seed, i)) for i in range(scaled(DRAWS, share))]
    balanced = [torch.cat([order[pool.targets[order] == c][: SIZE // 10] for c in range(10)]) for order in orders]

    def trained(rows: Tensor) -> tuple[float, float, float]:
        """Return validation accuracy, decay and test accuracy of training on some digits, the best decay."""
        part = Part(pool.inputs[rows], pool.targets[rows])
        runs = [(linear(part, decay), decay) for decay in cut(CORESET_DECAYS, share)]
        y, decay = max(runs, key=lambda run: accuracy(scores(run[0], validation), validation))
        return accuracy(scores(y, validation), validation), decay, accuracy(scores(y, test), test)

    def mean(way: str, runs: list[tuple[float, float, float]]) -> Row:
        validation, _, test = (fmean(column) for column in zip(*runs, strict=True))
        return {"way": way, "settings": f"mean of {len(runs)}", "validation": validation, "test": test}

    def one(way: str, run: tuple[float, float, float]) -> Row:
        return {"way": way, "settings": f"decay {run[1]}", "validation": run[0], "test": run[2]}

    yield mean("random", [trained(order[:SIZE]) for order in orders]) | {"seconds": clock.read()}
    runs = [trained(rows) for rows in balanced]
    yield mean("random, balanced", runs) | {"seconds": clock.read()}
    yield one(f"best of {len(runs)} balanced", max(runs)) | {"seconds": clock.read()}
    yield one("whole pool", trained(orders[0])) | {"seconds": clock.read()}
    for way, own in (("learned", task), ("learned, strength 0", coreset(seed, size=SIZE, strength=0.0))):
        assert own.solver is not None
        x = bilevel.solve(own.problem, own.solver, own.x0, own.y0, steps=scaled(own.steps, share)).best_x
        assert isinstance(x, Tensor)
        yield one(way, trained(x.topk(SIZE).indices)) | {"seconds": clock.read()}


def meta_weight_net_ways(seed: int, share: float) -> Iterator[Row]:
    """Compare weights by loss with equal weights on the noisy digits, the clean ones, and both together."""
    clock, task, test = Clock(), meta_weight_net(seed), held_out()
    noisy, clean = parts(task)
    own, rest = Part(clean.inputs[:800], clean.targets[:800]), Part(clean.inputs[800:], clean.targets[800:])
    both = Part(*(torch.cat(pair) for pair in zip(noisy, own, strict=True)))
    for way, part, judge in (
        ("plain", noisy, clean), ("800 clean digits alone", own, rest), ("noisy and 800 clean digits", both, rest),
    ):  # fmt: skip
        runs = [(*sgd(task, part, judge, lr, seed, scaled(STEPS, share)), lr) for lr in cut(PLAIN_RATES, share)]
        validation, step, net, lr = max(runs, key=lambda run: run[0])
        found = {
            "settings": f"lr {lr}, step {step}",
            "validation": validation,
            "test": accuracy(net(test.inputs), test),
        }
        yield {"way": way, **found, "seconds": clock.read()}
    looks = [_weighted(task, lr, seed, share) for lr in cut(LEARNED_RATES, share)]
    validation, settings, x, y = max(looks, key=lambda look: look[0])
    said = _judged(task, x, y)
    weights = {name: said[name] for name in ("weight_right", "weight_wrong")}
    found = {"settings": settings, "validation": validation, "test": said["test_accuracy"]}
    yield {"way": "learned", **found, **weights, "seconds": clock.read()}


def _weighted(task: Task, lr: float, seed: int, share: float) -> tuple[float, str, Any, Any]:
    """Learn weights by loss; return the look of best validation accuracy: that, what it is, x and y."""
    solver = unrolled(lower=SGD(lr), lower_steps=5, upper=Adam(0.003))
    session, clean = Session(task.problem, solver, task.x0, task.y0, seed=seed), parts(task)[1]
    best: tuple[float, str, Any, Any] = (-1.0, "", None, None)
    for step in range(5, scaled(STEPS, share) + 1, 5):
        session.step()
        if step % LOOK == 0 or share < 1:  # a quick run is shorter than a look
            found = accuracy(network(session.y)(clean.inputs), clean)
            if found > best[0]:
                best = found, f"lr {lr}, step {step}", session.x, session.y
    return best


def augmentation_ways(seed: int, share: float) -> Iterator[Row]:
    """Compare learned magnitudes with none, the learned ones' start, random ones and some chosen by hand.

    The network that is judged is trained alike for all: `STEPS` steps of the same length, stopped alike.
    """
    clock, task, test = Clock(), augmentation(seed), held_out()
    train, validation = parts(task)

    def row(way: str, x: dict[str, Tensor] | None) -> Row:
        found, step, net = sgd(task, train, validation, 0.2, seed, scaled(STEPS, share), x)
        magnitudes = {kind: 0.0 if x is None else float(x[kind].exp()) for kind in KINDS}
        said = {"validation": found, "test": accuracy(net(test.inputs), test), **magnitudes}
        return {"way": way, "settings": f"step {step}", **said, "seconds": clock.read()}

    yield row("no augmentation", None)
    yield row("start", logarithms(STARTS))
    yield row("by hand", logarithms(HAND))
    assert isinstance(task.solver, Metagradient)
    short, draws = scaled(task.solver.lower_steps, share), []
    for draw in range(scaled(DRAWS, share)):
        x = _drawn(seed, draw)
        net = sgd(task, train, validation, 0.2, seed, short, x, look=short)[2]
        loss = F.cross_entropy(net(validation.inputs).detach(), validation.targets)
        draws.append((float(loss), draw, x))
    yield row(f"best of {len(draws)} random", min(draws, key=lambda d: d[:2])[2])
    runs = [row(f"best of {LONG} random, trained in full", _drawn(seed, draw)) for draw in range(LONG)]
    yield max(runs, key=lambda run: float(run["validation"])) | {"seconds": sum(run["seconds"] for run in runs)}
    solver = Metagradient(lower=SGD(0.2), lower_steps=short, upper=Adam(0.2))
    best = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=scaled(task.steps, share), seed=seed).best_x
    assert isinstance(best, dict)
    yield row("learned", best)


def logarithms(magnitudes: Iterable[float]) -> dict[str, Tensor]:
    """Return x of the augmentation problem."""
    return {kind: torch.tensor(value).log() for kind, value in zip(KINDS, magnitudes, strict=True)}


def scaled(steps: int, share: float) -> int:
    """Return a share of some steps, at least one."""
    return max(1, round(share * steps))


def cut(grid: Sequence[Any], share: float) -> Sequence[Any]:
    """Return the grid; if quick, its first entry."""
    return grid if share == 1 else grid[:1]


def _judged(task: Task, x: Any, y: Any) -> dict[str, Any]:
    assert task.evaluate is not None
    return task.evaluate(x, y)


def _generator(seed: int, draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + draw)


def _drawn(seed: int, draw: int) -> dict[str, Tensor]:
    """Return magnitudes from 0.01 to 0.5, uniform in the logarithm."""
    return logarithms((0.01 * 50 ** torch.rand(len(KINDS), generator=_generator(seed, draw))).tolist())


PROBLEMS: dict[str, Callable[[int, float], Iterator[Row]]] = {
    "feature_selection": feature_selection_ways,
    "long_tail": long_tail_ways,
    "coreset": coreset_ways,
    "meta_weight_net": meta_weight_net_ways,
    "augmentation": augmentation_ways,
}


def rows(problem: str, seed: int, share: float) -> list[Row]:
    """Run all ways of a problem with a seed."""
    measure = "mse" if problem == "feature_selection" else "accuracy"
    fixed = {"problem": problem, "seed": seed, "settings": "", "measure": measure}
    return [fixed | row for row in PROBLEMS[problem](seed, share)]


def means(found: Sequence[Row]) -> list[Row]:
    """Return the means over seeds of each problem and way, with the range of the test figures."""
    numbers = ("validation", "test", "rare", "features", "noise_kept", "weight_right", "weight_wrong", *KINDS)
    summary = []
    for problem, way in dict.fromkeys((row["problem"], row["way"]) for row in found):
        own = [row for row in found if (row["problem"], row["way"]) == (problem, way)]
        row = {"problem": problem, "way": way} | {n: fmean(r[n] for r in own) for n in numbers if n in own[0]}
        summary.append(row | {"least": min(r["test"] for r in own), "most": max(r["test"] for r in own)})
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of splits, starts and batches")
    parser.add_argument("--quick", action="store_true", help="few steps, one seed: shows that it runs")
    options = parser.parse_args(arguments)
    found: list[Row] = []
    for problem in options.problems:
        for seed in options.seeds[:1] if options.quick else options.seeds:
            found += rows(problem, seed, 0.02 if options.quick else 1.0)
            print(table([row for row in found if (row["problem"], row["seed"]) == (problem, seed)]), flush=True)
            if options.json:
                write_json(options.json, found)
    print(table(means(found)))


if __name__ == "__main__":
    main()
