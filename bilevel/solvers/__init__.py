"""Solvers. `__all__` is what contract tests, the command line and the docs iterate."""

from bilevel.solvers.hypergradient_descent import HypergradientDescent
from bilevel.solvers.published import amigo, imaml, implicit, neumann, nystrom

__all__ = ["HypergradientDescent", "amigo", "imaml", "implicit", "neumann", "nystrom"]
