"""Data cleaning: learn one weight per training example, so that training on the weighted data validates well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel.data import Full, Shuffled
from bilevel.dry_run import open_oracles
from bilevel.modules import FunctionalModule, functional
from bilevel.optimizers import LBFGS
from bilevel.problem import Problem
from bilevel.problems._base import Task
from bilevel.regularizers import L2
from bilevel.status import InvalidProblem


def clean(
    inputs: Any,
    labels: Any,
    validation_inputs: Any,
    validation_labels: Any,
    *,
    net: nn.Module | None = None,
    decay: float = 0.01,
    batch_size: int | None = None,
    train_steps: int | None = None,
    steps: int = 60,
    test: tuple[Any, Any] | None = None,
    true_labels: Any = None,
    name: str = "clean",
    source: str = "",
) -> Task:
    """State the cleaning of classification data with doubtful labels, given a few trusted examples.

        g = mean_i sigmoid(x_i) l_i(y) + decay ‖y‖^2 / 2,   f = mean of l over the trusted examples

    with the cross-entropy `l_i(y) = -log p(label_i | input_i; y)`. After solving, `kept(x)` are the examples to keep.

    Args:
        inputs: `[n, *]`, an array or a tensor; integers become float32.
        labels: `[n]`, classes from 0; some may be wrong.
        validation_inputs: `[m, *]`, trusted.
        validation_labels: `[m]`.
        net: maps inputs `[b, *]` to logits `[b, classes]`; a copy of it is trained, from its parameters as they are. A
            linear softmax model that starts at 0 if None.
        decay: >= 0, of all parameters. It is what keeps f from fitting the trusted examples by heart: with little of
            it, choose it and the steps by trusted examples held back.
        batch_size: of the training data, for what is too large to go through at every step; all of it if None.
        train_steps: L-BFGS steps that train the net before any weight moves, so that the start is near a minimum: away
            from one, a network curves downwards in places, and implicit solvers rightly refuse. None: 300 for a net,
            none for the linear model.
        steps: `task.steps`.
        test: `(inputs, labels)` for `task.evaluate`; no solver sees them.
        true_labels: `[n]`, where they are known: `task.evaluate` then tells how well wrong labels were found.
        name: of the task.
        source: of the data.

    Returns:
        A task whose x `[n]` are logits of weights, all 0 at the start, and whose y are the net's parameters by name.

    Raises:
        InvalidProblem: numbers of examples differ, or labels are not classes from 0.

    References:
        Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based hyperparameter optimization", ICML
        2017 (data hyper-cleaning).

    Example:
        >>> import bilevel
        >>> points, labels = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 0])
        >>> task = clean(points, labels, points, torch.tensor([0, 0, 1, 1]))
        >>> solution = bilevel.solve(task.problem, bilevel.implicit(), task.x0, task.y0, steps=20)
        >>> kept(solution.x)
        tensor([ True,  True,  True, False])
    """
    train = _examples("training", inputs, labels)
    trusted = _examples("validation", validation_inputs, validation_labels)
    classes = int(max(train[1].max(), trusted[1].max())) + 1
    model = functional(_linear(train[0], classes) if net is None else net)

    def lower(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        given, label, index = batch
        return (x[index].sigmoid() * F.cross_entropy(model(y, given), label, reduction="none")).mean()

    def upper(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(y, batch[0]), batch[1])

    count = len(train[1])
    everything = Full((*train, torch.arange(count, device=train[1].device)))
    lower_data = everything if batch_size is None else Shuffled(train, batch_size, with_index=True)
    problem = Problem(upper=upper, lower=lower, upper_data=Full(trusted), lower_data=lower_data, regularizer=L2(decay))
    start = train[0].new_zeros(count)
    y0 = model.parameters()
    more = (0 if net is None else 300) if train_steps is None else train_steps
    if more > 0:
        y0 = _trained(replace(problem, lower_data=everything), start, y0, more)
    evaluate = _judge(
        model,
        None if test is None else _examples("test", *test),
        None if true_labels is None else _examples("true_labels", inputs, true_labels)[1] != train[1],
    )
    return Task(name, problem, start, y0, steps=steps, evaluate=evaluate, source=source)


def kept(x: Tensor) -> Tensor:
    """Return which examples to keep `[n]`: those that weigh no less than at the start, `sigmoid(x) >= 1/2`."""
    return x >= 0


def detection(x: Tensor, wrong: Tensor) -> dict[str, float]:
    """Return how well the examples not kept are those with wrong labels: precision, recall and their harmonic mean.

    Args:
        x: `[n]`, logits of weights.
        wrong: `[n]`, whether each label is wrong.
    """
    dropped = ~kept(x)
    hits = float((dropped & wrong).sum())
    found, present = max(1.0, float(dropped.sum())), max(1.0, float(wrong.sum()))
    return {"f1": 2 * hits / (found + present), "precision": hits / found, "recall": hits / present}


def _judge(
    model: FunctionalModule, test: tuple[Tensor, Tensor] | None, wrong: Tensor | None
) -> Callable[[Any, Any], dict[str, Any]] | None:
    if test is None and wrong is None:
        return None

    def evaluate(x: Any, y: Any) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if test is not None:
            with torch.no_grad():
                said["test_accuracy"] = float((model(y, test[0]).argmax(-1) == test[1]).double().mean())
        return said if wrong is None else said | detection(x, wrong)

    return evaluate


def _trained(problem: Problem, x: Tensor, y: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    oracles, flat_x, flat_y = open_oracles(problem, x, y, needs_hvp=False)
    minimum = LBFGS(tol=1e-5, max_steps=steps).minimize(lambda point: oracles.lower_gradient(flat_x, point), flat_y)
    found: dict[str, Tensor] = oracles.y_layout.unflatten(minimum.y)
    return found


def _linear(inputs: Tensor, classes: int) -> nn.Module:
    layer = nn.Linear(inputs[0].numel(), classes, dtype=inputs.dtype, device=inputs.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), layer)


def _examples(what: str, inputs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    given, label = _tensor(inputs), _tensor(labels)
    if given.dim() == 0 or label.dim() != 1 or len(given) != len(label) or len(label) == 0:
        raise InvalidProblem(
            f"{what}: inputs {tuple(given.shape)} and labels {tuple(label.shape)} must be [n, *] and [n] with n > 0."
        )
    if label.is_floating_point() or label.is_complex() or int(label.min()) < 0:
        raise InvalidProblem(f"{what}: labels must be integers from 0, got {label.dtype} from {label.min()}.")
    return given if given.is_floating_point() else given.float(), label.long()


def _tensor(array: Any) -> Tensor:
    return array.detach() if isinstance(array, Tensor) else torch.tensor(array)
