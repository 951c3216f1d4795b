"""Whether a gradient through training is of any use: how linearly the trained weights respond to a step of x."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.data._seeding import mixed
from bilevel.dry_run import open_oracles
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.layout import Variables
from bilevel.problem import Problem
from bilevel.status import InvalidProblem, NotMetasmooth

USEFUL = 0.5
"""Score below which gradients through training tend to mislead."""


@dataclass(frozen=True)
class Metasmoothness:
    """How a training run responds to steps of x.

    Args:
        score: mean of `scores`; 1 where the weights respond linearly, near 0 where steps do not add up at all.
        scores: of each direction, in [-1, 1], `[k]`.
        curvature: `|F(x + 2 h v) - 2 F(x + h v) + F(x)| / h^2` of each direction, `[k]`.
        h: the length of the steps, in units of a direction drawn from N(0, I).
    """

    score: Tensor
    scores: Tensor
    curvature: Tensor
    h: float

    def __str__(self) -> str:
        curvature = float(self.curvature.mean())
        return f"metasmoothness {float(self.score):.2f} at steps of {self.h:g}; curvature of F {curvature:.2g}"


def metasmoothness(
    problem: Problem,
    x: Variables,
    y0: Variables | None = None,
    *,
    h: float = 0.1,
    directions: int = 3,
    seed: int = 0,
    **options: Any,
) -> Metasmoothness:
    """Train at x, x + h v and x + 2 h v, on the same batches, and compare the two responses of the weights.

        d = |y(x + 2 h v) - y(x)|;   S = sum_i d_i / ‖d‖_1 sign(y(x + 2 h v) - y(x + h v))_i sign(y(x + h v) - y(x))_i

    The metagradient is exact however small S is; it then says nothing about steps of length h.

    Args:
        problem: the statement.
        x: upper variables.
        y0: initial weights; `problem.lower_init(x)` at each x if None.
        h: > 0, the length of upper steps to come, in units of x.
        directions: v ~ N(0, I), how many.
        seed: of batches, of randomness inside the objectives, and of the directions.
        options: of `Unrolled`: lower, steps.

    Returns:
        The score with those of each direction, and the curvature of F along them.

    Raises:
        InvalidProblem: an option is out of range.

    Cost:
        `2 directions + 1` training runs; no derivative is taken.

    Notes:
        Below 0.5 a `NotMetasmooth` warning names remedies: smooth activations, average instead of max pooling, smaller
        logits, larger batches, shorter lower steps, `eps_root` in Adam.

    References:
        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML training with metagradient descent", 2025, arXiv
        2503.13751 (definitions 1 and 2).

    Example:
        >>> import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, batch: y.sum(), lower=lambda x, y, batch: (y - x).square().sum())
        >>> smooth = metasmoothness(problem, torch.ones(3), torch.zeros(3), lower=bilevel.SGD(0.1), steps=5)
        >>> float(smooth.score)  # the weights are linear in x
        1.0
    """
    if not h > 0 or directions < 1:
        raise InvalidProblem(f"metasmoothness needs h > 0 and directions >= 1, got {h} and {directions}.")
    estimator = Unrolled(restart=y0 is None, **options)
    oracles, flat_x, flat_y = open_oracles(problem, x, y0, seed=seed, trains=True)
    state = estimator.init(oracles, flat_x, flat_y)

    def trained(at: Tensor) -> tuple[Tensor, Tensor]:
        training, now, _ = estimator.begin(oracles, at, flat_y, state, 0, 0)
        for step in range(estimator.steps):
            now = training.advance(step, now)
        return now.y, oracles.upper_value(at, now.y)

    generator = torch.Generator().manual_seed(mixed("metasmoothness", seed))
    start, value = trained(flat_x)
    scores, curvatures = [], []
    for _ in range(directions):
        v = torch.randn(flat_x.shape, generator=generator, dtype=flat_x.dtype).to(flat_x.device)
        (one, first), (two, second) = trained(flat_x + h * v), trained(flat_x + 2 * h * v)
        moved = (two - start).abs()
        agree = (two - one).sign() * (one - start).sign()
        size = moved.sum()
        scores.append(torch.where(size > 0, (moved * agree).sum() / size.clamp_min(torch.finfo(size.dtype).tiny), 1.0))
        curvatures.append((second - 2 * first + value).abs() / h**2)
    found = torch.stack(scores)
    result = Metasmoothness(found.mean(), found, torch.stack(curvatures), h)
    if not float(result.score) >= USEFUL:
        warnings.warn(
            f"{result}: weights after {estimator.steps} lower steps do not respond linearly to steps of x of this "
            "length, so metagradients, though exact, will mislead. Try smooth activations, average instead of max "
            "pooling, smaller logits, larger batches, shorter lower steps, Adam(eps_root=1e-7), or shorter upper "
            "steps.",
            NotMetasmooth,
            stacklevel=2,
        )
    return result
