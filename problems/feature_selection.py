"""Feature selection by relaxation: a mask between 0 and 1 is learned by the hypergradient, then made hard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.data import Full
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.problems._datasets import DIABETES, Part, Split, patients
from bilevel.problems._linear import regression_judge
from bilevel.regularizers import L2
from bilevel.status import InvalidProblem


def feature_selection(
    seed: int = 0, *, noise: int = 40, decay: float = 0.1, strength: float = 0.5, dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Task:  # fmt: skip
    """Find the measurements that tell something about diabetes, hidden among as many columns of noise as you like.

        g = ‖A (s(x) * y) - t‖^2 / 2n + decay ‖y‖^2 / 2,   f = ‖A' (s(x) * y) - t'‖^2 / 2n' + strength mean s(x)

    with `s = sigmoid`, one mask entry for each column, and y*(x) a ridge regression on masked columns. Half of the
    patients train, a quarter tests, and of the last quarter two thirds are the validation data of f. After solving,
    `task.evaluate` takes columns by falling mask, refits a ridge regression (without mask) on the training data for
    each number of them, and keeps the number that does best on the third that is left: a mask may fit the validation
    data of f by heart. Only then does it look at the test data.

    Args:
        seed: of the split and of the noise.
        noise: columns of standard normal numbers beside the 10 measurements.
        decay: > 0, of the weights.
        strength: >= 0, the price of a column.
        dtype: of all numbers.
        device: of all tensors.

    Raises:
        InvalidProblem: an option is out of range.

    Example:
        >>> import bilevel
        >>> task = feature_selection()
        >>> solution = bilevel.solve(task.problem, bilevel.implicit(), task.x0, task.y0, steps=100)
        >>> said = task.evaluate(solution.best_x, solution.best_y)
        >>> said["noise_kept"] <= 4  # of 40
        True
    """
    if noise < 0 or not decay > 0 or not strength >= 0:
        raise InvalidProblem(
            f"noise and strength must be >= 0 and decay > 0, got noise={noise}, strength={strength}, decay={decay}."
        )
    split, held = held_back(hidden(patients(seed, dtype, device), noise, seed))

    def error(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (batch[0] @ (x.sigmoid() * y) - batch[1]).square().mean()

    def solved(x: Tensor) -> Tensor:
        return ridge_weights(replace_inputs(split.train, split.train.inputs * x.sigmoid()), decay)

    problem = Problem(
        upper=lambda x, y, batch: error(x, y, batch) + strength * x.sigmoid().mean(),
        lower=error,
        upper_data=Full(tuple(split.validation)),
        lower_data=Full(tuple(split.train)),
        regularizer=L2(decay),
        lower_solution=solved,
    )

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        return chosen(x, split, held, decay, 10)

    start = torch.zeros(10 + noise, dtype=dtype, device=device)
    return Task("feature-selection", problem, start, start.clone(), steps=100, evaluate=evaluate, source=DIABETES)


def chosen(order: Tensor, split: Split, held: Part, decay: float, real: int) -> dict[str, float]:
    """Take columns by falling `order`, as many as validate best after a refit; return what the test data say of them.

    Args:
        order: `[d]`.
        split: the data.
        held: what the number of columns is chosen by.
        decay: of the refit.
        real: the first so many columns are measurements, the others noise.
    """
    ranked = order.argsort(descending=True)
    best = (float("inf"), ranked[:1])
    for count in range(1, len(ranked) + 1):
        columns = ranked[:count]
        y = ridge_weights(replace_inputs(split.train, split.train.inputs[:, columns]), decay)
        error = float((held.inputs[:, columns] @ y - held.targets).square().mean())
        best = min(best, (error, columns), key=lambda pair: pair[0])
    columns = best[1]
    y = ridge_weights(replace_inputs(split.train, split.train.inputs[:, columns]), decay)
    judge = regression_judge(replace_inputs(split.test, split.test.inputs[:, columns]))
    kept = {"features": float(len(columns)), "noise_kept": float((columns >= real).sum())}
    return {**judge(None, y), **kept, "held_mse": best[0]}


def ridge_weights(part: Part, decay: float) -> Tensor:
    """Return the minimizer of `‖A y - t‖^2 / 2n + decay ‖y‖^2 / 2`."""
    n, d = part.inputs.shape
    system = part.inputs.T @ part.inputs / n + decay * torch.eye(d, dtype=part.inputs.dtype, device=part.inputs.device)
    weights: Tensor = torch.linalg.solve(system, part.inputs.T @ part.targets / n)
    return weights


def held_back(split: Split) -> tuple[Split, Part]:
    """Return the data with two thirds of the validation part, and the third that is left."""
    cut = 2 * len(split.validation.targets) // 3
    inputs, targets = split.validation
    return split._replace(validation=Part(inputs[:cut], targets[:cut])), Part(inputs[cut:], targets[cut:])


def hidden(split: Split, noise: int, seed: int) -> Split:
    """Return the data with columns of noise after the others."""
    generator = torch.Generator().manual_seed(seed + 1)

    def widened(part: Part) -> Part:
        columns = torch.randn(len(part.targets), noise, generator=generator, dtype=torch.float64)
        return replace_inputs(part, torch.cat([part.inputs, columns.to(part.inputs)], 1))

    return Split(*(widened(part) for part in split))


def replace_inputs(part: Part, inputs: Tensor) -> Part:
    """Return the part with other inputs."""
    return part._replace(inputs=inputs)
