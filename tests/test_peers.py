"""Defects found in other bilevel libraries, at our doors: each test fails on the defect it names.

Those of linear algebra and of optimizers are tested next to the code that could have them, in tests/linear and
tests/optimizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bilevel
from bilevel import (
    CG,
    SGD,
    Dense,
    History,
    Implicit,
    LinearSolveFailed,
    LinearSolver,
    Neumann,
    NonFinite,
    Problem,
    Session,
    Solver,
    Status,
    hypergradient,
    solvers,
)
from bilevel.layout import named_leaves

NAMES = solvers.__all__


def make(name: str, **options: Any) -> Solver[Any]:
    solver: Solver[Any] = getattr(solvers, name)(**options)
    return solver


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def track(x: Tensor, y: Tensor, _: Any) -> Tensor:
    return 0.5 * (y - x).square().sum()


def far(x: Any, y: Tensor, _: Any) -> Tensor:
    return 0.5 * (y - 3).square().sum()


@pytest.mark.parametrize("linear", [CG(), CG(max_steps=1), Dense(), Neumann()], ids=["cg", "cg-1", "dense", "neumann"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_dimensional_problems_keep_their_implicit_term(linear: LinearSolver, shape: tuple[int, ...]) -> None:
    """A CG that leaves its loop at the tolerance before it commits the iterate: exactly 0 in one dimension."""
    x = torch.ones(shape, dtype=torch.float64)
    found = hypergradient(Problem(upper=far, lower=track), x, x, estimator=Implicit(linear=linear)).gradient
    torch.testing.assert_close(found, torch.full_like(x, -2.0), rtol=2e-2, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1e3])
def test_the_scale_of_the_lower_objective_changes_nothing(scale: float) -> None:
    """A scale of the curvature in the step length of CG, but not in its residual: 318 % error at one half."""
    a = draw(6, 6)
    a = a @ a.T + torch.eye(6).double()
    b = draw(6, seed=1)

    def lower(x: Tensor, y: Tensor, _: Any) -> Tensor:
        return 0.5 * y @ a @ y - x @ y

    x = draw(6, seed=2)
    y = torch.linalg.solve(a, x)
    for steps in (2, 6, 30):
        estimator = Implicit(linear=CG(tol=1e-12, max_steps=steps), truncate=True)
        plain, scaled = (
            hypergradient(
                Problem(upper=lambda x, y, _: y @ b, lower=lambda x, y, _, c=c: c * lower(x, y, _)),
                x, y, estimator=estimator, certify=False,
            ).gradient
            for c in (1.0, scale)
        )  # fmt: skip
        torch.testing.assert_close(plain, scaled, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(plain, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-10)


def test_ten_steps_of_cg_solve_ten_unknowns() -> None:
    """A direction from the residual before: 120 % error after ten steps."""
    task = bilevel.problems.quadratic(d=10, condition=100.0)
    problem = task.problem
    assert problem.lower_solution is not None
    x = draw(4).requires_grad_()
    (expected,) = torch.autograd.grad(problem.upper(x, problem.lower_solution(x), None), x)
    y = problem.lower_solution(x.detach())
    found = hypergradient(problem, x, y, estimator=Implicit(linear=CG(tol=0, max_steps=10), truncate=True))
    torch.testing.assert_close(found.gradient, expected, rtol=1e-6, atol=1e-9)


def test_a_diverging_series_is_an_error() -> None:
    """A Neumann series with too long a step grew to 1e11 and was returned."""
    problem = Problem(upper=far, lower=lambda x, y, b: 100 * track(x, y, b) + y.pow(2)[0])
    with pytest.raises(LinearSolveFailed, match="diverged"):
        hypergradient(problem, draw(3), draw(3), estimator=Implicit(linear=Neumann(terms=100, alpha=1.0)))


def leaves_in_play() -> tuple[Problem, dict[str, Tensor], dict[str, Tensor]]:
    """A problem in which x enters above, below, in the declared term and in both objectives, all from a bad start."""
    problem = Problem(
        upper=lambda x, y, b: (
            (y["w"] - 2).square().sum() + (x["above"] - 1).square().sum() + (x["both"] * y["w"]).sum()
        ),
        lower=lambda x, y, b: (y["w"] - x["below"] - x["both"]).square().sum(),
        regularizer=bilevel.L2(lambda x: x["decay"].exp()),
    )
    x = {"above": torch.zeros(2), "below": torch.zeros(12), "both": torch.full((12,), 0.1), "decay": torch.zeros(())}
    return problem, {name: leaf.double() for name, leaf in x.items()}, {"w": torch.full((12,), 0.5).double()}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "KKT"])  # which finds that a start is optimal
def test_every_leaf_of_x_moves(name: str) -> None:
    """A penalty that was built without a graph: x never moved, and all ended well."""
    problem, x0, y0 = leaves_in_play()
    solution = bilevel.solve(problem, make(name), x0, y0, steps=3)
    for leaf, start in x0.items():
        assert bool((solution.x[leaf] != start).all()), leaf
    session = Session(problem, make(name), x0, y0)
    for _ in range(3):  # a multiplier that starts at 0 gives x no direction in the first step
        session.step()
    assert all(bool((session.x[leaf] != start).all()) for leaf, start in x0.items())


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_is_left_on_anything(name: str) -> None:
    """Lower gradients that stayed in `.grad` and were added to the hypergradient: 234 % error."""
    problem, x0, y0 = leaves_in_play()
    weight = torch.ones(12, dtype=torch.float64, requires_grad=True)
    module = nn.Linear(12, 1).double()
    module.weight.grad = torch.ones_like(module.weight)
    upper = problem.upper
    problem = Problem(
        upper=lambda x, y, b: upper(x, y, b) + (weight * y["w"]).sum() + module(y["w"]).sum(),
        lower=problem.lower,
        regularizer=problem.regularizer,
    )
    for leaf in (*x0.values(), *y0.values()):
        leaf.requires_grad_()
    plain = bilevel.solve(problem, make(name), x0, y0, steps=2)
    assert all(leaf.grad is None for leaf in (*x0.values(), *y0.values(), weight))
    assert bool((module.weight.grad == 1).all())
    assert module.bias.grad is None
    # Stray gradients do not count: the same run after a backward pass of the user's own.
    sum(leaf.sum() for leaf in (*x0.values(), *y0.values())).backward()
    again = bilevel.solve(problem, make(name), x0, y0, steps=2)
    assert all(torch.equal(leaf, again.x[key]) for key, leaf in plain.x.items())


def test_hypergradients_do_not_accumulate() -> None:
    problem, x0, y0 = leaves_in_play()
    one, two = (hypergradient(problem, x0, y0).gradient for _ in range(2))
    assert all(torch.equal(leaf, two[name]) for name, leaf in one.items())


@pytest.mark.parametrize("where", ["upper", "lower", "overflow"])
def test_nan_hypergradients_are_errors_not_zeros(where: str) -> None:
    """NaN and infinite gradients that were replaced by 0, so that a broken run looks converged."""
    parts: dict[str, Any] = {"upper": far, "lower": track}
    x = y = doubles(0.0, 1.0)
    if where == "upper":
        parts["upper"] = lambda x, y, b: far(x, y, b) + x.square().sum(-1).sub(1).abs().sqrt()
    elif where == "lower":  # the gradient is 0, the curvature infinite
        parts["lower"] = lambda x, y, b: track(x, y, b) + y.abs().pow(1.5).sum()
    else:  # each factor is finite, their product is not
        x, y = torch.ones(2), torch.ones(2)
        parts["upper"] = lambda x, y, b: 1e18 * y.sum()
        parts["lower"] = lambda x, y, b: 0.5e-5 * y.square().sum() - 1e18 * (x * y).sum()
    with pytest.raises(NonFinite):
        hypergradient(Problem(**parts), x, y, estimator=Implicit(linear=Dense(), truncate=True))
    with pytest.raises(NonFinite):
        bilevel.solve(Problem(**parts), bilevel.HypergradientDescent(lower=SGD(lr=1e-9), lower_steps=0), x, y, steps=3)


def test_a_failed_linear_solve_never_drops_the_implicit_term() -> None:
    """A backward CG that failed was answered by zeros: the hypergradient was the direct term alone, without a word."""
    c = doubles(1.0, 2.0, -0.5)
    problem = Problem(
        upper=lambda x, y, b: (y - 1).square().sum() + x.square().sum(),
        lower=lambda x, y, b: 0.5 * (c * y.square()).sum() - (x * y).sum(),
    )
    x, y = doubles(0.3, 0.2, 0.1), doubles(0.0, 0.0, 0.0)
    with pytest.raises(LinearSolveFailed):
        hypergradient(problem, x, y)
    flagged = hypergradient(problem, x, y, estimator=Implicit(truncate=True))
    assert not flagged.certificate.status.ok
    assert bool((flagged.gradient - 2 * x).abs().max() > 0.1)  # not the direct term alone
    solution = bilevel.solve(problem, bilevel.implicit(lower=SGD(lr=0.1), lower_steps=1), x, y, steps=3)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert torch.equal(solution.x, x)


def test_defaults_need_no_configuration() -> None:
    """A default configuration that was built and then not used: the missing argument was read instead."""
    task = bilevel.problems.scalar()
    assert bilevel.solve(task.problem, bilevel.HypergradientDescent(), task.x0, task.y0).status is Status.COMPLETED
    assert Session(task.problem, bilevel.implicit(), task.x0, task.y0).step().status is Status.CONVERGED


def test_early_stopping_works_by_itself_and_twice() -> None:
    """Early stopping that read an attribute which was never set: the first step crashed."""
    task = bilevel.problems.scalar()
    solver = bilevel.implicit(upper=SGD(lr=0.0))
    for _ in range(2):
        stop = bilevel.EarlyStopping(patience=4)
        solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=50, callbacks=[stop])
        assert solution.status is Status.STOPPED
        assert len(solution.history) == 5


def test_an_option_of_the_upper_optimizer_reaches_the_steps() -> None:
    """`maximize=True` that was taken and ignored; options that no test had ever set to anything."""
    task = bilevel.problems.scalar()
    moves = {}
    for maximize in (False, True):
        solver = bilevel.implicit(upper=SGD(lr=0.01, maximize=maximize))
        moves[maximize] = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=1).x
    torch.testing.assert_close(moves[True], -moves[False])


class Appended(list[Any]):
    """A list that only grows, one item at a time."""

    def __setitem__(self, *_: Any) -> None:
        raise AssertionError("a row was rewritten")

    def __iter__(self) -> Any:
        raise AssertionError("all rows were read")


def test_history_appends() -> None:
    """A loss history that was copied and written anew at each step: T² work for T steps."""
    history = History()
    for name in history.columns:
        history._columns[name] = Appended()
    for step in range(50):
        history.append(dict.fromkeys(history.columns, step))
    assert [len(history[name]) for name in history.columns] == [50] * len(history.columns)


def test_a_step_writes_as_much_at_the_end_as_at_the_start(tmp_path: Path) -> None:
    task = bilevel.problems.scalar()
    path = tmp_path / "log.csv"
    written: list[bytes] = []

    def watch(event: bilevel.Event) -> None:
        text = path.read_bytes()
        assert text.startswith(b"".join(written))  # what was there stays there
        written.append(text[len(b"".join(written)) :])

    bilevel.solve(
        task.problem, bilevel.implicit(), task.x0, task.y0, steps=40, callbacks=[bilevel.CSVLogger(path), watch]
    )
    assert max(map(len, written[1:])) < 2 * min(map(len, written[1:]))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log.csv"]


@pytest.mark.parametrize("name", NAMES)
def test_no_call_of_an_objective_goes_uncounted(name: str) -> None:
    """Both losses evaluated once more at each step, for the log: hidden work that no comparison of costs can see."""
    calls = {"upper": 0, "lower": 0}

    def counted(level: str, function: Any) -> Any:
        def call(x: Any, y: Any, b: Any) -> Tensor:
            calls[level] += 1
            value: Tensor = function(x, y, b)
            return value

        return call

    task = bilevel.problems.quadratic()
    problem = Problem(upper=counted("upper", task.problem.upper), lower=counted("lower", task.problem.lower))
    session = Session(problem, make(name), task.x0, task.y0)
    before, spent = dict(calls), session.counts
    for _ in range(3):
        session.step()
    made = sum(calls.values()) - sum(before.values())
    assert made == (session.counts - spent).gradients + (session.counts - spent).values


@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_weight_norm_is_right_through_the_hypergradient(weights: torch.dtype) -> None:
    """The double backward of torch's fused weight normalization is silently wrong; ours agrees with it written out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = parametrizations.weight_norm(nn.Linear(3, 2)).to(weights)
    net = bilevel.functional(module)
    inputs, targets = draw(8, 3).to(weights), draw(8, 2, seed=1).to(weights)
    names = sorted(name for name, _ in named_leaves(net.parameters()))

    def written_out(y: dict[str, Tensor], batch: Tensor) -> Tensor:
        g, v = (y[f"parametrizations.weight.original{i}"] for i in (0, 1))
        return batch @ (v * g / v.norm(dim=1, keepdim=True)).T + y["bias"]

    found = []
    for call in (net, written_out):
        problem = Problem(
            upper=lambda x, y, b, call=call: (call(y, inputs) - 1).square().mean(),
            lower=lambda x, y, b, call=call: (x.sigmoid() * (call(y, inputs) - targets).square().mean(-1)).mean(),
            regularizer=bilevel.L2(1.0),
        )
        x = torch.zeros(8, dtype=weights)
        estimator = Implicit(linear=Dense(), truncate=True)
        found.append(hypergradient(problem, x, net.parameters(), estimator=estimator, certify=False).gradient)
    assert names == ["bias", "parametrizations.weight.original0", "parametrizations.weight.original1"]
    tolerance = 1e-10 if weights == torch.float64 else 1e-4
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance)
