"""Checks of what is the user's own: a module's second derivatives, a problem's hypergradient."""

from bilevel.check._probe import Verdict
from bilevel.check.problem import ProblemReport, check
from bilevel.check.second_order import LayerCheck, SecondOrderReport, check_second_order

__all__ = ["LayerCheck", "ProblemReport", "SecondOrderReport", "Verdict", "check", "check_second_order"]
