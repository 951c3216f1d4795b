"""An nn.Module as a pure function of its parameters."""

from bilevel.modules.functional import FunctionalModule, functional
from bilevel.modules.weight_norm import weight_norm

__all__ = ["FunctionalModule", "functional", "weight_norm"]
