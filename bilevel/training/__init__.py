"""Training as a process: one lower step as a pure function of its state, with its derivative in two stages."""

from bilevel.training.state import Cotangent, Tangent, TrainingState, tensors_of, with_tensors
from bilevel.training.steps import Training

__all__ = ["Cotangent", "Tangent", "Training", "TrainingState", "tensors_of", "with_tensors"]
