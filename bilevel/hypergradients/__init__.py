"""Hypergradients from oracles, each with a certificate."""

from bilevel.hypergradients._base import Certificate, Estimate, Estimator, Hypergradient, TrainingRun
from bilevel.hypergradients.active_set import ActiveSet
from bilevel.hypergradients.evaluate import hypergradient
from bilevel.hypergradients.implicit import Implicit
from bilevel.hypergradients.implicit_function import implicit_function
from bilevel.hypergradients.kkt import ImplicitKKT, KKTPoint
from bilevel.hypergradients.metagradient import metagradient
from bilevel.hypergradients.unrolled import Unrolled

__all__ = [
    "ActiveSet",
    "Certificate",
    "Estimate",
    "Estimator",
    "Hypergradient",
    "Implicit",
    "ImplicitKKT",
    "KKTPoint",
    "TrainingRun",
    "Unrolled",
    "hypergradient",
    "implicit_function",
    "metagradient",
]
