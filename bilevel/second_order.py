"""Choose, once and at the door, how a problem's lower objective is differentiated twice, and prove that it works."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from bilevel.linearization import Differences, SecondDerivatives, second_derivatives
from bilevel.oracles import Oracles
from bilevel.status import NonDeterministic, SecondOrderFallback, SecondOrderUnsupported

CHAIN = ("double_backward", "forward_over_reverse", "math_attention", "differences")
MEMORY = 2**30
LARGEST_CHUNK = 64


def choose(oracles: Oracles, x: Tensor, y: Tensor) -> None:
    """Set `oracles.way` to the first way that gives the right product here, and `oracles.chunk` to what memory allows.

    A way is right if its products agree with differences of gradients wherever two step sizes of those agree with
    each other (at a kink they do not, and then there is no verdict).

    Raises:
        SecondOrderUnsupported: `Problem(hvp=...)` insists on a way that fails, or that is silently wrong.
        NonDeterministic: the same product, computed twice, differs.
    """
    wanted = oracles.problem.hvp
    ways = CHAIN if wanted == "auto" else (wanted,)
    troubles: list[str] = []
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype).to(y.device)
    for way in ways:
        oracles.way = way
        trouble = _trouble(oracles, x, y, v)
        if trouble is None:
            break
        troubles.append(f"{way}: {trouble}")
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
    _check_determinism(oracles, x, y, v)


def _core(oracles: Oracles, x: Tensor, y: Tensor) -> SecondDerivatives:
    return second_derivatives(oracles.way, oracles.lower_at(0), oracles.x_layout, oracles.y_layout, x, y)


def _trouble(oracles: Oracles, x: Tensor, y: Tensor, v: Tensor) -> str | None:
    try:
        with _GraphBytes() as graph:
            core = _core(oracles, x, y)
        product = core.hvp(v)
        core.cross(v)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).strip().splitlines()[0][:200]
    oracles.chunk = max(1, min(LARGEST_CHUNK, _memory(y.device) // max(1, 2 * graph.bytes)))
    if isinstance(core, Differences):
        return None
    differences = Differences(oracles.lower_at(0), oracles.x_layout, oracles.y_layout, x, y)
    coarse, fine = differences.hvp(v), differences.hvp(v, shrink=0.1)
    size = coarse.norm()
    # Rounding of two gradients of size ‖g‖ at the finer step bounds what a comparison can show.
    noise = 100 * torch.finfo(y.dtype).eps ** (2 / 3) * core.gradient.norm() * v.norm() / (1 + y.norm())
    reliable = (coarse - fine).norm() < 0.02 * size and size > noise
    wrong = (product - coarse).norm() > 0.1 * size
    if bool(reliable & wrong):
        gap = float((product - coarse).norm() / size)
        return (
            f"a product differs by {gap:.0%} from differences of gradients (an operation hides its second derivative)"
        )
    return None


def _check_determinism(oracles: Oracles, x: Tensor, y: Tensor, v: Tensor) -> None:
    first, second = _core(oracles, x, y).hvp(v), _core(oracles, x, y).hvp(v)
    gap = (first - second).norm() / first.norm().clamp_min(torch.finfo(y.dtype).tiny)
    if float(gap) > 1e-3:
        raise NonDeterministic(
            f"two identical products with the Hessian of the lower objective differ by {float(gap):.0%} at step 0: its "
            "randomness does not come from torch's global generator, or it depends on state of its own. Draw from "
            "torch's global generator (it is seeded for each step), or from the batch."
        )


def _memory(device: torch.device) -> int:
    if device.type != "cuda":
        return MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    return free // 4


class _GraphBytes:
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

    def __enter__(self) -> _GraphBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
