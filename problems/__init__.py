"""Ready problems, imported as `bilevel.problems`. `ready` names those that the command line lists."""

if __name__ != "bilevel.problems":
    raise ImportError("import this package as bilevel.problems, so that its classes exist once")

from bilevel.problems._base import Task
from bilevel.problems.analytic import quadratic, scalar

ready = ("scalar", "quadratic")

__all__ = ["Task", "quadratic", "ready", "scalar"]
