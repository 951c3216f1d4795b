"""The five-minute door: tune a module's training on held-out examples by hypergradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.callbacks import Callback
from bilevel.hypergradients._base import Certificate
from bilevel.loop import solve
from bilevel.modules import functional
from bilevel.optimizers import SGD, Adam, Optimizer
from bilevel.plan import Auto, Plan, plan
from bilevel.plots import Axes, plot_history, plot_hyperparameters
from bilevel.solution import Solution
from bilevel.solvers import HypergradientDescent, Metagradient
from bilevel.solvers._base import Solver, check_upper
from bilevel.status import InvalidProblem, Status
from bilevel.tuning import Held, Loss, Statement, Training, held_out, labels_of, state, training


@dataclass(frozen=True)
class Tuned:
    """The answer of `tune`.

    Args:
        values: the best hyperparameters, by name and in their own units: floats; by layer a dict of floats; by unit a
            dict of vectors by layer; by input or entry a dict of vectors by parameter; else vectors.
        model: a copy of the module, trained with them, in evaluation mode.
        validation: what the model reaches on the validation examples: `loss`, and with labels `error`, the share of
            wrong ones. The values were chosen by this loss, so it flatters them.
        test: the same on the test examples, which chose nothing; None without them.
        initial: validation loss at the start of the search.
        status: how the search ended.
        message: that, with the numbers of this run.
        certificate: of the last hypergradient; None where the solver forms none.
        plan: why this solver was taken; None if it was given.
        solver: what was taken.
        solution: of the problem behind: history, costs, coordinates.
    """

    values: dict[str, Any]
    model: nn.Module
    validation: dict[str, float]
    test: dict[str, float] | None
    initial: float
    status: Status
    message: str
    certificate: Certificate | None
    plan: Plan | None
    solver: Solver[Any]
    solution: Solution

    def plot_history(self, ax: Axes = None) -> Axes:
        """Draw the validation loss against the steps of the search (needs matplotlib)."""
        ax = plot_history(self.solution, ax, label="validation loss")
        ax.set(ylabel="validation loss")
        return ax

    def plot_values(self, ax: Axes = None) -> Axes:
        """Draw the coordinates of up to 256 hyperparameters, 0 and 1 the ends of their ranges (needs matplotlib)."""
        ax = plot_hyperparameters(self.solution, ax)
        ax.set(ylabel="place in the range", ylim=(-0.02, 1.02))
        return ax

    def __str__(self) -> str:
        lines = [f"{self.status.name.lower()} after {len(self.solution.history)} steps: {self.message}"]
        loss = self.validation["loss"]
        lines.append(f"validation loss {self.initial:.4g} -> {loss:.4g}" + _error(self.validation))
        if self.test is not None:
            lines.append(f"test loss {self.test['loss']:.4g}" + _error(self.test))
        lines += [f"  {name}: {_brief(value)}" for name, value in self.values.items()]
        if self.certificate is not None:
            lines.append(f"hypergradient: {self.certificate}")
        return "\n".join(lines)


def tune(
    model: nn.Module,
    train: Any,
    validation: Any,
    space: Mapping[str, Any],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    test: Any = None,
    steps: int = 30,
    augment: Callable[[Tensor, Any, torch.Generator], Tensor] | None = None,
    batch_size: int | None = None,
    train_steps: int = 200,
    optimizer: Optimizer[Any] | None = None,
    weight_decay: float = 0.0,
    upper: Optimizer[Any] | None = None,
    solver: Solver[Any] | Auto = "auto",
    max_seconds: float = math.inf,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    seed: int = 0,
) -> Tuned:
    """Find the hyperparameters of a module's training that make its validation loss least, by hypergradients.

        minimize  validation loss of y(x)  over x,   y(x) = the module trained with the hyperparameters x

    Args:
        model: the module; training starts from its parameters. It is not changed.
        train: `(inputs, targets)` of tensors, NumPy arrays or pandas frames; a Dataset of such pairs; or a DataLoader.
        validation: likewise. It chooses the values, and is held in memory.
        space: which hyperparameters, each with a range:

            - `"weight_decay"`: weight of `‖y‖² / 2` in the training loss, `Real(low, high, log=True)` for one, or
              `PerLayer`, `PerUnit`, `PerInput`, `PerParameter` of a Real;
            - `"label_smoothing"`: Real within [0, 1];
            - `"class_weight"`: `Weights()`, of the classes in the training loss;
            - `"data_weight"`: `PerExample(Real(0, 1))`, of the training examples;
            - `"augment"`: Real, the strength that `augment` gets, or a dict of Reals, which it gets as a dict;
            - `"lr"`, `"momentum"`: Real, or a schedule: `Curve(Real(...), 5)`, `PerStep(Real(...))`.
        loss: `(outputs, targets) -> [n]`, the loss of each example, or its mean `[]`. None: cross-entropy for integer
            targets, squared error for others.
        test: examples that choose nothing, to judge the answer.
        steps: of the search.
        augment: `(inputs, strength, generator) -> inputs`, differentiable in the strength; it must draw its random
            numbers from the generator.
        batch_size: of training; None: all examples in each step.
        train_steps: of each training, where training itself is differentiated.
        optimizer: of the module: `bilevel.SGD(0.1, momentum=0.9)`, `bilevel.Adam(1e-3)`. None: SGD with momentum 0.9
            and, unless it is tuned, a measured learning rate.
        weight_decay: where the space has none.
        upper: optimizer of the coordinates, which lie in [0, 1]. None: `Adam(0.05)`, a twentieth of the range a step.
        solver: "auto" takes what `bilevel.plan` recommends: `Metagradient`, which trains anew in every step and
            differentiates that training, where the training loss is not convex or the optimizer is tuned; implicit
            differentiation where it is convex. One of your own brings its upper optimizer; a `Metagradient` gets
            `optimizer` and `train_steps` from here.
        max_seconds: stop after the step that exceeds this wall time.
        callbacks: called after each step with an `Event`; one that returns True stops the search.
        progress: show a bar; None shows one on a terminal only.
        seed: of batches, dropout and augmentation.

    Raises:
        InvalidProblem: the data, the space or an option is wrong, or the space touches nothing in the model.
        DataExhausted: there are no examples.
        NonFinite: the data hold NaN, or the losses are not finite at the start.

    Notes:
        The best values are those of the least validation loss seen, and the model that comes back is the one that had
        it. Hundreds of values fit a small validation set too well: look at the test loss. With `Metagradient` that
        model is what training with the values gives, from the module's parameters and on the same batches; the
        implicit solvers go on training one model while the values move. Where training explodes on the way (a rate that
        is too high), the search goes back to the last good values and on with half the steps.

    Example:
        >>> import bilevel
        >>> inputs, noise = torch.randn(2, 40, 9, generator=torch.Generator().manual_seed(0))
        >>> targets = inputs[:, 0] + noise[:, 0]
        >>> tuned = tune(
        ...     nn.Linear(9, 1), (inputs[:20], targets[:20]), (inputs[20:], targets[20:]),
        ...     {"weight_decay": bilevel.PerInput(bilevel.Real(1e-3, 1e1, log=True))})
        >>> tuned.validation["loss"] < tuned.initial
        True
    """
    _check(steps, train_steps, weight_decay)
    if upper is not None and isinstance(solver, Solver):
        raise InvalidProblem(
            "upper belongs to a solver of your own: give it there, as in Metagradient(upper=Adam(0.1))."
        )
    upper = Adam(0.05) if upper is None else upper
    check_upper(upper)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise InvalidProblem(f"optimizer must be one of bilevel's, such as SGD(0.1), or bilevel.from_torch(...), got "
                             f"{type(optimizer).__name__}.")  # fmt: skip
    if not isinstance(model, nn.Module):
        raise InvalidProblem(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    like = next(iter(functional(model).parameters().values()))
    indexed = isinstance(space, Mapping) and "data_weight" in space
    examples = training(train, like, batch_size, indexed=indexed)
    held = held_out(validation, like, "validation")
    unseen = None if test is None else held_out(test, like, "test")
    chosen_loss = _loss(model, loss, examples, held, indexed=indexed)
    statement = state(
        model, examples, held, space, chosen_loss, augment=augment, train_steps=train_steps, weight_decay=weight_decay,
        optimizer=SGD(lr=None, momentum=0.9) if optimizer is None else optimizer,
    )  # fmt: skip
    reason, taken = _solver(statement, solver, upper, seed)
    solution = solve(
        statement.problem, taken, statement.x0, statement.net.parameters(), steps=steps, max_seconds=max_seconds,
        callbacks=callbacks, progress=progress, seed=seed, on_nonfinite="backtrack",
    )  # fmt: skip
    trained = _trained(statement, solution, examples)
    history = solution.history["upper_value"]
    return Tuned(
        values=statement.values(solution.best_x),
        model=trained,
        validation=_judged(trained, held, chosen_loss),
        test=None if unseen is None else _judged(trained, unseen, chosen_loss),
        initial=history[0] if history else solution.best_value,
        status=solution.status,
        message=solution.message,
        certificate=solution.certificate,
        plan=reason,
        solver=taken,
        solution=solution,
    )


def _check(steps: int, train_steps: int, weight_decay: float) -> None:
    for name, value in (("steps", steps), ("train_steps", train_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidProblem(f"{name} must be an int of at least 1, got {value!r}.")
    if not 0 <= weight_decay < math.inf:
        raise InvalidProblem(f"weight_decay must be >= 0, got {weight_decay!r}.")


def _loss(model: nn.Module, loss: Any, examples: Training, held: Held, *, indexed: bool) -> Loss:
    net = functional(model).eval()
    for part, labels in ((examples.first, examples.labels), (held, labels_of(held.targets))):
        few = Held(part.inputs[:8], part.targets[:8])
        with torch.no_grad():
            outputs = net(net.parameters(), few.inputs)
        found = Loss.of(loss, outputs, few.targets, labels)
        if indexed and found.function is not None and found.plain(outputs, few.targets).dim() == 0:
            raise InvalidProblem("data_weight needs the loss of each example: return [n] from loss, no mean.")
    return found


def _solver(
    statement: Statement, solver: Solver[Any] | str, upper: Optimizer[Any], seed: int
) -> tuple[Plan | None, Solver[Any]]:
    if isinstance(solver, Metagradient):
        return None, replace(solver, lower=statement.optimizer, lower_steps=statement.train_steps)
    if isinstance(solver, Solver):
        return None, solver
    if solver != "auto":
        raise InvalidProblem(f"solver must be a Solver such as bilevel.implicit(), or 'auto', got {solver!r}.")
    found = plan(
        statement.problem, statement.x0, statement.net.parameters(),
        lower=statement.optimizer, lower_steps=statement.train_steps, seed=seed,
    )  # fmt: skip
    taken = found.solver()
    if isinstance(taken, Metagradient | HypergradientDescent):
        taken = replace(taken, upper=upper)
    return found, taken


def _trained(statement: Statement, solution: Solution, examples: Training) -> nn.Module:
    """Return the model at the best y, with running statistics of the training inputs."""
    trained = statement.net.module(solution.best_y)
    norms = [part for part in trained.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if any(norm.track_running_stats for norm in norms):
        trained.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over batches
            norm.train()
        with torch.no_grad():
            trained(examples.first.inputs)
    return trained.eval()


def _judged(model: nn.Module, held: Held, loss: Loss) -> dict[str, float]:
    with torch.no_grad():
        outputs = model(held.inputs)
        found = {"loss": float(loss.plain(outputs, held.targets).mean())}
        if loss.classes is not None:
            found["error"] = float((outputs.argmax(1) != held.targets).double().mean())
    return found


def _error(judged: Mapping[str, float]) -> str:
    return f", error {judged['error']:.2%}" if "error" in judged else ""


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping) and all(isinstance(each, float) for each in value.values()):
        return ", ".join(f"{name} {each:.3g}" for name, each in value.items())
    flat = torch.cat([each.flatten() for each in value.values()]) if isinstance(value, Mapping) else value.flatten()
    if len(flat) <= 12:
        return ", ".join(f"{each:.3g}" for each in flat.tolist())
    low, middle, high = (float(each) for each in (flat.min(), flat.median(), flat.max()))
    return f"{len(flat)} values from {low:.3g} to {high:.3g}, median {middle:.3g}"
