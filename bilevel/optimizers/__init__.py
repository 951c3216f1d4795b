"""Optimizers as pure, differentiable maps; schedules; a deterministic minimizer."""

from bilevel.optimizers._base import Linearized, Minimum, Optimizer, Pulled
from bilevel.optimizers.adam import Adam, AdamW
from bilevel.optimizers.coordinate_descent import CoordinateDescent
from bilevel.optimizers.from_torch import from_torch
from bilevel.optimizers.lbfgs import LBFGS
from bilevel.optimizers.online_rate import OnlineRate
from bilevel.optimizers.proximal import ProximalGradient
from bilevel.optimizers.schedules import Cosine, Knots, Power, StepDecay
from bilevel.optimizers.sgd import SGD
from bilevel.optimizers.sign import CountSteps, L1Normalized, Sign

__all__ = [
    "LBFGS",
    "SGD",
    "Adam",
    "AdamW",
    "CoordinateDescent",
    "Cosine",
    "CountSteps",
    "Knots",
    "L1Normalized",
    "Linearized",
    "Minimum",
    "OnlineRate",
    "Optimizer",
    "Power",
    "ProximalGradient",
    "Pulled",
    "Sign",
    "StepDecay",
    "from_torch",
]
