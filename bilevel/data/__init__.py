"""Where batches come from: a source is a pure function of the step and the seed, so any step can be replayed."""

from bilevel.data._base import DataSource
from bilevel.data.episodes import Episodes, episodes
from bilevel.data.loader import Loader
from bilevel.data.tensors import Full, Shuffled

__all__ = ["DataSource", "Episodes", "Full", "Loader", "Shuffled", "episodes"]
