"""Choose, once and at the door, how a problem's lower objective is differentiated twice, and prove that it works."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.linearization import Differences, SecondDerivatives, join, second_derivatives
from bilevel.oracles import Oracles
from bilevel.status import NonDeterministic, SecondOrderFallback, SecondOrderUnsupported

CHAIN = ("double_backward", "forward_over_reverse", "math_attention", "differences")
MEMORY = 2**30
LARGEST_CHUNK = 64
FINER = (1e-2, 1e-3, 1e-4)
"""Shorter steps of differences that are asked before a product is called wrong."""


def choose(oracles: Oracles, x: Tensor, y: Tensor) -> None:
    """Set `oracles.way` to the first way that gives the right products here, and `oracles.chunk` to what memory allows.

    A way is right if its products H v and J^T v agree with differences of gradients, as closely as those of two step
    sizes agree with each other (at a kink they do not, and then there is no verdict).

    Raises:
        SecondOrderUnsupported: `Problem(hvp=...)` insists on a way that fails, or that is silently wrong.
        NonDeterministic: the same product, computed twice, differs.
    """
    wanted = oracles.problem.hvp
    ways = CHAIN if wanted == "auto" else (wanted,)
    troubles: list[str] = []
    judge = _Judge(oracles, x, y)
    for way in ways:
        oracles.way = way
        try:
            judge.try_way()
            break
        except (RuntimeError, NotImplementedError) as error:
            troubles.append(f"{way}: {_first_line(error)}")
    else:
        raise SecondOrderUnsupported(
            f"the lower objective cannot be differentiated twice. {' | '.join(troubles)}. Use plain attention kernels "
            "(sdpa_kernel(SDPBackend.MATH)), an uncompiled module, hvp='differences', or a first-order solver."
        )
    if troubles:
        note = (
            "; each product costs two gradients and carries a relative error near 1e-4" if way == "differences" else ""
        )
        warnings.warn(
            f"second derivatives of the lower objective fall back to '{way}'{note} ({' | '.join(troubles)}). "
            f"Set Problem(hvp='{way}') to accept this silently.",
            SecondOrderFallback,
            stacklevel=2,
        )
    judge.check_repeated()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(torch.finfo(other.dtype).tiny))


class _Judge:
    """Compares products along one random direction with what differences of gradients say."""

    def __init__(self, oracles: Oracles, x: Tensor, y: Tensor) -> None:
        self.oracles, self.x, self.y = oracles, x, y
        generator = torch.Generator().manual_seed(0)
        self.v = torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)
        self.product = torch.zeros_like(y)
        self._seen: dict[float, dict[str, tuple[Tensor, Tensor]]] = {}

    def try_way(self) -> None:
        """Try the way that the oracles are set to.

        Raises:
            RuntimeError: or NotImplementedError, what torch says; or that the products are wrong.
        """
        # Function transforms refuse hooks on saved tensors, and retain no graph anyway.
        with nullcontext(None) if self.oracles.way == "forward_over_reverse" else GraphBytes() as graph:
            core = self._core()
        self.product = core.hvp(self.v)
        if isinstance(core, Differences):
            return
        cross = join(self.oracles.x_layout, core.cross(self.v), (), self.x)
        size = 1 if graph is None else max(1, 2 * graph.bytes)
        self.oracles.chunk = max(1, min(LARGEST_CHUNK, _memory(self.y.device) // size))
        for part, found in (("Hessian", self.product), ("cross derivative", cross)):
            gap = self._gap(part, found)
            if gap is not None:
                raise RuntimeError(
                    f"a product with the {part} differs by {gap:.0%} from differences of gradients (an operation hides "
                    "its second derivative)"
                )

    def check_repeated(self) -> None:
        """Refuse an objective whose product changes from call to call; let HVPs go one by one where batches err."""
        core = self._core()
        again = self._batched(core)
        if again is None or _apart(again, self.product) > torch.finfo(self.y.dtype).eps ** 0.5:
            self.oracles.chunk = 1
            again = core.hvp(self.v)
        gap = _apart(again, self.product)
        if gap > 1e-3:
            raise NonDeterministic(
                f"two identical products with the Hessian of the lower objective differ by {gap:.0%} at step 0: "
                "its randomness does not come from torch's global generator, or it depends on state of its own. Draw "
                "from torch's global generator (it is seeded for each step), or from the batch."
            )

    def _batched(self, core: SecondDerivatives) -> Tensor | None:
        """Return the product as one of a batch; None if an operation has no batched form, or a slow one."""
        if self.oracles.chunk == 1:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                return core.hvps(torch.stack([self.v, self.v.flip(-1)]), 2)[0]
            except (RuntimeError, NotImplementedError, UserWarning):
                return None

    def _core(self) -> SecondDerivatives:
        oracles = self.oracles
        return second_derivatives(oracles.way, oracles.lower_at(0), oracles.x_layout, oracles.y_layout, self.x, self.y)

    def _gap(self, part: str, found: Tensor) -> float | None:
        """Return the relative error of a product, None if differences of gradients do not speak against it."""
        (coarse, rounding), (fine, _) = self._differences(1.0)[part], self._differences(0.1)[part]
        size, error = coarse.norm(), (found - coarse).norm()
        # A gradient that is small by cancellation leaves more error than it shows: the spread of two steps sees it.
        known = 10 * (coarse - fine).norm() + 100 * rounding + torch.finfo(self.y.dtype).eps ** 0.25 * size
        if not bool(error > known):
            return None
        # Where the objective bends within both steps, still shorter ones approach the product; hidden terms never do.
        if any(bool((found - self._differences(shrink)[part][0]).norm() < 0.5 * error) for shrink in FINER):
            return None
        return float(error / size)

    def _differences(self, shrink: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Return differences of gradients for H v and J^T v at one step size, and their errors from rounding."""
        if shrink not in self._seen:
            self._seen[shrink] = dict(
                zip(("Hessian", "cross derivative"), self._difference.both(self.v, shrink=shrink), strict=True)
            )
        return self._seen[shrink]

    @cached_property
    def _difference(self) -> Differences:
        oracles = self.oracles
        return Differences(oracles.lower_at(0), oracles.x_layout, oracles.y_layout, self.x, self.y)


def _memory(device: torch.device) -> int:
    if device.type != "cuda":
        return MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    return free // 4


class GraphBytes:
    """Adds up what autograd saves while the block runs."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved)

    def _pack(self, tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self._seen:
            self._seen.add(pointer)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    def __enter__(self) -> GraphBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
