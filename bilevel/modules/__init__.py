"""An nn.Module as a pure function of its parameters."""

from bilevel.modules.functional import FunctionalModule, functional

__all__ = ["FunctionalModule", "functional"]
