"""What is to be said of a problem before anything is solved: is its hypergradient right, and how well posed is it?"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.check._probe import Verdict
from bilevel.dry_run import open_oracles
from bilevel.hypergradients._base import Certificate, Estimate, Estimator
from bilevel.hypergradients.evaluate import fitting
from bilevel.layout import Variables
from bilevel.lower_level import LowerMinimum, minimize
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.status import BilevelError, Diverged, NonFinite, Status

STEP = 1e-3
"""Length of the longer difference, for x near 1."""
SHORTER = 3.0
"""By how much the other one is shorter."""
ROUNDING = 1e3
"""The longer difference is this many times what rounding puts into it, at least."""
SMALL = 1e-4
"""Of the norm of the hypergradient: an error of the slope that is no error."""
LOOSE = 0.1
"""Relative uncertainty, of the differences or of the hypergradient, beyond which nothing is proved."""


@dataclass(frozen=True)
class ProblemReport:
    """What one check of a problem found.

    Args:
        verdict: of the hypergradient against differences: RIGHT, WRONG or UNDECIDED; MISSING if there is none.
        message: what that rests on, and what to do where it is not RIGHT.
        error: the `BilevelError` that ended the check, None if it went through.
        notes: what the dry run warned of.
        way: how second derivatives of the lower objective are computed.
        lower: how the lower level was solved at x: point, status, norm of what should vanish.
        certificate: of the hypergradient.
        gradient_norm: its norm.
        direct_norm: that of `df/dx`, the part without the lower level.
        slope: of F along a direction, by the hypergradient.
        differences: the same by central differences of F at two step sizes.
        steps: these step sizes.
        repeats: whether a second hypergradient was the same, bit for bit.
    """

    verdict: Verdict
    message: str
    error: BilevelError | None = None
    notes: tuple[str, ...] = ()
    way: str = ""
    lower: LowerMinimum | None = None
    certificate: Certificate | None = None
    gradient_norm: float = float("nan")
    direct_norm: float = float("nan")
    slope: float = float("nan")
    differences: tuple[float, float] = (float("nan"), float("nan"))
    steps: tuple[float, float] = (float("nan"), float("nan"))
    repeats: bool | None = None

    @property
    def ok(self) -> bool:
        """Whether the hypergradient can be used as it stands."""
        return self.verdict is Verdict.RIGHT and bool(self.repeats)

    def __str__(self) -> str:
        lines = [("dry run", "passed" if self.way else "failed")]
        lines += [("warning", note) for note in self.notes]
        if self.way:
            lines.append(("second derivatives", f"by {self.way.replace('_', ' ')}"))
        if self.lower is not None:
            end = self.lower.status.name.lower().replace("_", " ")
            lines.append(("lower level", f"{end}, residual {self.lower.residual:.1e}"))
        if self.certificate is not None:
            lines += self._of_the_hypergradient(self.certificate)
        if self.error is not None:
            lines.append((type(self.error).__name__, str(self.error)))
        lines.append(("verdict", f"{self.verdict.name.lower().replace('_', ' ')}: {self.message}"))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)

    def _of_the_hypergradient(self, certificate: Certificate) -> list[tuple[str, str]]:
        share = f"norm {self.gradient_norm:.3g}, of which the direct part df/dx {self.direct_norm:.3g}"
        lines = [("hypergradient", share)]
        if certificate.curvature is not None:
            low, high = (float(c) for c in certificate.curvature)
            condition = f", condition {high / low:.2g}" if low > 0 else ""
            lines.append(("curvature seen", f"{low:.3g} to {high:.3g}{condition}"))
        lines.append(("certificate", str(certificate)))
        if not math.isnan(self.slope):
            pairs = zip(self.differences, self.steps, strict=True)
            by = " and ".join(f"{difference:.7g} (step {step:.1g})" for difference, step in pairs)
            lines.append(("slope", f"{self.slope:.7g}, by differences {by}"))
        if self.repeats is not None:
            lines.append(("repeated", "the same, bit for bit" if self.repeats else "another value the second time"))
        return lines


def check(
    problem: Problem,
    x: Variables,
    y: Variables | None = None,
    *,
    estimator: Estimator | None = None,
    step: int = 0,
    seed: int = 0,
) -> ProblemReport:
    """Examine a problem at x: dry run, lower solve, hypergradient against differences, curvature, repeatability.

        <h, v>  against  (F(x + t v) - F(x - t v)) / 2t  at two t,   F(x) = f(x, y*(x)) on the batches of one step

    y* is solved for anew at each x, to rounding. v points half along h, half at random. The upper set's projection is
    applied to both ends. Nothing of the user's is changed, and what is wrong is reported, not raised.

    Args:
        problem: the statement.
        x: upper variables.
        y: where to start the lower solve; `problem.lower_init(x)` if None.
        estimator: of the hypergradient; that which `hypergradient` chooses if None. For one that differentiates through
            training, F is what its training reaches.
        step: which batches.
        seed: of batches, randomness inside the objectives, and the direction.

    Returns:
        The report; `ok` where the hypergradient agrees with the differences and repeats.

    Cost:
        A dry run, five lower solves, two hypergradients and one certificate.

    Notes:
        It looks at one point. Lower levels with constraints are solved by SciPy, up to 500 variables. In float32
        differences settle two or three digits; pass float64 variables and data for more.

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.quadratic()
        >>> report = bilevel.check(task.problem, task.x0, task.y0)
        >>> report.ok, report.verdict.name
        (True, 'RIGHT')
    """
    chosen = estimator
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts: dict[str, Any] = {}
        try:
            if chosen is None:
                chosen = fitting(problem)
            oracles, flat_x, flat_y = open_oracles(problem, x, y, seed=seed, trains=chosen.replays)
            facts["way"] = oracles.way
            verdict, message = _Examined(oracles, chosen, flat_x, flat_y, step, seed).run(facts)
        except BilevelError as error:
            verdict, message = Verdict.MISSING, "there is no hypergradient; the error says what to try."
            facts["error"] = error
    notes = tuple(dict.fromkeys(str(each.message) for each in caught))
    return ProblemReport(verdict, message, notes=notes, **facts)


@dataclass
class _Examined:
    """One examination under way, on flat vectors."""

    oracles: Oracles
    estimator: Estimator
    x: Tensor
    y: Tensor
    step: int
    seed: int

    def run(self, facts: dict[str, Any]) -> tuple[Verdict, str]:
        """Fill in the facts, and return the verdict with what it rests on."""
        if not self.estimator.replays:
            facts["lower"] = lower = self._solved(self.x)
            if lower.status is Status.STEP_LIMIT:
                return Verdict.UNDECIDED, (
                    f"the lower level is not solved after {lower.steps} steps: start nearer, regularize it, or check "
                    "an estimator that differentiates through training (estimator=Unrolled())."
                )
            self.y = lower.y
        state = self.estimator.init(self.oracles, self.x, self.y)
        found = self._estimate(self.x, self.y, state, certify=True)
        h, certificate = found.gradient, found.certificate
        again = self._estimate(self.x, self.y, state, certify=False).gradient
        upper = self.oracles.upper_gradient(self.x, found.y, self.step)
        facts |= {
            "certificate": certificate, "gradient_norm": float(h.norm()), "direct_norm": float(upper.x.norm()),
            "repeats": bool(torch.equal(h, again)),
        }  # fmt: skip
        if not bool(h.isfinite().all()):
            return Verdict.NON_FINITE, "look for sqrt, log, norm or a division at zero."
        if certificate.margin is not None and not float(certificate.margin) > 0:
            return (
                Verdict.UNDECIDED,
                "F has a kink at this x (margin 0), so its slope has two sides; look at another x.",
            )
        v = self._direction(h)
        rounding = self._rounding(upper.value, upper.y, certificate, facts.get("lower"))
        slopes, differences, steps, failed = self._differences(h, v, rounding, state)
        facts |= {"slope": slopes[1], "differences": differences, "steps": steps}
        if failed is not None:
            return Verdict.UNDECIDED, f"near x the lower level could not be solved ({failed.name.lower()})."
        return _judged(slopes, differences, rounding / steps[1], float(h.norm()), certificate)

    def _solved(self, x: Tensor) -> LowerMinimum:
        return minimize(self.oracles, x, self.y, self.step, tol=10 * torch.finfo(x.dtype).eps)

    def _estimate(self, x: Tensor, y: Tensor, state: Any, *, certify: bool) -> Estimate:
        return self.estimator.estimate(
            self.oracles, x, y, state, upper_step=self.step, lower_step=self.step, certify=certify
        )[0]

    def _direction(self, h: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        aside = torch.randn(h.shape, generator=generator, dtype=h.dtype).to(h.device)
        tiny = torch.finfo(h.dtype).tiny
        v = h / h.norm().clamp_min(tiny) + aside / aside.norm().clamp_min(tiny)
        unit: Tensor = v / v.norm().clamp_min(tiny)
        return unit

    def _rounding(self, value: Tensor, in_y: Tensor, certificate: Certificate, lower: LowerMinimum | None) -> float:
        """Return how far values of F may be off: by rounding, and by what the lower solve left."""
        error = 4 * torch.finfo(value.dtype).eps * abs(float(value))
        if lower is not None and certificate.curvature is not None and float(certificate.curvature[0]) > 0:
            error += float(in_y.norm()) * lower.residual / float(certificate.curvature[0])
        return error

    def _differences(
        self, h: Tensor, v: Tensor, rounding: float, state: Any
    ) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float], Status | None]:
        """Return slopes by h and by differences of F at two step sizes, these, and how a lower solve failed."""
        reach = (1 + float(self.x.abs().mean())) / max(float(v.abs().max()), torch.finfo(v.dtype).tiny)
        size = abs(float((h * v).sum()))
        longer = min(max(STEP * reach, ROUNDING * rounding / size if size > 0 else 0.0), 0.1 * reach)
        steps = (longer, longer / SHORTER)
        slopes, differences, failed = [], [], None
        for length in steps:
            ahead, behind = (self.oracles.project_x(self.x + sign * length * v) for sign in (1, -1))
            (above, one), (below, other) = self._value(ahead, state), self._value(behind, state)
            failed = next((s for s in (failed, one, other) if s is not None), None)
            slopes.append(float((h * (ahead - behind)).sum()) / (2 * length))
            differences.append((above - below) / (2 * length))
        return (slopes[0], slopes[1]), (differences[0], differences[1]), steps, failed

    def _value(self, x: Tensor, state: Any) -> tuple[float, Status | None]:
        """Return F(x), and the status of a lower solve that failed."""
        if self.estimator.replays:
            # The same start, and the same step length where it was measured: h is the derivative of that training.
            return float(self._estimate(x, self.y, state, certify=False).upper_value), None
        try:
            lower = self._solved(x)
        except (Diverged, NonFinite) as error:
            return float("nan"), Status.DIVERGED if isinstance(error, Diverged) else Status.NON_FINITE
        failed = None if lower.status in {Status.CONVERGED, Status.STALLED} else lower.status
        return float(self.oracles.upper_value(x, lower.y, self.step)), failed


def _judged(
    slopes: tuple[float, float], differences: tuple[float, float], rounding: float, size: float, found: Certificate
) -> tuple[Verdict, str]:
    uncertain = abs(differences[0] - differences[1]) + abs(slopes[0] - slopes[1]) + rounding
    gap, least = abs(slopes[1] - differences[1]), SMALL * size
    largest = max(abs(slopes[1]), abs(differences[1]), least)
    own = 0.0 if found.error_estimate is None else float(found.error_estimate)
    if uncertain > LOOSE * largest and size > 0:
        return Verdict.UNDECIDED, (
            f"differences of F are uncertain by {uncertain / largest:.1%} themselves: use float64, look for kinks and "
            "for several lower solutions, or look at another x."
        )
    if gap > 3 * uncertain + least + own:
        return Verdict.WRONG, (
            f"it is {gap / largest:.1%} off. Is the lower solution unique, is y a strict minimum, and can every "
            "operation be differentiated twice (bilevel.check_second_order(module, batch))? If not, use a first-order "
            "solver, or differentiate through training (unrolled())."
        )
    if own > LOOSE * size:
        return Verdict.UNDECIDED, (
            f"the hypergradient may be {own / max(size, SMALL):.1%} off by its own estimate: solve more accurately, "
            "as with estimator=Implicit(linear=CG(tol=1e-8, max_steps=1000))."
        )
    return Verdict.RIGHT, f"agrees with differences of F to {gap / largest if largest > 0 else 0:.1e}, relative."
