"""Linear solvers for (A + damping I) w = b, row by row, each with an honest status."""

from bilevel.linear._base import LinearSolution, LinearSolver, Operator
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.gmres import GMRES
from bilevel.linear.identity import Identity
from bilevel.linear.mfac import MFAC
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_cg import NormalCG
from bilevel.linear.nystrom import Nystrom, NystromPreconditioner
from bilevel.linear.preconditioners import Jacobi, Preconditioner, Prepared
from bilevel.linear.sama import Sama

__all__ = [
    "CG",
    "GMRES",
    "MFAC",
    "MINRES",
    "Dense",
    "Identity",
    "Jacobi",
    "LinearSolution",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "NystromPreconditioner",
    "Operator",
    "Preconditioner",
    "Prepared",
    "Sama",
]
