"""Hypergradients from oracles, each with a certificate."""

from bilevel.hypergradients._base import Certificate, Estimate, Estimator, Hypergradient
from bilevel.hypergradients.active_set import ActiveSet
from bilevel.hypergradients.evaluate import hypergradient
from bilevel.hypergradients.implicit import Implicit
from bilevel.hypergradients.implicit_function import implicit_function
from bilevel.hypergradients.kkt import ImplicitKKT, KKTPoint

__all__ = [
    "ActiveSet",
    "Certificate",
    "Estimate",
    "Estimator",
    "Hypergradient",
    "Implicit",
    "ImplicitKKT",
    "KKTPoint",
    "hypergradient",
    "implicit_function",
]
