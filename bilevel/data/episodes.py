"""Tasks of few-shot learning: drawn anew for each upper step, and held while they are adapted to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

from torch import Generator

from bilevel.data._base import Data, DataSource, Device, check_not_empty, checked, moved
from bilevel.data._seeding import mixed
from bilevel.status import InvalidProblem

Draw: TypeAlias = Callable[[Generator], tuple[Data, Data]]
"""Draws tasks: generator -> (support, query), whose tensors have a leading dimension of tasks."""


def episodes(draw: Draw, lower_steps: int) -> tuple[Episodes, Episodes]:
    """Return the support examples of tasks for the lower level, and their query examples for the upper level.

    Upper step u sees the tasks that `draw` draws from a generator seeded by (seed, u); lower steps u T to u T + T - 1
    see the support examples of the same tasks.

    Args:
        draw: generator -> (support, query), each a tensor or nested dicts, lists and tuples of them; every tensor has a
            leading dimension of tasks, as many as `Problem(blocks=...)`. It may draw from this generator only.
        lower_steps: T, the lower steps that the solver takes from each start; it refuses another number.

    Returns:
        Sources for `Problem(lower_data=..., upper_data=...)`, in this order.

    Raises:
        InvalidProblem: `draw` is no function, or lower_steps < 1.

    Example:
        >>> import bilevel, torch
        >>> def draw(generator):  # eight tasks, each to guess a mean of its own from three draws
        ...     mean = torch.randn(8, 1, generator=generator)
        ...     return tuple(mean + 0.1 * torch.randn(8, 3, generator=generator) for _ in range(2))
        >>> support, query = bilevel.episodes(draw, lower_steps=1)
        >>> def loss(x, y, batch):
        ...     return (y - batch).square().mean()
        >>> problem = bilevel.Problem(
        ...     lower=loss, upper=loss, lower_data=support, upper_data=query, blocks=8,
        ...     lower_init=lambda x: x.expand(8))
        >>> solution = bilevel.solve(problem, bilevel.maml(lr=0.25), torch.tensor(2.0), steps=50)
        >>> abs(float(solution.x)) < 1
        True
    """
    if not callable(draw):
        raise InvalidProblem(f"episodes(draw, ...) needs a function of a torch.Generator, got {type(draw).__name__}.")
    if isinstance(lower_steps, bool) or not isinstance(lower_steps, int) or lower_steps < 1:
        raise InvalidProblem(f"episodes(lower_steps=...) must be an int of at least 1, got {lower_steps!r}.")
    last: dict[tuple[int, int], tuple[Data, Data]] = {}
    return Episodes(draw, 0, lower_steps, None, last), Episodes(draw, 1, 1, None, last)


@final
@dataclass(frozen=True, eq=False)
class Episodes(DataSource):
    """One half of the tasks of each upper step; `episodes` makes both.

    Args:
        draw: see `episodes`.
        half: 0 for support examples, 1 for query examples.
        steps: for how many steps each batch is given.
        device: where to put the tensors; left where they are drawn if None.
    """

    draw: Draw
    half: int
    steps: int
    device: Device | None = None
    _last: dict[tuple[int, int], tuple[Data, Data]] = field(default_factory=dict, repr=False)

    @property
    def deterministic(self) -> bool:
        """Whether all steps give the same batch: no."""
        return False

    @property
    def held(self) -> int:
        """For how many steps each batch is given."""
        return self.steps

    def batch(self, step: int, seed: int) -> Any:
        """Return this half of the tasks that a step sees."""
        index = checked(step) // self.steps
        found = self._last.get((seed, index))
        if found is None:
            found = self.draw(Generator().manual_seed(mixed("episode", seed, index)))
            if not isinstance(found, tuple) or len(found) != 2:
                raise InvalidProblem(f"episodes: draw must return (support, query), got {type(found).__name__}.")
            check_not_empty(found)
            found = found if self.device is None else moved(found, self.device)
            self._last.clear()
            self._last[seed, index] = found
        return found[self.half]

    def to(self, device: Device) -> Episodes:
        """Return a source of the same tasks with their tensors on a device."""
        return Episodes(self.draw, self.half, self.steps, device)
