"""Declared terms of the lower objective: everything about them is a formula, nothing is traced through y."""

from bilevel.regularizers._base import Coefficients, Regularizer, Weight
from bilevel.regularizers.groups import GroupL1, SparseGroupL1
from bilevel.regularizers.smooth import L2
from bilevel.regularizers.sparse import L1, ElasticNet

__all__ = ["L1", "L2", "Coefficients", "ElasticNet", "GroupL1", "Regularizer", "SparseGroupL1", "Weight"]
