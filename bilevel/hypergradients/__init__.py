"""Hypergradients from oracles, each with a certificate."""

from bilevel.hypergradients._base import Certificate, Estimate, Estimator, Hypergradient, TrainingRun
from bilevel.hypergradients.active_set import ActiveSet
from bilevel.hypergradients.evaluate import hypergradient
from bilevel.hypergradients.first_order import FirstOrder
from bilevel.hypergradients.forward import ForwardMode
from bilevel.hypergradients.implicit import Implicit
from bilevel.hypergradients.implicit_function import implicit_function
from bilevel.hypergradients.kkt import ImplicitKKT, KKTPoint
from bilevel.hypergradients.metagradient import metagradient
from bilevel.hypergradients.metasmoothness import Metasmoothness, metasmoothness
from bilevel.hypergradients.one_step import OneStep
from bilevel.hypergradients.selection import PoolGradient
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.hypergradients.zeroth_order import PES, ZerothOrder

__all__ = [
    "PES",
    "ActiveSet",
    "Certificate",
    "Estimate",
    "Estimator",
    "FirstOrder",
    "ForwardMode",
    "Hypergradient",
    "Implicit",
    "ImplicitKKT",
    "KKTPoint",
    "Metasmoothness",
    "OneStep",
    "PoolGradient",
    "TrainingRun",
    "Unrolled",
    "ZerothOrder",
    "hypergradient",
    "implicit_function",
    "metagradient",
    "metasmoothness",
]
