"""Row-wise bookkeeping that the solvers share: status codes, counted products, warm starts, checks at the door."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel.linear._base import LinearSolution, Operator, norm, relative_residual
from bilevel.status import InvalidProblem, Status

SEVERITY = (
    Status.CONVERGED,
    Status.MINIMUM_NORM,
    Status.APPROXIMATE,
    Status.STEP_LIMIT,
    Status.NEGATIVE_CURVATURE,
    Status.BREAKDOWN,
    Status.SINGULAR,
    Status.DIVERGED,
    Status.NON_FINITE,
)
CODE = {status: index for index, status in enumerate(SEVERITY)}
OPEN = CODE[Status.STEP_LIMIT]
"""The code of a row that is still at work: if nothing closes it, it ends at the step limit."""


BLOCK = 65_536
"""Columns converted to float64 at a time."""


class Products:
    """Products with A + damping I, counted and detached."""

    def __init__(self, operator: Operator, damping: float = 0.0) -> None:
        self.operator = operator
        self.damping = damping
        self.count = 0

    def __call__(self, vector: Tensor) -> Tensor:
        """Return (A + damping I) v."""
        self.count += 1
        product = self.operator.apply(vector).detach()
        return product if self.damping == 0 else torch.add(product, vector, alpha=self.damping)

    def transpose(self, vector: Tensor) -> Tensor:
        """Return (A + damping I)^T v."""
        if self.operator.apply_transpose is None:
            return self(vector)
        self.count += 1
        return torch.add(self.operator.apply_transpose(vector).detach(), vector, alpha=self.damping)

    def many(self, vectors: Tensor) -> Tensor:
        """Return A (undamped) applied to each of `[k, *shape]`."""
        self.count += len(vectors)
        return self.operator.many(vectors).detach()


def require(condition: bool, message: str) -> None:
    """Raise `InvalidProblem(message)` unless the condition holds."""
    if not condition:
        raise InvalidProblem(message)


def require_nonnegative(owner: str, **values: float | None) -> None:
    """Raise unless every given value is finite and >= 0."""
    for name, value in values.items():
        require(
            value is None or (math.isfinite(value) and value >= 0),
            f"{owner}: {name} must be a finite number >= 0, got {value}; try {owner}({name}=1e-3).",
        )


def require_at_least(owner: str, least: int, **values: int | None) -> None:
    """Raise unless every given value is a whole number >= least."""
    for name, value in values.items():
        require(
            value is None or (isinstance(value, int) and value >= least),
            f"{owner}: {name} must be a whole number >= {least}, got {value}; try {owner}({name}={max(least, 10)}).",
        )


def at_door(owner: str, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return b and x0 detached, checked for shape.

    Raises:
        InvalidProblem: b has no entries or no dimension, or x0 is not shaped like b.
    """
    require(b.dim() > 0 and b.numel() > 0, f"{owner}: b has shape {list(b.shape)}; give [d] or [m, d] with d >= 1.")
    require(
        x0 is None or x0.shape == b.shape,
        f"{owner}: x0 has shape {None if x0 is None else list(x0.shape)} but b {list(b.shape)}; pass x0 shaped like b.",
    )
    return b.detach(), None if x0 is None else x0.detach().to(b)


def start(products: Products, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the first iterate and its residual; rows whose residual exceeds ‖b‖ start from zero."""
    zero = torch.zeros_like(b)
    if x0 is None:
        return zero, b
    residual = b - products(x0)
    keep = (norm(residual) <= norm(b)) & (norm(b) > 0)
    return torch.where(keep, x0, zero), torch.where(keep, residual, b)


def open_codes(rows: Tensor) -> Tensor:
    """Return the code `OPEN` for each row, shaped like `rows`."""
    return torch.full_like(rows, OPEN, dtype=torch.int64)


def mark(codes: Tensor, where: Tensor, status: Status) -> Tensor:
    """Close the open rows in `where` with the status."""
    return torch.where(where & (codes == OPEN), CODE[status], codes)


def worst(codes: Tensor) -> Status:
    """Return the gravest status of all rows."""
    return SEVERITY[int(codes.max())]


def check_period(check_every: int | None, device: torch.device) -> int:
    """Return how many steps lie between two looks at the mask: looking is free on a CPU and a wait elsewhere."""
    if check_every is not None:
        return check_every
    return 1 if device.type == "cpu" else 5


def curvature_range(low: Tensor, high: Tensor, damping: float) -> tuple[Tensor, Tensor] | None:
    """Return the extremes over all rows, less the damping; rows without information hold (inf, -inf)."""
    smallest, largest = low.amin() - damping, high.amax() - damping
    return (smallest, largest) if bool(smallest <= largest) else None


def approximation(
    products: Products,
    b: Tensor,
    value: Tensor,
    *,
    tol: float,
    check: bool,
    curvature: tuple[Tensor, Tensor] | None = None,
    flag: Tensor | None = None,
) -> LinearSolution:
    """Return a one-shot answer: CONVERGED where its residual is found to be <= tol, else APPROXIMATE.

    Args:
        products: counts the products made so far; one more gives the residual.
        b: right-hand side, `[..., d]`.
        value: the answer.
        tol: relative tolerance.
        check: whether to spend that product.
        curvature: passed on.
        flag: rows `[..., 1]` where negative curvature was seen.
    """
    residual = torch.full_like(norm(b), torch.nan).squeeze(-1)
    if check:
        residual = relative_residual(b - products(value), b)
    residual = torch.where((norm(b) == 0).squeeze(-1), 0.0, residual)
    codes = torch.full_like(residual, CODE[Status.APPROXIMATE], dtype=torch.int64)
    codes = torch.where(residual <= tol, CODE[Status.CONVERGED], codes)
    if flag is not None:
        codes = torch.where(flag.squeeze(-1), CODE[Status.NEGATIVE_CURVATURE], codes)
    finite = value.isfinite().all(-1) & (residual.isfinite() | (not check))
    codes = torch.where(finite, codes, CODE[Status.NON_FINITE])
    return LinearSolution(value, worst(codes), residual, 0, products.count, curvature)


def gram(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T in float64 `[..., i, j]` from `[..., i, d]` and `[..., j, d]`, without a float64 copy of either."""
    blocks = zip(a.split(BLOCK, -1), b.split(BLOCK, -1), strict=True)
    total = torch.zeros((*a.shape[:-1], b.shape[-2]), dtype=torch.float64, device=a.device)
    for left, right in blocks:
        total = total + left.double() @ right.double().mT
    return total
