"""sl-BAMM: one step on y, on a multiplier and on x, all with the average of both objectives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel.aggregated import Aggregated
from bilevel.joint import coupling
from bilevel.oracles import Oracles
from bilevel.penalty import moved
from bilevel.smoothness import check_curved, check_lr, curvatures, smoothness
from bilevel.solvers._base import Metrics, Solver, check_nonnegative, check_positive, projected_gradient
from bilevel.status import InvalidProblem

SAFE = 0.8
"""Steps of y and of the multiplier, in units of 1 / curvature; 2 is the limit."""
SLOW = 0.05
"""Steps of x in units of 1 / curvature, where g is not strongly convex."""
FOLLOWED = 1.5
"""Steps of x in units of (rate of y and multiplier) / curvature, where g is; the linear theory's limit is 2."""
FLAT = 1e-3
"""Least curvature of g in units of the largest, below which g does not count as strongly convex."""


@dataclass(frozen=True)
class Powers:
    """Let the steps shrink with mu: the multiplier's as `k^(-tau/2) mu_k^multiplier`, x's as `k^(-3 tau/2) mu_k^x`.

    Args:
        multiplier: >= 0.
        x: >= 0.
        tau: >= 0.
    """

    multiplier: float = 0.0
    x: float = 0.0
    tau: float = 0.0

    def factors(self, k: int, mu: float) -> tuple[float, float]:
        """Return the factors of both steps at step k >= 1; where mu is 0 for good, no power of it is taken."""
        base = mu if mu > 0 else 1.0
        return k ** (-self.tau / 2) * base**self.multiplier, k ** (-1.5 * self.tau) * base**self.x


S1, S2, S3 = Powers(2, 7, 1 / 40), Powers(1, 5, 1 / 40), Powers(0, 3, 1 / 40)
"""The strategies of the authors, with `mu=0.9, decay=0.1`; the third is the one of their experiments."""


class Curvatures(NamedTuple):
    """Curvatures at the point where they were measured.

    Args:
        upper: largest of f in y.
        lower: largest of g in y.
        least: least of g in y.
        x: largest of f in x.
        mixed: largest singular value of d2g/dydx.
    """

    upper: Tensor
    lower: Tensor
    least: Tensor
    x: Tensor
    mixed: Tensor

    @property
    def strong(self) -> Tensor:
        """Whether g counts as strongly convex in y; 0-dim."""
        return self.least > FLAT * self.lower

    def aggregated(self, mu: float) -> Tensor:
        """Return a bound of the curvature of `mu f + (1 - mu) g` in y."""
        return mu * self.upper + (1 - mu) * self.lower

    def upper_lr(self, beta: float | Tensor) -> Tensor:
        """Return a step of x that y and the multiplier, with steps beta, can follow."""
        plain = SLOW / self.descended(self.lower)
        followed = FOLLOWED * beta * self.least / self.descended(torch.where(self.strong, self.least, self.lower))
        return torch.where(self.strong, torch.minimum(plain, followed), plain)

    def descended(self, h: Tensor) -> Tensor:
        """Return a bound of the curvature of f(x, y*(x)) where that of g in y is h in all directions."""
        return (self.x + (self.mixed / h).square() * self.upper).clamp_min(torch.finfo(h.dtype).eps)


class BAMMState(NamedTuple):
    """Where sl-BAMM stands.

    Args:
        x: upper variables `[p]`.
        y: lower variables `[d]` or `[m, d]`.
        multiplier: the paper's v, shaped like y; it tends to the inverse of the aggregated Hessian times df/dy.
        decay: of mu, in this run.
        step: steps made, which is also the index of the next batches.
        curvatures: for the step lengths.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    multiplier: Tensor
    decay: float
    step: int
    curvatures: Curvatures
    metrics: Metrics | None


@final
@dataclass(frozen=True, kw_only=True)
class BAMM(Solver[BAMMState]):
    """Replace g by `psi = mu_k f + (1 - mu_k) g`, whose curvature f provides where g has none, and let mu_k fall.

        y <- y - beta dpsi/dy,   v <- v - eta (psi_yy v - df/dy),   x <- P(x - alpha (df/dx - psi_xy v))

    all from the old point, with `mu_k = mu k^-decay`, k = 1, 2, ... It is for lower objectives that are convex, but
    not strongly, under upper objectives that are strongly convex in y; among several lower minimizers it finds one
    that is best for f. Where g is strongly convex, take `mu=0`: it is unbiased and faster; elsewhere mu = 0 is wrong.

    Args:
        mu: 0 <= mu < 1, weight of f at the first step.
        decay: >= 0, of mu. The answer has a bias of the order of the last mu (none where one y minimizes both). None: 1
            where g is seen to be strongly convex at the start, 1/2 elsewhere: there f must choose y while mu lasts.
        powers: how steps shrink with mu. The default keeps them; S1, S2 and S3 are the authors' strategies.
        lr: > 0, beta, and eta before its powers; None takes 0.8 / (curvature of psi in y), measured.
        upper_lr: > 0, alpha before its powers; None measures how fast x may move for y and the multiplier to follow.
            With a badly conditioned g that is slow, and several steps on y for each of x (another solver) are better.
        upper_factor: > 0, multiplies alpha, measured or not.
        measure_every: measure curvatures again after so many steps; 0 never.

    Cost:
        Per step: 2 gradients of f and one of g, one HVP and one cross product of psi (with `mu=0`: one gradient of f,
        one of g, an HVP and a cross product of g). A measurement: 64 gradients.

    Notes:
        Metrics: `stationarity` is the norm of the conditions of the first order of `min f s.t. dpsi/dy = 0` (with
        `mu=0` of `dg/dy = 0`), x's part projected; `residual` is that of the multiplier, relative to df/dy.
        With a badly conditioned g, one step on y and multiplier for each of x is stable only if x's steps shrink with
        the cube of the condition: from 10 on other solvers are faster.
        With `mu=0` and a singular Hessian the multiplier grows without bound and x stops at a wrong point.
        The authors' `mu=.9, decay=.1` leave `mu = .33` after 20,000 steps; hence the default here.

    References:
        Liu, Liu, Yao, Zeng, Zhang, "Averaged method of multipliers for bi-level optimization without lower-level
        strong convexity", ICML 2023, arXiv 2302.03407.

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.quadratic()
        >>> solution = bilevel.solve(task.problem, BAMM(), task.x0, task.y0, steps=300)
        >>> task.x_error(solution.x) < 1e-2
        True
    """

    needs_hvp: ClassVar[bool] = True

    mu: float = 0.5
    decay: float | None = None
    powers: Powers = Powers()
    lr: float | None = None
    upper_lr: float | None = None
    upper_factor: float = 1.0
    measure_every: int = 500

    def __post_init__(self) -> None:
        if not 0 <= self.mu < 1:
            raise InvalidProblem(f"mu must lie in [0, 1), got {self.mu}.")
        check_nonnegative(decay=self.decay, measure_every=self.measure_every)
        check_positive(lr=self.lr, upper_lr=self.upper_lr, upper_factor=self.upper_factor)

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> BAMMState:
        """Return the state before the first step, with multiplier 0; measures curvatures.

        Raises:
            InvalidProblem: the problem has a part that this solver cannot treat, g has no curvature in y, or `lr` is
                too large for it.
        """
        self.refuse(oracles.problem)
        seen = _curvatures(oracles, x, y, 0)
        check_curved(seen.lower, torch.finfo(y.dtype).eps)
        check_lr("lr", self.lr, torch.maximum(seen.aggregated(self.mu), seen.lower))
        measured = 1.0 if bool(seen.strong) else 0.5
        decay = measured if self.decay is None else self.decay
        return BAMMState(x, y, torch.zeros_like(y), decay, 0, seen, None)

    def step(self, oracles: Oracles, state: BAMMState) -> BAMMState:
        """Return the state after one step of y, multiplier and x, each from the old point."""
        x, y, v, k = state.x, state.y, state.multiplier, state.step
        measure = self.measure_every and k and k % self.measure_every == 0
        seen = _curvatures(oracles, x, y, k) if measure else state.curvatures
        mu = self.mu * (k + 1) ** -state.decay
        beta = SAFE / seen.aggregated(mu) if self.lr is None else self.lr
        alpha = seen.upper_lr(beta) if self.upper_lr is None else self.upper_lr
        for_v, for_x = self.powers.factors(k + 1, mu)

        f = oracles.upper_gradient(x, y, k)
        psi = Aggregated(oracles, x, y, mu, upper_step=k, lower_step=k)
        residual = psi.hvp(v) - f.y
        h = f.x - psi.cross(v)
        metrics = Metrics.unsolved(
            upper_value=f.value,
            lower_value=(psi.value - mu * f.value) / (1 - mu),
            lower_gradient=moved(psi.gradient, f.y, -mu) if mu else psi.gradient,
            residuals=(psi.gradient, residual, projected_gradient(oracles, x, h)),
        )
        return BAMMState(
            x=oracles.project_x(moved(x, h, -self.upper_factor * alpha * for_x)),
            y=moved(y, psi.gradient, -beta),
            multiplier=moved(v, residual, -beta * for_v),
            decay=state.decay,
            step=k + 1,
            curvatures=seen,
            metrics=metrics._replace(
                lower_gradient_norm=metrics.lower_gradient_norm / (1 - mu),
                residual=residual.norm() / f.y.norm().clamp_min(torch.finfo(y.dtype).tiny),
            ),
        )

    def backtracked(self, factor: float) -> BAMM:
        """Return this solver with upper steps `factor` times as long."""
        return replace(self, upper_factor=factor * self.upper_factor)


def _curvatures(oracles: Oracles, x: Tensor, y: Tensor, k: int) -> Curvatures:
    """Measure, by differences of gradients on the batches of step k."""
    tiny = torch.finfo(y.dtype).eps
    least, largest = curvatures(lambda v: oracles.lower_gradient(x, v, k)[1], y)
    return Curvatures(
        upper=smoothness(lambda v: oracles.upper_gradient(x, v, k).y, y).clamp_min(tiny),
        lower=torch.maximum(least.abs(), largest.abs()).clamp_min(tiny),
        least=least,
        x=smoothness(lambda u: oracles.upper_gradient(u, y, k).x, x),
        mixed=coupling(lambda u, v: oracles.lower_gradients(u, v, k)[1:], x, y),
    )
