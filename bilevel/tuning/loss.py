"""The loss of each example, plain for validation, and weighted and smoothed for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.status import InvalidProblem


@dataclass(frozen=True)
class Loss:
    """What training and validation minimize: cross-entropy for integer targets, squared error else, or the user's own.

    Args:
        function: `(outputs, targets) -> [n]`, or a mean `[]`; None: one of the two.
        classes: K for cross-entropy, None for anything else.
    """

    function: Callable[[Any, Any], Tensor] | None
    classes: int | None

    @classmethod
    def of(cls, function: Any, outputs: Any, targets: Tensor, labels: tuple[int, int] | None) -> Loss:
        """Return the loss that fits outputs and targets.

        Raises:
            InvalidProblem: none does, or the user's function returns something else than a loss.
        """
        if function is not None:
            if not callable(function):
                raise InvalidProblem(f"loss must be a function of (outputs, targets), got {function!r}.")
            value = function(outputs, targets)
            if not isinstance(value, Tensor) or tuple(value.shape) not in ((), (len(targets),)):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InvalidProblem(f"loss must return one number an example [n], or their mean [], got {got}.")
            return cls(function, None)
        if not isinstance(outputs, Tensor):
            raise InvalidProblem(f"the model returns a {type(outputs).__name__}; pass loss=... that reads it.")
        if targets.is_floating_point():
            if outputs.numel() != targets.numel():
                raise InvalidProblem(f"outputs {tuple(outputs.shape)} do not fit targets {tuple(targets.shape)}; "
                                     "pass loss=...")  # fmt: skip
            return cls(None, None)
        classes = outputs.shape[1] if outputs.dim() == 2 else 0
        if classes < 2 or targets.dim() != 1 or labels is None:
            raise InvalidProblem(f"integer targets {tuple(targets.shape)} ask for outputs [n, classes], got "
                                 f"{tuple(outputs.shape)}; make targets floats for regression, or pass "
                                 "loss=...")  # fmt: skip
        if not 0 <= labels[0] <= labels[1] < classes:
            raise InvalidProblem(f"labels run from {labels[0]} to {labels[1]}, but the model has {classes} outputs; "
                                 "number classes from 0.")  # fmt: skip
        return cls(None, classes)

    @property
    def by_example(self) -> bool:
        """Whether it is known to give one number an example."""
        return self.function is None

    def plain(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss of each example `[n]`, or the user's mean `[]`."""
        if self.function is not None:
            own: Tensor = self.function(outputs, targets)
            return own
        if self.classes is None:
            squares: Tensor = (outputs.reshape(targets.shape) - targets).square()
            return squares.flatten(1).mean(1) if squares.dim() > 1 else squares
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")

    def training(
        self,
        outputs: Any,
        targets: Tensor,
        smoothing: Tensor | None,
        by_class: Tensor | None,
        by_example: Tensor | None,
    ) -> Tensor:
        """Return the training loss of a batch, 0-dim: that of torch, differentiable in all its options.

            sum_i v_i [(1 - s) w_(t_i) nll_i(t_i) + s / K sum_c w_c nll_i(c)] / sum_i w_(t_i)

        with smoothing s `[]`, weights of classes w `[K]` and of the batch's examples v `[n]`. For v = 1 it is
        `torch.nn.CrossEntropyLoss(w, label_smoothing=s)`.
        """
        if smoothing is None and by_class is None:
            losses = self.plain(outputs, targets)
            return losses.mean() if by_example is None else (by_example * losses).mean()
        assert self.classes is not None
        nll = -outputs.log_softmax(1)
        weights = outputs.new_ones(self.classes) if by_class is None else by_class
        own = weights[targets]
        losses = own * nll.gather(1, targets[:, None]).squeeze(1)
        if smoothing is not None:
            losses = (1 - smoothing) * losses + smoothing / self.classes * (nll @ weights)
        if by_example is not None:
            losses = by_example * losses
        total: Tensor = losses.sum() / own.sum()
        return total
