"""What an answer under constraints satisfies: multipliers, and how feasible both levels are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.layout import Layout, Variables
from bilevel.multipliers import constraint_terms, names, violation
from bilevel.oracles import Constraint, Oracles
from bilevel.problem import Problem
from bilevel.status import InvalidProblem

ACTIVE = 1e-6


@dataclass(frozen=True)
class Conditions:
    """How far a point and its multipliers are from solving the lower level, and from both levels' sets. All detached.

    Args:
        constraint: c(x, y), `[q]` or `[m, q]` with blocks; feasible where <= 0. Empty without a constraint.
        equality: h(x, y), `[r]` or `[m, r]`; feasible where = 0.
        constraint_multiplier: shaped like `constraint`, in units of g over units of c.
        equality_multiplier: shaped like `equality`.
        upper_violation: distance of x to the upper set, 0-dim.
        lower_violation: the largest of `max(c_i, 0)`, `|h_j|` and the distance of y to the lower set, 0-dim.
        stationarity: `‖y - P_Y(y - d/dy (g + <lam, c> + <nu, h>))‖`, 0-dim; a term with kinks enters by its prox.
        complementarity: the largest of `|lam_i c_i|` and `-lam_i`, 0-dim.
    """

    constraint: Tensor
    equality: Tensor
    constraint_multiplier: Tensor
    equality_multiplier: Tensor
    upper_violation: Tensor
    lower_violation: Tensor
    stationarity: Tensor
    complementarity: Tensor

    @property
    def active(self) -> Tensor:
        """Which inequalities hold with equality up to 1e-6, shaped like `constraint`."""
        return self.constraint >= -ACTIVE

    def __str__(self) -> str:
        multipliers = torch.cat([self.constraint_multiplier.flatten(), self.equality_multiplier.flatten()])
        largest = f"{float(multipliers.abs().max()):.3g}" if len(multipliers) else "none"
        return (
            f"violation {float(self.upper_violation):.1e} above, {float(self.lower_violation):.1e} below; lower "
            f"stationarity {float(self.stationarity):.1e}, complementarity {float(self.complementarity):.1e}; "
            f"{int(self.active.sum())} of {self.constraint.numel()} inequalities active, largest multiplier {largest}"
        )


def conditions(
    problem: Problem,
    x: Variables,
    y: Variables,
    multiplier: Tensor | None = None,
    *,
    step: int = 0,
    seed: int = 0,
) -> Conditions:
    """Check an answer: is it feasible for both levels, and does y solve the lower level with these multipliers?

        d/dy (g + <lam, c> + <nu, h>) = 0,   c <= 0 <= lam,   lam c = 0,   h = 0,   x in X,  y in Y

    Where g and c are convex and h linear in y, all of them together prove that y solves the lower level. A method that
    relaxes it (`LVHBA`, `MEHA`) leaves a stationarity of about one over its penalty: the price of an upper value below
    what any lower solution reaches.

    Args:
        problem: the statement.
        x: upper variables; not projected.
        y: lower variables; not projected.
        multiplier: of c and then of h, `[q + r]` or `[m, q + r]`: `solution.state.multiplier` of `LVHBA`, `BLOCC` and
            `KKT`. None where there are no constraints.
        step: which lower batch.
        seed: of batches.

    Raises:
        InvalidProblem: the multiplier does not fit the constraints, or is missing.

    Cost:
        One lower gradient, one of each of c and h, and a projection on each set.

    Example:
        >>> import bilevel
        >>> task = bilevel.problems.ineq()
        >>> solution = bilevel.solve(task.problem, bilevel.KKT(), task.x0, task.y0, steps=6)
        >>> found = conditions(task.problem, solution.x, solution.y, solution.state.multiplier)
        >>> round(float(found.constraint_multiplier), 6), round(float(found.lower_violation), 6)
        (2.5, 0.0)
    """
    oracles = Oracles(problem, Layout.of(x), Layout.of(y, name="y", blocks=problem.blocks), seed=seed)
    flat_x, flat_y = oracles.x_layout.flatten(x), oracles.y_layout.flatten(y)
    sizes: dict[Constraint, int] = {
        name: oracles.constraint(flat_x, flat_y, None, step, name=name).value.shape[-1] for name in names(oracles)
    }
    q = sizes.get("constraint", 0)
    weights = _fitting(multiplier, (*flat_y.shape[:-1], sum(sizes.values())), flat_y)
    terms = constraint_terms(oracles, flat_x, flat_y, weights, q, step)

    declared, kinked = oracles.declared(flat_x), problem.kinked
    slope = oracles.lower_gradient(flat_x, flat_y, step, declared=not kinked)[1] + terms.y
    moved = declared.prox(flat_y - slope, 1.0) if kinked else flat_y - slope
    outside = (flat_y - oracles.project_y(flat_y)).norm()
    inequality = weights[..., :q]
    slackness = torch.cat(
        [(inequality * terms.value[..., :q]).abs().flatten(), inequality.clamp_max(0).abs().flatten()]
    )
    zero = flat_y.new_zeros(1)
    return Conditions(
        constraint=terms.value[..., :q],
        equality=terms.value[..., q:],
        constraint_multiplier=inequality,
        equality_multiplier=weights[..., q:],
        upper_violation=(flat_x - oracles.project_x(flat_x)).norm(),
        lower_violation=torch.cat([violation(terms.value, q).abs().flatten(), outside.reshape(1)]).max(),
        stationarity=(flat_y - oracles.project_y(moved)).norm(),
        complementarity=torch.cat([slackness, zero]).max(),
    )


def _fitting(multiplier: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if multiplier is None and shape[-1] == 0:
        return like.new_zeros(shape)
    if multiplier is None or tuple(multiplier.shape) != shape:
        given = "none" if multiplier is None else f"shape {tuple(multiplier.shape)}"
        raise InvalidProblem(
            f"the constraints need multipliers of shape {shape}, of c and then of h, got {given}: pass "
            "solution.state.multiplier of LVHBA, BLOCC or KKT."
        )
    return multiplier.detach().to(like)
