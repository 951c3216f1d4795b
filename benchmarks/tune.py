"""A hundred hyperparameters of a network, at equal CPU time: hypergradients, TPE, and values set by hand.

The program is `examples/tune_network.py`, with more time and more seeds; a seed draws the split, the network, the
batches and the augmentation. Each search gets the CPU time (`time.process_time`) that the hypergradients took; the test
digits choose nothing.

    python -m benchmarks.tune --seeds 5 --seconds 40 --json out/tune.json
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bilevel.report import Row, table, write_json

EXAMPLE = Path(__file__).parent.parent / "examples" / "tune_network.py"
SHOWN = ("cpu_seconds", "validation_loss", "test_loss", "test_error")


def example() -> ModuleType:
    """Return the example as a module."""
    spec = importlib.util.spec_from_file_location("tune_network", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spread(rows: Sequence[Row]) -> list[Row]:
    """Return a row a way of choosing: median and range over seeds, and how often it had the least validation loss."""
    best = {seed: min(row["validation_loss"] for row in rows if row["seed"] == seed) for seed in seeds_of(rows)}
    summary = []
    for way in dict.fromkeys(row["chosen by"] for row in rows):
        own = [row for row in rows if row["chosen by"] == way]
        line: Row = {"chosen by": way, "values": own[0]["values"]}
        line["trainings"] = statistics.median(row["trainings"] for row in own)
        for name in SHOWN:
            values = [row[name] for row in own]
            line[name] = f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"
        line["best at"] = f"{sum(row['validation_loss'] == best[row['seed']] for row in own)} of {len(own)} seeds"
        summary.append(line)
    return summary


def seeds_of(rows: Sequence[Row]) -> list[Any]:
    """Return the seeds, in order."""
    return list(dict.fromkeys(row["seed"] for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all seeds and print the spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU time of each search")
    parser.add_argument("--train-steps", type=int, default=300, help="of each training")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    options = parser.parse_args(arguments)
    run = example().run
    rows: list[Row] = []
    for seed in range(options.seeds):
        rows += run(seed, options.seconds, options.train_steps)
        if options.json:
            write_json(options.json, rows)
    print(table(rows), table(spread(rows)), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
