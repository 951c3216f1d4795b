"""A tiny distillation in float64, small enough for finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bilevel.problems import Part
from bilevel.problems import distillation as dd

SHAPE, CLASSES = (1, 4, 4), 3


@pytest.fixture
def data() -> Part:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat(8)
    centers = torch.randn((CLASSES, *SHAPE), generator=generator, dtype=torch.float64)
    noise = torch.randn((len(labels), *SHAPE), generator=generator, dtype=torch.float64)
    return Part(centers[labels] + 0.3 * noise, labels)


@pytest.fixture
def network() -> dd.Network:
    return dd.conv_net(3, depth=1, norm="none", activation="tanh", shape=SHAPE, classes=CLASSES)


@pytest.fixture
def difference() -> Callable[..., list[float]]:
    """Return (function of a flat x, x, direction) -> central differences at two step sizes."""

    def differences(function: Any, x: torch.Tensor, direction: torch.Tensor) -> list[float]:
        steps = [h / float(direction.norm()) for h in (1e-4, 1e-5)]
        return [float(function(x + h * direction) - function(x - h * direction)) / (2 * h) for h in steps]

    return differences
