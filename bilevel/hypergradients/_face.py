"""A problem seen on some entries of y only, the others held: what the smooth estimator needs to work there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.declared import Declared
from bilevel.oracles import Counts, Linearization, Oracles, UpperGradient

Bounds: TypeAlias = tuple[Tensor, Tensor]
"""The least and the largest value of each entry of y, infinite where there is no bound."""


@dataclass(frozen=True)
class Face:
    """A point and which of its entries may move.

    One block: vectors on the face are short, `[k]`. Several blocks, whose faces differ: they keep the shape `[m, d]`
    and are 0 off the face.

    Args:
        y: `[d]` or `[m, d]`.
        free: boolean, shaped like y.
    """

    y: Tensor
    free: Tensor

    @classmethod
    def at(cls, declared: Declared, y: Tensor, box: Bounds) -> Face:
        """Return the face of a point: its entries at no kink and no bound may move."""
        return cls(y, ~(declared.held(y) | (y <= box[0]) | (y >= box[1])))

    @cached_property
    def index(self) -> Tensor | None:
        """Indices of the free entries, None with blocks."""
        return self.free.nonzero().squeeze(-1) if self.y.dim() == 1 else None

    @cached_property
    def empty(self) -> bool:
        """Whether no entry may move."""
        return not bool(self.free.any())

    def drop(self, v: Tensor) -> Tensor:
        """Return the part of v `[*, d]` on the face."""
        return torch.where(self.free, v, 0.0) if self.index is None else v[..., self.index]

    def lift(self, v: Tensor) -> Tensor:
        """Return a vector on the face as one of all entries, 0 off the face."""
        if self.index is None:
            return torch.where(self.free, v, 0.0)
        whole = torch.zeros((*v.shape[:-1], self.y.shape[-1]), dtype=v.dtype, device=v.device)
        return whole.index_copy(-1, self.index, v)

    def place(self, v: Tensor) -> Tensor:
        """Return the point with v on the face and the held values off it."""
        return torch.where(self.free, self.lift(v), self.y)


class FaceView:
    """Both levels as functions of the free entries; see `bilevel.hypergradients._levels.Levels`."""

    def __init__(self, oracles: Oracles, face: Face) -> None:
        self.oracles, self.face = oracles, face
        self._first: FaceLinearization | None = None

    @property
    def counts(self) -> Counts:
        """Calls made so far."""
        return self.oracles.counts

    @property
    def gradient(self) -> Tensor:
        """The whole lower gradient at the first point seen, which is that of the face."""
        assert self._first is not None
        return self._first.whole.gradient

    def mean_curvature(self) -> Tensor:
        """Return the curvature at that point along all free entries at once."""
        assert self._first is not None
        return self._first.mean_curvature()

    def upper_gradient(self, x: Tensor, y: Tensor, step: int = 0) -> UpperGradient:
        """Return f and its gradients, that in y on the face."""
        found = self.oracles.upper_gradient(x, self.face.place(y), step)
        return found._replace(y=self.face.drop(found.y))

    def linearize_lower(self, x: Tensor, y: Tensor, step: int = 0) -> FaceLinearization:
        """Return g differentiated twice along the face."""
        along = FaceLinearization(self.oracles.linearize_lower(x, self.face.place(y), step), self.face)
        self._first = along if self._first is None else self._first
        return along


class FaceLinearization:
    """H and J of the lower level along a face; see `bilevel.oracles.Linearization`."""

    def __init__(self, whole: Linearization, face: Face) -> None:
        self.value, self.gradient = whole.value, face.drop(whole.gradient)
        self.diagonal = None if whole.diagonal is None else face.drop(whole.diagonal)
        self.whole, self._face = whole, face

    def hvp(self, v: Tensor) -> Tensor:
        """Return H_SS v."""
        return self._kept(self.whole.hvp(self._face.lift(v)), v)

    def hvps(self, vectors: Tensor) -> Tensor:
        """Return H_SS applied to k vectors."""
        return self._kept(self.whole.hvps(self._face.lift(vectors)), vectors)

    def mean_curvature(self) -> Tensor:
        """Return the curvature along all free entries at once, 0-dim: one product."""
        v = self._face.drop(torch.ones_like(self._face.y))
        return (v * self.hvp(v)).sum() / v.square().sum()

    def cross(self, v: Tensor) -> Tensor:
        """Return J_S^T v."""
        return self.whole.cross(self._face.lift(v))

    def sample_gradients(self, k: int) -> Tensor:
        """Return k per-example gradients along the face."""
        return self._face.drop(self.whole.sample_gradients(k))

    def _kept(self, product: Tensor, v: Tensor) -> Tensor:
        # With blocks the map is the identity off the face, where right-hand sides are 0: dense solvers see no zeros.
        return self._face.drop(product) if self._face.index is not None else torch.where(self._face.free, product, v)


def held_slack(declared: Declared, y: Tensor, gradient: Tensor, box: Bounds) -> Tensor:
    """Return how firmly entries are held at kinks and bounds, in units of the gradient; inf where they are not.

    At a kink it is the regularizer's slack; at a bound, the slope of the lower objective into the box.

    Args:
        declared: the regularizer at x.
        y: the point.
        gradient: of the lower objective (or Lagrangian), with the part of the regularizer's that exists.
        box: bounds of y.
    """
    low, high = box
    rest = gradient - declared.add_gradient(torch.zeros_like(y), y)
    across = declared.slack(y, torch.zeros_like(y))
    across = torch.where(across.isinf(), 0.0, across)  # the slope of the kink alone, to either side
    slack = torch.where(y <= low, gradient + across, declared.slack(y, rest))
    slack = torch.where(y >= high, across - gradient, slack)
    return torch.where(low == high, torch.inf, slack)


def free_distance(declared: Declared, face: Face, box: Bounds) -> Tensor:
    """Return how far the free entries are from the nearest kink or bound, 0-dim; there must be one."""
    bound = torch.minimum(face.y - box[0], box[1] - face.y)
    return torch.minimum(declared.distance(face.y), bound)[face.free].min()
