"""Solvers. `__all__` is what contract tests, the command line and the docs iterate."""

from bilevel.solvers.bamm import BAMM
from bilevel.solvers.bda import BDA
from bilevel.solvers.blocc import BLOCC
from bilevel.solvers.bome import BOME
from bilevel.solvers.f2ba import F2BA
from bilevel.solvers.f2sa import F2SA
from bilevel.solvers.f3sa import F3SA
from bilevel.solvers.g_pbgd import GPBGD
from bilevel.solvers.hypergradient_descent import HypergradientDescent
from bilevel.solvers.kkt import KKT
from bilevel.solvers.lv_hba import LVHBA
from bilevel.solvers.meha import MEHA
from bilevel.solvers.metagradient import Metagradient
from bilevel.solvers.prox_f2sa import ProxF2SA
from bilevel.solvers.published import amigo, imaml, implicit, neumann, nystrom, unrolled
from bilevel.solvers.sparse import SparseDescent
from bilevel.solvers.v_pbgd import VPBGD

__all__ = [
    "BAMM",
    "BDA",
    "BLOCC",
    "BOME",
    "F2BA",
    "F2SA",
    "F3SA",
    "GPBGD",
    "KKT",
    "LVHBA",
    "MEHA",
    "VPBGD",
    "HypergradientDescent",
    "Metagradient",
    "ProxF2SA",
    "SparseDescent",
    "amigo",
    "imaml",
    "implicit",
    "neumann",
    "nystrom",
    "unrolled",
]
