"""Pure, differentiable optimizers, and a deterministic minimizer."""
