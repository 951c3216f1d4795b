"""Closed convex sets, given by their Euclidean projections."""

from bilevel.sets._base import Projection, Set
from bilevel.sets.balls import Ball, L1Ball, Simplex
from bilevel.sets.elementwise import Box, NonNegative
from bilevel.sets.joint import JointHalfspace, JointPolyhedron
from bilevel.sets.linear import Affine, Halfspace
from bilevel.sets.product import Product

__all__ = [
    "Affine",
    "Ball",
    "Box",
    "Halfspace",
    "JointHalfspace",
    "JointPolyhedron",
    "L1Ball",
    "NonNegative",
    "Product",
    "Projection",
    "Set",
    "Simplex",
]
