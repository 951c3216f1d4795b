"""A reference solver for small constrained problems: the lower optimality conditions as constraints, on SciPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.extras import extra
from bilevel.feasibility import inspect_multipliers
from bilevel.kkt_system import KKTSystem, Vector
from bilevel.multipliers import Scale
from bilevel.oracles import Oracles
from bilevel.solvers._base import Metrics, Solver
from bilevel.status import InvalidProblem, Status

TOLERANCES = (1e-9, 1e-6)


class KKTReport(NamedTuple):
    """How far the answer can be trusted; all 0-dim.

    Args:
        lower_violation: the largest violation of the lower level's optimality conditions.
        upper_violation: distance of x to the upper set.
        lower_gap: `g(x, y) - min g(x, .)` by solves of the lower level of their own; > 0 where y is a stationary point
            of the lower level that is no minimum.
        multiplier_margin: the least multiplier among active constraints; near 0, the solution has a kink in x there.
    """

    lower_violation: Tensor
    upper_violation: Tensor
    lower_gap: Tensor
    multiplier_margin: Tensor


class KKTState(NamedTuple):
    """Where the reference solver stands.

    Args:
        x: best upper variables so far `[p]`.
        y: their lower variables `[d]`.
        step: relaxations solved.
        starts: one vector of all unknowns for each start `[k, n]`.
        relaxation: complementarity holds up to this: `slack * multiplier <= relaxation`.
        multiplier: of c then of h at (x, y), `[q + r]`, in the user's units; see `bilevel.conditions`.
        scale: of the constraints.
        report: how far the answer can be trusted, None before the first step.
        metrics: what the last step saw.
    """

    x: Tensor
    y: Tensor
    step: int
    starts: Tensor
    relaxation: float
    multiplier: Tensor
    scale: Scale
    report: KKTReport | None
    metrics: Metrics | None


@dataclass(frozen=True)
class KKT(Solver[KKTState]):
    """Minimize f over all (x, y, multipliers) that satisfy the lower level's optimality conditions.

        min f(x, y)   s.t.   dg/dy + (dc/dy)^T lam + (dh/dy)^T nu = 0,  h = 0,  c <= 0 <= lam,  -lam_i c_i <= eps

    Each step solves this with a tenth (then a hundredth...) of the last eps, from each of several starts; once eps is
    small, the active constraints are read off and made equalities. Exact where the lower level is convex in y and a
    constraint qualification holds: where multipliers run away, it ends with CQ_FAILURE. Where the lower level is not
    convex, `report.lower_gap` tells stationary points from minima.

    Args:
        starts: how many starts; the first is the user's, the others are drawn around it.
        spread: standard deviation of the other starts, in the units of x and y.
        relaxation: the first eps, > 0.
        shrink: factor of eps from step to step, in (0, 1).
        method: "SLSQP" or "trust-constr" of SciPy.
        max_steps: SciPy's iterations for each start and step.
        seed: of the starts.

    Cost:
        Dense derivatives of all conditions at each of SciPy's iterations: up to a few hundred unknowns. Memory n².

    References:
        Scholtes, "Convergence properties of a regularization scheme for mathematical programs with complementarity
        constraints", SIAM Journal on Optimization, 2001.

    Example:
        >>> import bilevel, torch
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, b: 0.5 * ((x - 2) ** 2 + (y - 1) ** 2),
        ...     lower=lambda x, y, b: 0.5 * (y - 3) ** 2,
        ...     constraint=lambda x, y, b: (x + y - 2).reshape(1))
        >>> zero = torch.zeros((), dtype=torch.float64)
        >>> solution = bilevel.solve(problem, KKT(), zero, zero, steps=6)
        >>> round(float(solution.x), 4), round(float(solution.y), 4)
        (1.5, 0.5)
    """

    needs_hvp: ClassVar[bool] = False
    handles_lower_set: ClassVar[bool] = True
    handles_constraints: ClassVar[bool] = True
    contract_steps: ClassVar[int] = 8

    starts: int = 5
    spread: float = 1.0
    relaxation: float = 1.0
    shrink: float = 0.1
    method: str = "SLSQP"
    max_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.starts < 1 or self.max_steps < 1:
            raise InvalidProblem(f"KKT needs starts >= 1 and max_steps >= 1, got {self.starts} and {self.max_steps}.")
        if not (self.relaxation > 0 and 0 < self.shrink < 1 and self.spread >= 0):
            raise InvalidProblem("KKT needs relaxation > 0, 0 < shrink < 1 and spread >= 0.")
        if self.method not in ("SLSQP", "trust-constr"):
            raise InvalidProblem(f"KKT(method=...) must be 'SLSQP' or 'trust-constr', got {self.method!r}.")

    def init(self, oracles: Oracles, x: Tensor, y: Tensor) -> KKTState:
        """Return the state before the first step: the starts, with multipliers of 0."""
        self.refuse(oracles.problem)
        problem = oracles.problem
        if not problem.deterministic_lower or (problem.upper_data is not None and not problem.upper_data.deterministic):
            raise InvalidProblem("KKT needs the same batch at every step; use bilevel.Full.")
        if x.dtype != torch.float64:
            raise InvalidProblem(
                f"KKT needs float64 variables and data, got {x.dtype}; SciPy's steps are too fine for it."
            )
        system, scale = KKTSystem(oracles, x, y), Scale.measure(oracles, x, y)
        generator = torch.Generator().manual_seed(self.seed)
        first = torch.cat([x, y, x.new_zeros(system.size - len(x) - len(y))])
        noise = self.spread * torch.randn(self.starts, len(first), generator=generator, dtype=x.dtype).to(x.device)
        noise[0] = 0.0
        noise[:, len(x) + len(y) :] = 0.0
        return KKTState(x, y, 0, first + noise, self.relaxation, _multipliers(system, first), scale, None, None)

    @torch.no_grad()
    def step(self, oracles: Oracles, state: KKTState) -> KKTState:
        """Return the state after solving the next relaxation from every start, and the active set from the best."""
        system = KKTSystem(oracles, state.x, state.y)
        ends = torch.stack([self._relaxed(system, start, state.relaxation) for start in state.starts])
        exact = torch.stack([self._active(system, end) for end in ends])
        candidates = torch.cat([exact, ends])
        values = torch.stack([system.upper(v) for v in candidates])
        violations = torch.stack([system.violation(v) for v in candidates])
        best = candidates[_best(values, violations)]
        parts = system.split(best)
        report = self._report(system, best)
        missing = torch.full_like(values[0], float("nan"))
        metrics = Metrics(
            upper_value=system.upper(best),
            stationarity=report.lower_violation,
            lower_value=system.lower(parts.x, parts.y),
            lower_gradient_norm=system.stationarity(best).norm(),
            residual=missing,
            error_estimate=missing,
            status=Status.CONVERGED,
        )
        x, y = parts.x.clone(), parts.y.clone()
        return state._replace(
            x=x, y=y, step=state.step + 1, starts=ends, relaxation=state.relaxation * self.shrink,
            multiplier=_multipliers(system, best), report=report, metrics=metrics,
        )  # fmt: skip

    def inspect(self, oracles: Oracles, state: KKTState) -> None:
        """Raise where the multipliers run away: then the conditions that are solved need not hold at solutions.

        Not at the first step, so that there is a point to end with.
        """
        if state.multiplier.numel() and state.step > 1:
            inspect_multipliers(oracles, state.x, state.y, state.multiplier, state.scale, state.step - 1)

    def backtracked(self, factor: float) -> KKT:
        """Return this solver: it has no step length."""
        return self

    def _relaxed(self, system: KKTSystem, start: Tensor, relaxation: float) -> Tensor:
        def inequalities(v: Tensor) -> Tensor:
            slacks, multipliers = system.slacks(v), system.multipliers(v)
            return torch.cat([slacks, relaxation - slacks * multipliers])

        return self._minimize(system, start, system.equalities, inequalities, self._bounds(system))

    def _active(self, system: KKTSystem, start: Tensor) -> Tensor:
        """Make the constraints whose multiplier exceeds their slack equalities, and drop the other multipliers."""
        active = system.multipliers(start) > system.slacks(start)

        def equalities(v: Tensor) -> Tensor:
            decided = torch.where(active, system.slacks(v), system.multipliers(v))
            return torch.cat([system.equalities(v), decided])

        def inequalities(v: Tensor) -> Tensor:
            return torch.where(active, system.multipliers(v), system.slacks(v))

        return self._minimize(system, start, equalities, inequalities, self._bounds(system, multipliers=False))

    def _bounds(self, system: KKTSystem, *, multipliers: bool = True) -> tuple[Tensor, Tensor]:
        parts = system.split(torch.zeros(system.size, dtype=system.x.dtype, device=system.x.device))
        free, zero = float("inf"), 0.0 if multipliers else -float("inf")
        x_low, x_high = system.x_bounds
        lows = [x_low, torch.full_like(parts.y, -free), torch.full_like(parts.constraint, zero)]
        lows += [torch.full_like(parts.equality, -free)]
        lows += [torch.full_like(part, zero) for part in (parts.low, parts.high)]
        low = torch.cat(lows)
        return low, torch.cat([x_high, torch.full_like(low[len(x_high) :], free)])

    def _minimize(
        self, system: KKTSystem, start: Tensor, equalities: Vector, inequalities: Vector, bounds: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Minimize f under constraints with SciPy, with exact derivatives; returns the start where it fails."""
        minimize, scipy_bounds, nonlinear = _scipy()
        clamped = start.clamp(*bounds)
        # Dependent rows have multipliers that are not unique, on which SLSQP stops; the report checks all rows again.
        kept = _independent(torch.func.jacrev(equalities)(clamped))
        constraints: list[Any] = []
        for kind, function in (("eq", lambda v: equalities(v)[kept]), ("ineq", inequalities)):
            if not len(function(clamped)):
                continue
            value, jacobian = _numpy(function, start), _numpy(torch.func.jacrev(function), start)
            if self.method == "SLSQP":
                constraints.append({"type": kind, "fun": value, "jac": jacobian})
            else:
                above = 0.0 if kind == "eq" else float("inf")
                constraints.append(nonlinear(value, 0.0, above, jac=jacobian, hess=_curvature(function, start)))
        options: dict[str, Any] = {"maxiter": self.max_steps}
        options |= {"ftol": 1e-14} if self.method == "SLSQP" else {"xtol": 1e-12, "gtol": 1e-10}
        second = {} if self.method == "SLSQP" else {"hess": _numpy(torch.func.hessian(system.upper), start)}
        found = minimize(
            _numpy(system.upper, start),
            clamped.cpu().numpy(),
            jac=_numpy(torch.func.grad(system.upper), start),
            bounds=scipy_bounds(*(bound.cpu().numpy() for bound in bounds)),
            constraints=constraints,
            method=self.method,
            options=options,
            **second,
        )
        end = torch.as_tensor(found.x, dtype=start.dtype, device=start.device)
        return end if bool(end.isfinite().all()) else start

    def _report(self, system: KKTSystem, v: Tensor) -> KKTReport:
        parts = system.split(v)
        slacks, multipliers = system.slacks(v), system.multipliers(v)
        active = slacks.abs() <= 1e-6
        margin = multipliers[active].min() if bool(active.any()) else torch.full_like(v[0], float("inf"))
        distance = (parts.x - system.oracles.project_x(parts.x)).norm()
        return KKTReport(system.violation(v), distance, self._gap(system, parts.x, parts.y), margin)

    def _gap(self, system: KKTSystem, x: Tensor, y: Tensor) -> Tensor:
        """Solve the lower level alone, from y and from points around it, and return how much lower it gets."""
        minimize, scipy_bounds, _ = _scipy()
        constraints = []
        for kind, sign, function in (("eq", 1.0, system.equality), ("ineq", -1.0, system.constraint)):
            if len(function(x, y)):
                part = _scaled(function, sign, x)
                constraints.append({"type": kind, "fun": _numpy(part, y), "jac": _numpy(torch.func.jacrev(part), y)})
        generator = torch.Generator().manual_seed(self.seed)
        best = system.lower(x, y)
        for start in range(self.starts):
            noise = self.spread * torch.randn(len(y), generator=generator, dtype=y.dtype).to(y.device)
            found = minimize(
                _numpy(lambda point: system.lower(x, point), y),
                (y + noise * (start > 0)).cpu().numpy(),
                jac=_numpy(torch.func.grad(lambda point: system.lower(x, point)), y),
                bounds=scipy_bounds(*(bound.cpu().numpy() for bound in system.y_bounds)),
                constraints=constraints,
                method="SLSQP",
                options={"maxiter": self.max_steps, "ftol": 1e-14},
            )
            if found.success:
                best = torch.minimum(best, torch.as_tensor(found.fun, dtype=y.dtype, device=y.device))
        return system.lower(x, y) - best


def _multipliers(system: KKTSystem, v: Tensor) -> Tensor:
    """Return those of c and h, without those of bounds."""
    parts = system.split(v)
    return torch.cat([parts.constraint, parts.equality])


def _best(values: Tensor, violations: Tensor) -> int:
    """Return the least upper value among what satisfies the conditions most exactly, else the least violation."""
    for tolerance in TOLERANCES:
        feasible = violations <= tolerance
        if bool(feasible.any()):
            return int(torch.where(feasible, values, torch.inf).argmin())
    return int(violations.argmin())


def _independent(rows: Tensor) -> Tensor:
    """Return the indices of linearly independent rows: SLSQP stops at once on dependent equalities."""
    kept: list[int] = []
    basis = rows[:0]
    for index, row in enumerate(rows):
        # Twice is enough for Gram-Schmidt.
        rest = row - (row @ basis.T) @ basis
        rest = rest - (rest @ basis.T) @ basis
        if rest.norm() > 1e-9 * row.norm().clamp_min(1e-300):
            kept.append(index)
            basis = torch.cat([basis, (rest / rest.norm()).unsqueeze(0)])
    return torch.tensor(kept, dtype=torch.int64, device=rows.device)


def _scaled(function: Callable[[Tensor, Tensor], Tensor], sign: float, x: Tensor) -> Vector:
    return lambda y: sign * function(x, y)


def _numpy(function: Callable[[Tensor], Tensor], like: Tensor) -> Callable[[Any], Any]:
    return lambda v: function(torch.as_tensor(v, dtype=like.dtype, device=like.device)).detach().cpu().numpy()


def _curvature(function: Vector, like: Tensor) -> Callable[[Any, Any], Any]:
    """Return (v, weights) -> the Hessian of <weights, function>, on arrays."""

    def hessian(v: Any, weights: Any) -> Any:
        along = torch.as_tensor(weights, dtype=like.dtype, device=like.device)
        return _numpy(torch.func.hessian(lambda point: function(point) @ along), like)(v)

    return hessian


def _scipy() -> tuple[Any, Any, Any]:
    with extra("scipy", {"scipy": "SciPy"}, "the reference solver"):
        from scipy.optimize import Bounds, NonlinearConstraint, minimize
    return minimize, Bounds, NonlinearConstraint
