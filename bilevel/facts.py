"""What holds of a problem at its start, measured: parts of its lower level, second derivatives, curvature, sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.dry_run import open_oracles
from bilevel.layout import Variables
from bilevel.linear._lanczos import random_signs, ritz_range
from bilevel.oracles import Oracles, tensors_in
from bilevel.problem import Problem
from bilevel.second_order import GraphBytes
from bilevel.status import SecondOrderUnsupported, UnusedHyperparameter

LANCZOS = 30
"""Products that look for curvatures, at each of two points."""
FLAT = {torch.float32: 1e-6, torch.float64: 1e-10}
"""Curvatures below this part of the largest are zero as far as rounding lets one see."""


class Facts(NamedTuple):
    """What was measured at the start.

    Args:
        upper: p, entries of x.
        lower: d, entries of y in one block.
        blocks: m, None without blocks.
        batch: examples in a lower batch, None where that cannot be seen.
        every_batch_alike: whether all lower steps see the same batch.
        parts: what the lower level has beside a smooth objective: "lower_set", "constraint", "equality", "kinks".
        second_order: how the lower objective is differentiated twice; None: not at all.
        curvature: least and largest curvature seen, of the lower objective at the start and at a point near it; None
            where it was not looked for, because of `parts` or without second derivatives.
        spread: largest over least declared curvature; 1 without a regularizer.
        only_through_training: what the dry run says of a leaf of x that enters neither objective; None if all do.
        itemsize: bytes of a number.
        graph: bytes that the graph of one lower gradient holds.
    """

    upper: int
    lower: int
    blocks: int | None
    batch: int | None
    every_batch_alike: bool
    parts: tuple[str, ...]
    second_order: str | None
    curvature: tuple[float, float] | None
    spread: float
    only_through_training: str | None
    itemsize: int
    graph: int

    @property
    def bends_down(self) -> bool:
        """Whether the lower objective curves downwards somewhere, so that it is not convex."""
        return self.curvature is not None and self.curvature[0] < -1e-4 * abs(self.curvature[1])

    @property
    def flat(self) -> bool:
        """Whether the lower objective has directions without curvature, so that its solutions may be many."""
        if self.curvature is None or self.bends_down:
            return False
        low, high = self.curvature
        return low <= FLAT[torch.float64 if self.itemsize == 8 else torch.float32] * high


def measured(problem: Problem, x0: Variables, y0: Variables | None, seed: int) -> tuple[Oracles, Tensor, Tensor, Facts]:
    """Open the oracles of a problem at a start, and measure it there; warnings are the caller's to silence."""
    oracles, x, y, only, second = _opened(problem, x0, y0, seed)
    parts = tuple("kinks" if field == "regularizer" else field for field in problem.beyond_smooth)
    lengths = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors_in(oracles.batch("lower", 0))}
    graph, curvature = 0, None
    if second is not None:
        graph = _graph_bytes(oracles, x, y)
        curvature = None if parts else _curvature(oracles, x, y)
    declared = oracles.declared(x).curvature(y)
    spread = 1.0
    if declared is not None and not problem.kinked and float(declared.max()) > 0:
        spread = float(declared.max() / declared.min().clamp_min(1e-30))
    facts = Facts(
        upper=x.numel(), lower=y.shape[-1], blocks=problem.blocks,
        batch=lengths.pop() if len(lengths) == 1 and problem.blocks is None else None,
        every_batch_alike=problem.deterministic_lower, parts=parts, second_order=second, curvature=curvature,
        spread=spread, only_through_training=only, itemsize=y.element_size(), graph=graph,
    )  # fmt: skip
    return oracles, x, y, facts


def _opened(
    problem: Problem, x0: Variables, y0: Variables | None, seed: int
) -> tuple[Oracles, Tensor, Tensor, str | None, str | None]:
    """Open the oracles as far as the problem lets one, and say what it does not let one do."""
    only: str | None = None
    needs_hvp = True
    while True:
        try:
            oracles, x, y = open_oracles(problem, x0, y0, seed=seed, needs_hvp=needs_hvp, trains=only is not None)
        except UnusedHyperparameter as error:
            if only is not None:
                raise
            only = str(error)
        except SecondOrderUnsupported:
            if not needs_hvp:
                raise
            needs_hvp = False
        else:
            return oracles, x, y, only, oracles.way if needs_hvp else None


def _graph_bytes(oracles: Oracles, x: Tensor, y: Tensor) -> int:
    if oracles.way != "double_backward":
        return 0  # function transforms refuse hooks, differences hold no graph
    with GraphBytes() as graph:
        oracles.linearize_lower(x, y)
    return graph.bytes


def _curvature(oracles: Oracles, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the least and the largest curvature that Lanczos steps see at y and at a random point near it."""
    typical = float(y.square().mean().sqrt())
    signs = random_signs(y, 1)
    ends: list[tuple[float, float]] = []
    for point in (y, y + 0.5 * max(typical, 0.1) * signs):
        linearization = oracles.linearize_lower(x, point)
        if not bool(linearization.gradient.isfinite().all()):
            continue  # the user's function need not be defined there
        low, high = ritz_range(linearization.hvp, random_signs(y, 0), LANCZOS)
        if bool(low.isfinite().all() & high.isfinite().all()):
            ends.append((float(low.min()), float(high.max())))
    return min(low for low, _ in ends), max(high for _, high in ends)


def described(facts: Facts) -> str:
    """Return the facts in a few lines."""
    blocks = "" if facts.blocks is None else f" in each of {facts.blocks} blocks"
    batch = "" if facts.batch is None else f" of {facts.batch}"
    lines = [
        f"x: {facts.upper} numbers; y: {facts.lower} numbers{blocks}; lower batches{batch}, "
        + ("the same in every step" if facts.every_batch_alike else "other ones in every step"),
        f"lower level beside its objective: {', '.join(facts.parts) or 'nothing'}",
        f"second derivatives: {facts.second_order or 'none'}"
        + (f"; one graph holds {facts.graph / 2**20:.2g} MiB" if facts.graph else ""),
    ]
    if facts.curvature is not None:
        low, high = facts.curvature
        shape = "not convex" if facts.bends_down else "flat in places" if facts.flat else "convex as far as seen"
        lines.append(f"lower curvature at the start and near it: {low:.3g} to {high:.3g}, {shape}")
    if facts.only_through_training is not None:
        lines.append(f"training: {facts.only_through_training}")
    return "\n".join(lines)
