"""How a module, its data and a search space become a `Problem`."""

from bilevel.tuning.examples import Held, Training, held_out, labels_of, training
from bilevel.tuning.loss import Loss
from bilevel.tuning.statement import Statement, state

__all__ = ["Held", "Loss", "Statement", "Training", "held_out", "labels_of", "state", "training"]
