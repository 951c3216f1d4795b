"""A hundred hyperparameters of a network, at equal CPU time: hypergradients, TPE, and values set by hand.

The program is `examples/tune_network.py`, with longer trainings and searches; a seed draws the split, the network, the
batches and the augmentation. Each search gets the CPU time (`time.process_time`) that the hypergradients took; the test
digits choose nothing.

    python -m benchmarks.tune --seeds 5 --seconds 40 --json out/tune.json
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from bilevel.report import Row, table, write_json

EXAMPLE = Path(__file__).parent.parent / "examples" / "tune_network.py"


def example() -> ModuleType:
    """Return the example as a module."""
    spec = importlib.util.spec_from_file_location("tune_network", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all seeds and print each seed and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU time of each search")
    parser.add_argument("--train-steps", type=int, default=300, help="of each training")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    options = parser.parse_args(arguments)
    program = example()
    rows: list[Row] = []
    for seed in range(options.seeds):
        rows += program.run(seed, options.seconds, options.train_steps)
        if options.json:
            write_json(options.json, rows)
    print(table(rows), table(program.summary(rows)), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
