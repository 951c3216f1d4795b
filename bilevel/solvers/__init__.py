"""Solvers: one published method, one file (or one constructor). `__all__` is what contract tests, CLI and docs iterate."""

from bilevel.solvers.hypergradient_descent import HypergradientDescent
from bilevel.solvers.published import amigo, imaml, implicit, neumann, nystrom

__all__ = ["HypergradientDescent", "amigo", "imaml", "implicit", "neumann", "nystrom"]
