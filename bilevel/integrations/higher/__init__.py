"""The inner loops of `higher` on the optimizers of this library: change one import. It does not need `higher`."""

from bilevel.integrations.higher.loop import innerloop_ctx, monkeypatch
from bilevel.integrations.higher.model import FastModel
from bilevel.integrations.higher.optimizer import DifferentiableOptimizer, get_diff_optim

__all__ = ["DifferentiableOptimizer", "FastModel", "get_diff_optim", "innerloop_ctx", "monkeypatch"]
