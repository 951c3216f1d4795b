"""What a ready problem is: a statement with starts, a way to judge answers, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bilevel.layout import Variables, named_leaves
from bilevel.problem import Problem
from bilevel.solvers._base import Solver


@dataclass(frozen=True)
class Task:
    """A problem that can be run as it stands.

    Args:
        name: as the command line knows it.
        problem: the statement; `problem.reference` is x* where it is known.
        x0: upper start.
        y0: lower start; None where the problem's `lower_init` gives it.
        steps: upper steps that suffice for the solvers' defaults.
        evaluate: (x, y) -> named numbers on data that no solver has seen (test accuracy and the like).
        source: where the problem or its data come from, with their licence.
        solvers: name -> solver, those that the task is made for, the best one first: where x acts through training
            itself (a rate, a start) it belongs to a lower optimizer. Empty where any solver does that treats all parts
            of the problem.
    """

    name: str
    problem: Problem
    x0: Variables
    y0: Variables | None
    steps: int = 200
    evaluate: Callable[[Variables, Variables], dict[str, Any]] | None = None
    source: str = ""
    solvers: Mapping[str, Solver[Any]] = field(default_factory=dict)

    @property
    def solver(self) -> Solver[Any] | None:
        """The first of `solvers`, None if there are none."""
        return next(iter(self.solvers.values()), None)

    def x_error(self, x: Variables) -> float | None:
        """Return `‖x - x*‖ / max(1, ‖x*‖)`, or None where x* is not known."""
        if self.problem.reference is None:
            return None
        flat, reference = (
            torch.cat([leaf.detach().flatten().double() for _, leaf in named_leaves(v)])
            for v in (x, self.problem.reference)
        )
        return float((flat - reference).norm() / reference.norm().clamp_min(1.0))
