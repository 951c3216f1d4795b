"""The demo's command: run, print the table, write JSON and a picture."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from bilevel.demo.methods import baselines, best_row, cleaned, recovered, solvers
from bilevel.demo.picture import draw
from bilevel.demo.selection import select
from bilevel.problems import noisy_digits
from bilevel.problems.hyper_cleaning import Digits
from bilevel.report import table, write_json

COLUMNS = (
    "method", "test_accuracy", "f1", "retrained_accuracy", "seconds", "gradients", "hvps", "upper_value",
    "relative_error", "error_estimate", "residual",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.select:
        _say(table(select()))
        return 0
    begin = time.perf_counter()
    # Products with a matrix of ten columns gain nothing from a second thread (25 s against 27 s), and where other
    # programs share the cores, threads that wait for one another lose minutes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _run(options, begin)
    finally:
        torch.set_num_threads(threads)
    return 0


def _run(options: argparse.Namespace, begin: float) -> None:
    digits = noisy_digits(options.seed)
    _say(introduction(digits))
    rows = baselines(digits)
    more, solutions = cleaned(digits, solvers())
    rows += more
    _say(table(rows, COLUMNS))
    _say(
        f"\nLeast validation loss: {best_row(rows)['method']}. Of the accuracy between 'all' and 'clean only' it "
        f"recovers {recovered(rows):.0%},\nand {recovered(rows, 'retrained_accuracy'):.0%} after training anew on the "
        "digits it keeps and the validation digits."
    )
    if options.json:
        shares = {"replaced": float(digits.replaced.double().mean()), "wrong": float(digits.wrong.double().mean())}
        write_json(options.json, [row | shares | {"seed": options.seed} for row in rows])
    if options.picture:
        draw(options.picture, digits, rows, solutions)
    written = [path for path in (options.json, options.picture) if path]
    _say(f"{time.perf_counter() - begin:.0f} s" + (f"; wrote {' and '.join(written)}" if written else ""))


def introduction(digits: Digits) -> str:
    """Say what is given."""
    replaced, wrong = digits.replaced.double().mean(), digits.wrong.double().mean()
    return (
        f"{len(digits.given)} digits of MNIST to train on: {replaced:.1%} of the labels were replaced by a random one, "
        f"so that {wrong:.1%} are wrong.\n{len(digits.validation.targets)} clean digits to validate on, "
        f"{len(digits.test.targets)} to test on.\n"
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bilevel.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the split and the noise")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--picture", metavar="FILE", help="draw to FILE, for example demo.png")
    parser.add_argument("--select", action="store_true", help="show how decay and steps were chosen (minutes)")
    return parser
