"""Optimizers as pure, differentiable maps; schedules; a deterministic minimizer."""

from bilevel.optimizers._base import Minimum, Optimizer
from bilevel.optimizers.adam import Adam, AdamW
from bilevel.optimizers.coordinate_descent import CoordinateDescent
from bilevel.optimizers.from_torch import from_torch
from bilevel.optimizers.lbfgs import LBFGS
from bilevel.optimizers.proximal import ProximalGradient
from bilevel.optimizers.schedules import Cosine, Power, StepDecay
from bilevel.optimizers.sgd import SGD

__all__ = [
    "LBFGS",
    "SGD",
    "Adam",
    "AdamW",
    "CoordinateDescent",
    "Cosine",
    "Minimum",
    "Optimizer",
    "Power",
    "ProximalGradient",
    "StepDecay",
    "from_torch",
]
