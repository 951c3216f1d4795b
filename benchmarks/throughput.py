"""Products with a Hessian per second, one by one and batched, at sizes that fill a GPU (tiny ones on a CPU)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel
from benchmarks.measure import added_mb, compare
from bilevel import CG, L2, Full, Implicit, Problem
from bilevel.dry_run import open_oracles
from bilevel.report import Row

COLUMNS = ("task", "method", "ratio", "hvps_per_second", "chunk", "host_waits", "added_mb", "seconds")


@dataclass(frozen=True)
class Net:
    """A network and a batch of inputs and labels."""

    name: str
    module: nn.Module
    inputs: Tensor
    labels: Tensor


class Block(nn.Module):
    """One transformer block and a linear readout of the mean token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.read = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[batch, 10]` of tokens `[batch, length, width]`."""
        batch, length, width = tokens.shape
        parts = self.mixed(self.before(tokens)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*parts.unbind(0))
        tokens = tokens + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        tokens = tokens + self.down(F.gelu(self.up(self.after(tokens))))
        read: Tensor = self.read(tokens.mean(1))
        return read


def nets(device: torch.device, *, small: bool) -> list[Net]:
    """Return an MLP, a CNN and a transformer block with random weights and batches."""
    torch.manual_seed(0)
    wide, batch, side, width, length = (16, 8, 8, 16, 5) if small else (4096, 1024, 32, 768, 256)
    channels = 4 if small else 64
    mlp = nn.Sequential(nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, 10))
    cnn = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.GELU(), nn.Flatten(), nn.Linear(2 * channels * (side // 2) ** 2, 10),
    )  # fmt: skip
    tokens = batch if small else 64
    cases = [
        ("MLP", mlp, torch.randn(batch, wide)),
        ("CNN", cnn, torch.randn(batch, 3, side, side)),
        ("transformer block", Block(width, heads=4 if small else 12), torch.randn(tokens, length, width)),
    ]
    return [
        Net(name, module.to(device), inputs.to(device), torch.randint(0, 10, (len(inputs),)).to(device))
        for name, module, inputs in cases
    ]


def problem_of(net: Net) -> tuple[Problem, Tensor, Any]:
    """Return the problem of one log decay for all weights under math attention, and its starts."""
    model = bilevel.functional(net.module)

    def loss(x: Tensor, y: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(y, batch[0]), batch[1])

    data = Full((net.inputs, net.labels))
    problem = Problem(
        upper=loss, lower=loss, regularizer=L2(weight=lambda x: x.exp()), upper_data=data, lower_data=data,
        hvp="math_attention",
    )  # fmt: skip
    return problem, torch.zeros((), device=net.inputs.device), model.parameters()


def rows_of(net: Net, vectors: int, pairs: int) -> list[Row]:
    """Return rows of one network: the bare products as the floor, the library's one by one, batched, and inside CG."""
    device = net.inputs.device
    problem, x0, y0 = problem_of(net)
    oracles, x, y = open_oracles(problem, x0, y0)
    linearization = oracles.linearize_lower(x, y)
    draws = torch.randn(vectors, len(y), generator=torch.Generator().manual_seed(0)).to(device)
    bare = _bare(net)
    estimator = Implicit(linear=CG(tol=0.0, max_steps=vectors - 1), truncate=True)

    def floor() -> None:
        for v in draws:
            bare(v)

    def loop() -> None:
        for v in draws:
            linearization.hvp(v)

    def solve() -> None:
        estimator.estimate(oracles, x, y, estimator.init(oracles, x, y))

    works: dict[str, Callable[[], Any]] = {
        "floor": floor,
        "hvps loop": loop,
        "hvps batched": lambda: linearization.hvps(draws),
        "hypergradient": solve,
    }
    rows = []
    for name, work in works.items():
        timing = compare(work, floor, pairs, device)
        rows.append(
            {
                "task": net.name,
                "method": name,
                "ratio": timing.ratio,
                "hvps_per_second": vectors / timing.seconds,
                "chunk": oracles.chunk if name == "hvps batched" else 1,
                "host_waits": host_waits(work, device),
                "added_mb": added_mb(work, device),
                "seconds": timing.seconds,
                "variables": len(y),
            }
        )
    return rows


def _bare(net: Net) -> Callable[[Tensor], list[Tensor]]:
    """Return v -> H v of the loss without decay, leaf by leaf, over a retained graph."""
    leaves = [leaf.detach().requires_grad_() for leaf in net.module.parameters()]
    names = [name for name, _ in net.module.named_parameters()]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = torch.func.functional_call(net.module, dict(zip(names, leaves, strict=True)), (net.inputs,))
        loss = F.cross_entropy(logits, net.labels)
        slopes = torch.autograd.grad(loss, leaves, create_graph=True)
    sizes = [leaf.numel() for leaf in leaves]

    def product(v: Tensor) -> list[Tensor]:
        parts = [part.view_as(leaf) for part, leaf in zip(v.split(sizes), leaves, strict=True)]
        return list(torch.autograd.grad(slopes, leaves, parts, retain_graph=True))

    return product


def host_waits(work: Callable[[], Any], device: torch.device) -> int | None:
    """Return how often the host waits for the device during one call; None without a CUDA device."""
    if device.type != "cuda":
        return None
    work()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchroniz" in str(warning.message) for warning in seen)


def measure(device: torch.device, *, quick: bool = False) -> list[Row]:
    """Return the rows of all networks on one device."""
    small = quick or device.type != "cuda"
    rows: list[Row] = []
    for net in nets(device, small=small):
        rows += rows_of(net, vectors=4 if small else 20, pairs=3 if small else 10)
    return rows
