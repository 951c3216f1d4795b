"""Linear solvers for (A + damping I) w = b, row by row, each with an honest status."""

from bilevel.linear._base import LinearSolution, LinearSolver, Operator
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.identity import Identity
from bilevel.linear.neumann import Neumann
from bilevel.linear.preconditioners import Jacobi, Preconditioner, Prepared

__all__ = [
    "CG",
    "Dense",
    "Identity",
    "Jacobi",
    "LinearSolution",
    "LinearSolver",
    "Neumann",
    "Operator",
    "Preconditioner",
    "Prepared",
]
