"""The lower level alone, minimized at one x."""

from bilevel.lower_level.minimizers import LowerMinimum, minimize, minimize_proximal, minimize_smooth
from bilevel.lower_level.solution import LowerSolution, solve_lower

__all__ = ["LowerMinimum", "LowerSolution", "minimize", "minimize_proximal", "minimize_smooth", "solve_lower"]
