"""Feasible points of the lower level: checks of constraints at the door, a start, and multipliers that run away."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from bilevel.linearization import gradients, leaves_of
from bilevel.multipliers import Rows, Scale, constraint_rows, constraint_terms, names, violation
from bilevel.oracles import Constraint, Oracles
from bilevel.status import Infeasible, InfeasibleStart, InvalidProblem, MultiplierAtBound, MultipliersUnbounded

NEWTON_STEPS = 50
HALVINGS = 8
CONVENTION = {
    "constraint": "constraint(x, y, batch) returns one tensor [q], an entry for each inequality, feasible where <= 0",
    "equality": "equality(x, y, batch) returns one tensor [r], an entry for each equation, feasible where = 0",
}
PATIENCE = 64
SUSPICIOUS = 3.0
"""Multipliers that add up to this many times their joint pull on y are looked at closely."""
VANISHING = 1e-3
"""At a feasible point, a joint pull below this share of the multipliers fails the Mangasarian-Fromovitz condition."""


def feasible_start(oracles: Oracles, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Check the constraints of a problem at a start and return the start, feasible.

    y is projected on the lower set; where there are constraints, by the joint set if the problem has one, else by
    Newton steps on what is violated: in y alone, and in x only where no y is found.

    Raises:
        InvalidProblem: a constraint returns something else than a vector of numbers that depend on y, or the joint set
            disagrees with the constraints.
        Infeasible: no feasible point was found.
    """
    y = oracles.project_y(y)
    for name in names(oracles):
        _check(oracles, name, x, y)
    if oracles.problem.joint_set is not None:
        return _projected(oracles, x, y)
    if not names(oracles):
        return x, y
    begin = constraint_rows(oracles, x, y)
    _, y_near, rows = restored(oracles, x, y)
    if not _missed(rows, y_near):
        return x, y_near
    if oracles.problem.blocks is None:
        x_near, y_far, moved = restored(oracles, x, y_near, move_x=True)
        if not _missed(moved, y_far):
            warnings.warn(
                "no lower variables satisfy the constraints at x0: the start was moved in x by "
                f"{float((x_near - x).norm()):.3g}. Pass a feasible x0, or bound x with upper_set.",
                InfeasibleStart,
                stacklevel=4,
            )
            return x_near, y_far
    raise _infeasible(rows, begin, "at the start x0")


def restored(
    oracles: Oracles, x: Tensor, y: Tensor, *, move_x: bool = False, step: int = 0
) -> tuple[Tensor, Tensor, Rows]:
    """Return a point near (x, y) that satisfies the constraints and lies in the sets, if Newton steps find one.

    Each step is the least one that solves the violated constraints, linearized; then it is projected on the sets.

    Args:
        oracles: of the problem.
        x: `[p]`.
        y: `[d]` or `[m, d]`.
        move_x: whether x may move (not with blocks).
        step: whose lower batch the constraints see.

    Returns:
        `(x, y, rows)` with the constraints there; the caller judges whether they are satisfied.

    Cost:
        As many gradients as there are constraints, for each of up to 50 steps.
    """
    rows = constraint_rows(oracles, x, y, step)
    for _ in range(NEWTON_STEPS):
        missed = violation(rows.value, rows.inequalities)
        if not missed.abs().amax() > _rounding(y):
            break
        dx, dy = _newton(rows, missed, x, move_x)
        length = 1.0
        for _ in range(HALVINGS):
            x_next = oracles.project_x(x + length * dx) if move_x else x
            y_next = oracles.project_y(y + length * dy)
            after = constraint_rows(oracles, x_next, y_next, step)
            if violation(after.value, after.inequalities).norm() < missed.norm():
                break
            length = 0.5 * length
        else:
            break
        x, y, rows = x_next, y_next, after
    return x, y, rows


def due(step: int, touched: Tensor) -> bool:
    """Return whether to look at multipliers closely: at steps 64, 128, 256... and where one meets its bound."""
    return int(touched) == step or (step >= PATIENCE and step & (step - 1) == 0)


def inspect_multipliers(oracles: Oracles, x: Tensor, y: Tensor, multiplier: Tensor, scale: Scale, step: int) -> None:
    """Raise where multipliers run away: because the lower level is empty at x, or for want of a qualification.

    Args:
        oracles: of the problem.
        x: `[p]`.
        y: `[d]` or `[m, d]`.
        multiplier: `[n]` or `[m, n]`.
        scale: of the constraints.
        step: whose lower batch the constraints see.

    Raises:
        Infeasible: no feasible y was found at x.
        MultipliersUnbounded: a feasible y was found, and the active constraints' gradients there cancel or vanish.

    Cost:
        Two gradients; where the multipliers are suspicious, those of `restored`.
    """
    norms, inequalities = scale.norms, scale.inequalities
    value = constraint_terms(oracles, x, y, None, inequalities, step).value
    held = _held(multiplier, value, norms, inequalities)
    pull = constraint_terms(oracles, x, y, held, inequalities, step).y.norm()
    size = (held.abs() * norms).sum()
    if not size > SUSPICIOUS * pull:
        return
    _, near, rows = restored(oracles, x, y, step=step)
    if _missed(rows, near):
        raise _infeasible(rows, None, f"at the x of step {step}")
    held = _held(multiplier, rows.value, norms, inequalities)
    pull = constraint_terms(oracles, x, near, held, inequalities, step).y.norm()
    size = (held.abs() * norms).sum()
    # Where a curved constraint holds up to rounding, its gradient is known up to the root of that.
    rounding = (held.abs() * (2 * scale.bend * norms * _rounding(y)).sqrt()).sum()
    if size > 0 and pull <= VANISHING * size + rounding:
        raise MultipliersUnbounded(
            f"the multipliers of the lower constraints reach {float(multiplier.abs().max()):.3g} at step {step}, and "
            f"the gradients of the active constraints cancel or vanish there (to {float(pull / size):.2g}): no "
            "constraint qualification holds. Restate the constraints (no squares of equations, no equation as two "
            "inequalities), or relax them a little."
        )


def warn_at_bound(touched: Tensor, step: int, bound: float, name: str) -> None:
    """Warn at the one step at which a multiplier first touched its bound; it waits for the device."""
    if int(touched) == step:
        warnings.warn(
            f"a multiplier reached its bound {bound:g} at step {step}: if the true one is larger, the answer is wrong "
            f"without any other sign. Raise {name}.",
            MultiplierAtBound,
            stacklevel=4,
        )


def _rounding(y: Tensor) -> Tensor:
    """Return a violation that counts as none, 0-dim."""
    size: Tensor = 1 + y.norm()
    return 10 * torch.finfo(y.dtype).eps * size


def _newton(rows: Rows, missed: Tensor, x: Tensor, move_x: bool) -> tuple[Tensor, Tensor]:
    """Return the least step that solves the violated constraints, linearized."""
    mask = (missed != 0).to(missed.dtype)
    if move_x:
        both = torch.cat([rows.x, rows.y], -1) * mask[:, None]
        step = -(torch.linalg.pinv(both.double()) @ missed.double()).to(x.dtype)
        return step[: len(x)], step[len(x) :]
    in_y = rows.by_block() * mask[..., None]
    step = -(torch.linalg.pinv(in_y.double()) @ missed.double()[..., None])[..., 0]
    return torch.zeros_like(x), step.to(x.dtype)


def _held(multiplier: Tensor, value: Tensor, norms: Tensor, inequalities: int) -> Tensor:
    """Return the multipliers of the active constraints, 0 for the others."""
    slack = torch.cat([value[..., :inequalities], torch.zeros_like(value[..., inequalities:])], -1)
    return torch.where(slack >= -1e-3 * norms, multiplier, torch.zeros_like(multiplier))


def _missed(rows: Rows, y: Tensor) -> bool:
    tolerance = 10 * torch.finfo(y.dtype).eps ** 0.5 * (1 + y.norm()) * rows.by_block().norm(dim=-1).clamp_min(1.0)
    return bool((violation(rows.value, rows.inequalities).abs() > tolerance).any())


def _infeasible(rows: Rows, begin: Rows | None, where: str) -> Infeasible:
    amounts = violation(rows.value, rows.inequalities).abs()
    count = amounts.shape[-1]
    flat = int(amounts.argmax())
    index, amount = flat % count, float(amounts.flatten()[flat])
    kind, place = ("constraint", index) if index < rows.inequalities else ("equality", index - rows.inequalities)
    block = f" of block {flat // count}" if amounts.dim() > 1 else ""
    flipped = (
        " At the start all entries are >= 0: was c >= 0 meant? Then return -c."
        if begin is not None and rows.inequalities and bool((begin.value[..., : rows.inequalities] >= 0).all())
        else ""
    )
    return Infeasible(
        f"no lower variables found that satisfy the constraints {where}: entry {place} of the {kind}{block} misses by "
        f"{amount:.3g} at the best point found ({CONVENTION[kind]}).{flipped} Start elsewhere, bound x with upper_set, "
        "or relax the constraint.",
        index=index,
        amount=amount,
    )


def _check(oracles: Oracles, name: Constraint, x: Tensor, y: Tensor) -> None:
    with torch.enable_grad():
        xs, ys = leaves_of(oracles.x_layout, x), leaves_of(oracles.y_layout, y)
        value: Any = oracles.call(name, 0, xs, ys)
        expected = 1 if oracles.problem.blocks is None else 2
        problem = None
        if not isinstance(value, Tensor):
            problem = f"returned a {type(value).__name__}; stack the entries into one Tensor"
        elif not value.is_floating_point():
            problem = f"returned {value.dtype}; return the amount, such as a - b, not the comparison a <= b"
        elif value.dim() != expected or value.shape[-1] == 0:
            problem = f"returned shape {tuple(value.shape[expected - 1 :])}; for one entry use .reshape(1)"
        elif not value.isfinite().all():
            index = int((~value.isfinite()).flatten().nonzero()[0]) % value.shape[-1]
            problem = f"is not finite in entry {index} at the start"
        elif not value.requires_grad or all(g is None for g in gradients([value.sum()], ys)):
            problem = "does not depend on y; what binds x alone belongs in upper_set"
    if problem is not None:
        raise InvalidProblem(f"the {name} {problem}. Expected: {CONVENTION[name]}.")


def _projected(oracles: Oracles, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the start projected on the joint set, which must agree with the constraints and with itself."""
    x, y = oracles.project_jointly(x, y)
    again = torch.cat([part.flatten() for part in oracles.project_jointly(x, y)])
    once = torch.cat([x, y.flatten()])
    if not once.isfinite().all() or (again - once).norm() > 1e-3 * (1 + once.norm()):
        raise InvalidProblem(
            "joint_set is no projection: applied twice it moves the start a second time (or returns what is not "
            "finite). It must return the nearest feasible pair (x, y)."
        )
    rows = constraint_rows(oracles, x, y)
    amounts = violation(rows.value, rows.inequalities).abs() / rows.by_block().norm(dim=-1).clamp_min(1e-3)
    if amounts.numel() and float(amounts.max()) > 1e-3 * (1 + float(once.norm())):
        index = int(amounts.argmax()) % amounts.shape[-1]
        raise InvalidProblem(
            f"joint_set and the constraints disagree: entry {index} is {float(rows.value[..., index].max()):.3g} "
            f"at the projected start. Expected: {CONVENTION['constraint']}; {CONVENTION['equality']}."
        )
    return x, y
