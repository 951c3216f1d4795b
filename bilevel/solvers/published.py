"""Published methods as settings of `HypergradientDescent`: each constructor is one paper."""

from __future__ import annotations

from typing import Any

from bilevel.hypergradients.first_order import FirstOrder
from bilevel.hypergradients.implicit import Implicit
from bilevel.hypergradients.one_step import OneStep
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.linear import CG, LinearSolver, Neumann, Nystrom
from bilevel.optimizers import SGD, Adam, Optimizer
from bilevel.replay import Schedule, Sqrt
from bilevel.solvers.hypergradient_descent import HypergradientDescent
from bilevel.status import InvalidProblem


def implicit(linear: LinearSolver | None = None, **options: Any) -> HypergradientDescent:
    """Descend along implicit hypergradients, by default with CG, to a tolerance and with warm starts.

    Args:
        linear: solver of `H w = df/dy`; `CG()` if None.
        options: of `HypergradientDescent`, except `estimator`.

    References:
        Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016 (Algorithm 1).

    Example:
        >>> import bilevel
        >>> implicit(linear=bilevel.CG(max_steps=8), lower_steps=5).lower_steps
        5
    """
    return HypergradientDescent(estimator=Implicit(linear=CG() if linear is None else linear), **options)


def neumann(terms: int = 20, alpha: float | None = None, **options: Any) -> HypergradientDescent:
    """Approximate the inverse Hessian by a truncated Neumann series; `terms=0` is the T1-T2 (identity) method.

    Its bias does not vanish: about `(1 - alpha mu)^(terms + 1)` of the implicit part, with the least curvature mu.

    Args:
        terms: HVPs of each hypergradient, >= 0.
        alpha: scale of the lower curvature, 0 < alpha < 2 / (largest curvature); measured if None.
        options: of `HypergradientDescent`, except `estimator`.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", AISTATS 2020
        (Algorithms 2 and 3). Luketina et al., "Scalable gradient-based tuning of continuous regularization
        hyperparameters", ICML 2016, is `terms=0`.
    """
    return HypergradientDescent(
        estimator=Implicit(linear=Neumann(terms=terms, alpha=alpha), warm_start=False, truncate=True), **options
    )


def amigo(lower_steps: int = 10, linear_steps: int = 10, **options: Any) -> HypergradientDescent:
    """Take a few warm-started gradient steps on y and on the linear system for each step of x.

    Args:
        lower_steps: SGD steps on y.
        linear_steps: gradient steps on `w^T H w / 2 - w^T df/dy`.
        options: of `HypergradientDescent`, except `estimator`; `lower` is SGD with a measured step length by default.

    References:
        Arbel, Mairal, "Amortized implicit differentiation for stochastic bilevel optimization", ICLR 2022
        (Algorithm 1). Here the upper step is Adam's by default, the paper's is SGD.
    """
    linear = Neumann(terms=linear_steps - 1)
    lower = options.pop("lower", SGD(lr=None))
    return HypergradientDescent(
        lower=lower, lower_steps=lower_steps, estimator=Implicit(linear=linear, truncate=True), **options
    )


def imaml(lower_steps: int = 16, linear_steps: int = 5, **options: Any) -> HypergradientDescent:
    """Implicit MAML: few gradient steps on a proximally regularized task, then few CG steps.

    State the proximal term `lambda / 2 ‖y - x‖^2` in the lower objective, several tasks as `Problem(blocks=...)`, and
    the start of adaptation as `lower_init`: with one, every step restarts there, as in the paper.

    Args:
        lower_steps: gradient steps of each adaptation (16 in the paper's Omniglot runs).
        linear_steps: CG steps (5 there).
        options: of `HypergradientDescent`, except `estimator`.

    References:
        Rajeswaran, Finn, Kakade, Levine, "Meta-learning with implicit gradients", NeurIPS 2019 (Algorithms 1 and 2).
    """
    lower = options.pop("lower", SGD(lr=None))
    options.setdefault("restart_lower", None)
    estimator = Implicit(linear=CG(max_steps=linear_steps), truncate=True)
    return HypergradientDescent(lower=lower, lower_steps=lower_steps, estimator=estimator, **options)


def nystrom(rank: int = 10, rho: float = 1e-2, **options: Any) -> HypergradientDescent:
    """Invert a low-rank sketch of the Hessian, `(H_k + rho I)^-1`: `rank` HVPs, all at once.

    Its bias does not vanish where eigenvalues outside the sketch exceed rho.

    Args:
        rank: of the sketch, at most the number of lower variables.
        rho: > 0, in the units of the Hessian: added to every eigenvalue.
        options: of `HypergradientDescent`, except `estimator`.

    References:
        Hataya, Yamada, "Nystrom method for accurate and scalable implicit differentiation", AISTATS 2023.
    """
    return HypergradientDescent(estimator=Implicit(linear=Nystrom(rank=rank, damping=rho), warm_start=False), **options)


def unrolled(
    lower: Optimizer[Any] | None = None,
    lower_steps: int = 20,
    *,
    truncate: int | None = None,
    restart: bool | None = None,
    schedule: Schedule | None = None,
    microbatches: int = 1,
    **options: Any,
) -> HypergradientDescent:
    """Differentiate through the lower steps of each upper step, by reverse mode with bounded memory.

    Args:
        lower: optimizer of y; `SGD(lr=None)` if None. Its hyperparameters may be functions of `(x, step)`.
        lower_steps: steps of each training.
        truncate: differentiate through the last so many of them only.
        restart: start each training anew; None: where the problem has a lower_init. If not, y goes on from where it
            was, and the gradient stops there.
        schedule: which states to hold; `Sqrt()` if None.
        microbatches: parts of each batch that are differentiated one by one.
        options: of `HypergradientDescent`: upper, clip_norm, certify_every.

    References:
        Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based hyperparameter optimization", ICML
        2017 (Algorithm 1); with `truncate`, Shaban, Cheng, Hatch, Boots, "Truncated back-propagation for bilevel
        optimization", AISTATS 2019.

    Example:
        >>> import bilevel, torch
        >>> task = bilevel.problems.scalar()
        >>> solution = bilevel.solve(task.problem, unrolled(), task.x0, task.y0, steps=100)
        >>> abs(float(solution.x) - float(task.problem.reference)) < 1e-2
        True
    """
    estimator = Unrolled(
        lower=SGD(lr=None) if lower is None else lower,
        steps=lower_steps,
        restart=restart,
        truncate=truncate,
        schedule=Sqrt() if schedule is None else schedule,
        microbatches=microbatches,
    )
    return HypergradientDescent(estimator=estimator, lower_steps=0, **options)


def maml(lr: float = 0.1, lower_steps: int = 1, *, first_order: bool = False, **options: Any) -> HypergradientDescent:
    """Model-agnostic meta-learning: learn a start from which few gradient steps adapt to a task.

    State the start as `lower_init`, several tasks as `Problem(blocks=...)`; the lower objective is a task's loss on its
    support examples, the upper one on its query examples. The lower batches of upper step u are u T to u T + T - 1.

    Args:
        lr: of the adaptation (0.4 for Omniglot and 0.01 for miniImageNet in the paper).
        lower_steps: T, steps of each adaptation.
        first_order: leave out second derivatives.
        options: of `HypergradientDescent`: upper, clip_norm, certify_every.

    References:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017
        (Algorithm 1).

    Example:
        >>> import bilevel, torch
        >>> problem = bilevel.Problem(  # tasks y -> t_i; the best start is between their targets
        ...     upper=lambda x, y, t: 0.5 * (y - t).square(), lower=lambda x, y, t: 0.5 * (y - t).square() + 0 * x,
        ...     upper_data=bilevel.Full(torch.tensor([1.0, 3.0])), lower_data=bilevel.Full(torch.tensor([1.0, 3.0])),
        ...     lower_init=lambda x: x.expand(2), blocks=2)
        >>> solution = bilevel.solve(problem, maml(), torch.tensor(0.0), steps=200)
        >>> round(float(solution.x), 2)
        2.0
    """
    common: dict[str, Any] = {"lower": SGD(lr), "steps": lower_steps, "fresh": True}
    estimator = FirstOrder(**common) if first_order else Unrolled(**common)
    return HypergradientDescent(estimator=estimator, lower_steps=0, **options)


def reptile(lr: float = 0.1, lower_steps: int = 5, **options: Any) -> HypergradientDescent:
    """Reptile: move a start toward the weights that training reaches from it.

    The problem is stated as for `maml`; the upper objective is only reported, apart from a part that x enters directly.

    Args:
        lr: of the adaptation.
        lower_steps: steps of each adaptation.
        options: of `HypergradientDescent`: upper (`SGD(1.0)` and less in the paper), clip_norm.

    References:
        Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018, arXiv 1803.02999 (Algorithm 1).
    """
    options.setdefault("upper", SGD(0.5))
    estimator = FirstOrder(lower=SGD(lr), steps=lower_steps, fresh=True, reptile=True)
    return HypergradientDescent(estimator=estimator, lower_steps=0, **options)


def darts(
    lr: Any = 0.025, momentum: float = 0.9, *, order: int = 2, differences: bool = False, **options: Any
) -> HypergradientDescent:
    """Differentiable architecture search: one lower step, then one upper step that looks one lower step ahead.

        order 2:  h = d/dx f(x, y - lr dg/dy(x, y));   order 1:  h = df/dx(x, y)

    The virtual step is without momentum and on the batch that the next lower step will see. As y is never near y*(x),
    x does not converge to a solution of the bilevel problem: where the lower curvature is mu, one step sees only the
    fraction lr mu of the response of y to x, and order 1 none of it. On a quadratic it stops elsewhere. It is a cheap
    heuristic for large networks; `unrolled()` and `implicit()` are what to compare it with.

    Args:
        lr: of the lower steps and of the virtual one: a number, or a schedule such as `Cosine`.
        momentum: of the lower steps.
        order: 2, or 1 for the direct part alone.
        differences: the second-order part by central differences of gradients, as in the paper; if not, it is exact.
        options: of `HypergradientDescent`: upper (Adam with the paper's 3e-4, betas (0.5, 0.999), decay 1e-3 by
            default; few steps want a larger lr), lower_steps (1), clip_norm.

    Raises:
        InvalidProblem: order is neither 1 nor 2.

    References:
        Liu, Simonyan, Yang, "DARTS: differentiable architecture search", ICLR 2019 (Algorithm 1; equation 8 for
        `differences`).

    Example:
        >>> import bilevel, torch
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, batch: (y - 1.0).square() / 2, lower=lambda x, y, batch: (y - x).square() / 2)
        >>> solver = darts(0.5, momentum=0.0, upper=bilevel.SGD(0.5))
        >>> solution = bilevel.solve(problem, solver, torch.tensor(0.0), torch.tensor(0.0), steps=100)
        >>> round(float(solution.x), 2)
        1.0
    """
    if order not in (1, 2):
        raise InvalidProblem(f"darts(order=...) must be 1 or 2, got {order}.")
    options.setdefault("upper", Adam(3e-4, betas=(0.5, 0.999), weight_decay=1e-3))
    options.setdefault("lower_steps", 1)
    estimator = OneStep(lr if order == 2 else 0.0, differences=differences)
    return HypergradientDescent(lower=SGD(lr, momentum), estimator=estimator, **options)
