"""Hypergradients from oracles, each with a certificate."""

from bilevel.hypergradients._base import Certificate, Estimate, Estimator, Hypergradient
from bilevel.hypergradients.evaluate import hypergradient
from bilevel.hypergradients.implicit import Implicit

__all__ = ["Certificate", "Estimate", "Estimator", "Hypergradient", "Implicit", "hypergradient"]
