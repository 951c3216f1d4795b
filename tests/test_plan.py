"""The plan: what it measures, what it predicts (against the counts of real steps), and what it recommends."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel
from bilevel import CG, SGD, InvalidProblem, Plan, cli, solvers
from bilevel.costs import Sizes, cost_of
from bilevel.dry_run import open_oracles
from bilevel.problems import Task

RECOMMENDED: dict[str, str | None] = {
    "scalar": "implicit(linear=Dense())", "quadratic": "implicit(linear=Dense())", "imaml_quadratic": "imaml()",
    "ridge": "implicit(linear=Dense())", "logistic_regression": "implicit(linear=Dense())",
    "hyper_cleaning": "implicit()",
    "hyper_cleaning_mlp":
        "HypergradientDescent(estimator=Implicit(linear=CG(damping=0.4), truncate=True), lower_steps=100)",
    "lasso": "SparseDescent()", "elastic_net": "SparseDescent()", "sparse_group": "SparseDescent()",
    "svm": "SparseDescent()", "svm_primal": "KKT()", "box": "SparseDescent()", "ineq": "KKT()",
    "lasso1": "SparseDescent()", "llc": "KKT()", "mc": "BAMM()", "mci": "KKT()", "sc": "implicit(linear=Dense())",
    "shen": "implicit(linear=Dense())", "sin": "implicit(linear=Dense())", "wl": "SparseDescent()",
    "glyphs": "maml(lower_steps=3)", "sine": "maml(lower_steps=5)",
    "feature_selection": "implicit(linear=Dense())", "long_tail": "implicit()", "coreset": "implicit()",
    "meta_weight_net": "F2SA()", "augmentation": "F2SA()",
    "weight_decays":
        "HypergradientDescent(estimator=Implicit(linear=CG(damping=2), truncate=True), lower_steps=100)",
    # Made for training; without their lower optimizer only the problem's shape is seen.
    "learning_rates": None, "data_selection": "F2SA()", "robustness_audit": "F2SA()", "cell_search": "F2SA()",
}  # fmt: skip
X = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None] * torch.arange(1, 4, dtype=torch.float64)
T = X.sum(1).sin()


def planned(task: Task) -> Plan:
    return bilevel.plan(task.problem, task.x0, task.y0)


@functools.cache
def ready(name: str) -> tuple[Task, Plan]:
    task = getattr(bilevel.problems, name)()
    return task, planned(task)


SLOW = {
    "glyphs", "weight_decays", "learning_rates", "cell_search", "hyper_cleaning", "hyper_cleaning_mlp",
    "imaml_quadratic", "box", "lasso1", "shen", "mc", "sc",
}  # fmt: skip


def marked(names: Any) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def fit(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(batch[0] @ y, batch[1])


def regression(lower_data: bilevel.DataSource, **fields: Any) -> bilevel.Problem:
    options: dict[str, Any] = {"regularizer": bilevel.L2(lambda x: x.exp()), "upper_data": bilevel.Full((X, T))}
    return bilevel.Problem(upper=fit, lower=fit, lower_data=lower_data, **(options | fields))


# -- recommendations -------------------------------------------------------------------------------------------------


def test_every_ready_problem_has_an_expectation() -> None:
    assert set(RECOMMENDED) == set(bilevel.problems.ready)


@pytest.mark.parametrize("name", marked(RECOMMENDED))
def test_ready_problems_get_a_solver_that_fits(name: str) -> None:
    task, found = ready(name)
    assert found.recommended == RECOMMENDED[name]
    if found.recommended is None:
        assert found.facts.only_through_training is not None
    else:
        found.solver().refuse(task.problem)
    refused = {choice.name for choice in found.choices if not choice.fits}
    for solver in solvers.__all__:
        try:
            getattr(solvers, solver)().refuse(task.problem)
        except InvalidProblem:
            assert solver in refused


@pytest.mark.parametrize("name", marked(name for name, text in RECOMMENDED.items() if text))
def test_what_is_recommended_can_be_written_so(name: str) -> None:
    made = eval(str(RECOMMENDED[name]), {public: getattr(bilevel, public) for public in bilevel.__all__})
    assert ready(name)[1].solver() == made


@pytest.mark.parametrize("name", marked(["scalar", "imaml_quadratic", "box", "lasso1", "mc", "sc", "shen"]))
def test_auto_reaches_the_known_answer(name: str) -> None:
    task = getattr(bilevel.problems, name)()
    solution = bilevel.solve(task.problem, "auto", task.x0, task.y0, steps=task.steps)
    assert solution.status.ok
    assert solution.message.startswith(f"auto took {RECOMMENDED[name]}; ")
    error = task.x_error(solution.x)
    assert error is not None
    assert error < 5e-3


def test_a_lower_optimizer_leads_to_training() -> None:
    task = bilevel.problems.learning_rates()
    assert isinstance(task.solver, bilevel.Metagradient)
    found = bilevel.plan(task.problem, task.x0, task.y0, lower=task.solver.lower, lower_steps=7)
    assert isinstance(found.solver(), bilevel.Metagradient)
    assert found.recommended == "Metagradient(lower=..., lower_steps=7)"


def test_mini_batches_of_a_convex_level_get_amigo() -> None:
    problem = regression(bilevel.Shuffled((X, T), batch_size=10))
    found = bilevel.plan(problem, torch.zeros((), dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert found.recommended == "amigo()"
    assert "mini-batches" in found.reason
    assert found.facts.batch == 10


def test_small_is_dense_and_large_with_unequal_decays_gets_a_preconditioner() -> None:
    wide = torch.randn(50, 150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = bilevel.L2(lambda x: x.exp() * torch.logspace(-2, 2, 150, dtype=torch.float64))
    zero, start = torch.zeros((), dtype=torch.float64), torch.zeros(150, dtype=torch.float64)
    problem = regression(bilevel.Full((wide, wide.sum(1))), upper_data=None)
    problem = dataclasses.replace(problem, upper=lambda x, y, batch: y.square().sum(), regularizer=spread)
    found = bilevel.plan(problem, zero, start)
    assert found.recommended == "implicit(linear=CG(preconditioner=Jacobi()))"
    even = dataclasses.replace(problem, regularizer=bilevel.L2(lambda x: x.exp()))
    assert bilevel.plan(even, zero, start).recommended == "implicit()"


def network_problem(**fields: Any) -> tuple[bilevel.Problem, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = bilevel.functional(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double())

    def loss(x: Tensor, y: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(net(y, batch[0]).squeeze(1), batch[1])

    options: dict[str, Any] = {"lower_data": bilevel.Full((X, T)), "regularizer": bilevel.L2(lambda x: x.exp())}
    problem = bilevel.Problem(upper=loss, lower=loss, upper_data=bilevel.Full((X, T)), **(options | fields))
    return problem, net.parameters()


def test_networks_are_seen_not_to_be_convex() -> None:
    problem, start = network_problem()
    x0 = torch.full((), -6.0, dtype=torch.float64)
    found = bilevel.plan(problem, x0, start)
    assert found.facts.bends_down
    assert found.recommended is not None
    assert "damping" in found.recommended
    assert found.solver().estimator.linear.damping >= abs(found.facts.curvature[0])  # type: ignore[attr-defined, index]
    trained = bilevel.plan(problem, x0, start, lower=SGD(0.1), lower_steps=7)
    assert trained.solver() == bilevel.Metagradient(lower=SGD(0.1), lower_steps=7)
    batches, _ = network_problem(lower_data=bilevel.Shuffled((X, T), batch_size=5))
    assert bilevel.plan(batches, x0, start).recommended == "F2SA()"


def test_x_that_acts_through_training_alone_needs_a_training() -> None:
    problem, start = network_problem(regularizer=None)
    x0 = torch.full((), 0.1, dtype=torch.float64)
    found = bilevel.plan(problem, x0, start)
    assert found.recommended is None
    assert all(not choice.fits for choice in found.choices if choice.family != "through training")
    with pytest.raises(InvalidProblem, match="no solver fits"):
        bilevel.solve(problem, "auto", x0, start)
    learned = SGD(lambda x, step: x)
    found = bilevel.plan(problem, x0, start, lower=learned, lower_steps=5)
    assert found.solver() == bilevel.Metagradient(lower=learned, lower_steps=5)
    assert "through training alone" in found.reason


def test_without_second_derivatives_first_order_solvers_are_left() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            ctx.save_for_backward(value)
            return value.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            doubled: Tensor = 2 * gradients[0] * ctx.saved_tensors[0]
            return doubled

    def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        square: Tensor = Once.apply(y - x)  # type: ignore[no-untyped-call]
        return square.sum()

    for hvp in ("auto", "double_backward"):
        problem = bilevel.Problem(upper=lambda x, y, batch: y.square().sum(), lower=lower, hvp=hvp)
        found = bilevel.plan(problem, torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
        assert found.recommended == "F2SA()"
        assert found.facts.second_order == ("differences" if hvp == "auto" else None)
        fits = {choice.name: choice.fits for choice in found.choices}
        assert fits["F2SA"]
        assert fits["implicit"] == (hvp == "auto")


def test_constraints_of_many_variables_get_a_first_order_method() -> None:
    def problem(**fields: Any) -> bilevel.Problem:
        return bilevel.Problem(
            upper=lambda x, y, batch: (y - 2).square().sum(), lower=lambda x, y, batch: (y - x).square().sum(),
            constraint=lambda x, y, batch: y.sum().reshape(1) - 1, **fields,
        )  # fmt: skip

    start = torch.zeros(60, dtype=torch.float64)
    assert bilevel.plan(problem(), start, start).recommended == "BLOCC()"
    plane = bilevel.JointHalfspace(torch.zeros(60), torch.ones(60), 1.0)
    assert bilevel.plan(problem(joint_set=plane), start, start).recommended == "LVHBA()"
    notes = {choice.name: choice.why for choice in bilevel.plan(problem(), start, start).choices}
    assert "joint_set" in notes["LVHBA"]
    assert "unknowns" in notes["KKT"]


def test_a_plan_changes_nothing_and_repeats() -> None:
    task = bilevel.problems.ridge()
    before, random = task.x0.clone(), torch.random.get_rng_state()
    first, second = planned(task), planned(task)
    assert first == second
    assert torch.equal(task.x0, before)
    assert torch.equal(torch.random.get_rng_state(), random)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.reason = ""  # type: ignore[misc]


def test_what_the_door_refuses_a_plan_refuses() -> None:
    with pytest.raises(bilevel.NonFinite):
        bilevel.plan(bilevel.problems.scalar().problem, torch.tensor(float("nan")), torch.zeros(()))
    with pytest.raises(InvalidProblem, match=r"expected a bilevel\.Problem"):
        bilevel.plan(lambda x, y: x, torch.ones(1), torch.ones(1))  # type: ignore[arg-type]


# -- predicted costs, against the counts of real steps ---------------------------------------------------------------


def options(name: str) -> list[dict[str, Any]]:
    other: dict[str, dict[str, Any]] = {
        "F2SA": {"lower_steps": 3}, "F2BA": {"lower_steps": 4}, "ProxF2SA": {"lower_steps": 3},
        "BDA": {"lower_steps": 3},
        "VPBGD": {"lower_steps": 4, "measure_every": 2}, "BOME": {"lower_steps": 7, "measure_every": 2},
        "BAMM": {"measure_every": 2, "mu": 0.0}, "GPBGD": {"measure_every": 2}, "BLOCC": {"lower_steps": 3},
        "implicit": {"linear": bilevel.MINRES(max_steps=4), "lower": SGD(lr=None), "lower_steps": 3},
        "neumann": {"terms": 2}, "nystrom": {"rank": 3}, "amigo": {"lower_steps": 2, "linear_steps": 3},
        "unrolled": {"lower": SGD(0.1), "lower_steps": 11, "truncate": 4},
        "Metagradient": {"lower": SGD(0.1, momentum=0.5), "lower_steps": 17, "schedule": bilevel.Binomial(4)},
        "HypergradientDescent": {"estimator": bilevel.Implicit(linear=bilevel.Dense()), "lower_steps": 2},
        "imaml": {"linear_steps": 2},
    }  # fmt: skip
    return [{}, other[name]] if name in other else [{}]


EXACT = {"F2SA", "F2BA", "F3SA", "ProxF2SA", "MEHA", "LVHBA", "BLOCC"}


@pytest.mark.parametrize("name", solvers.__all__)
@pytest.mark.parametrize("make", [bilevel.problems.quadratic, bilevel.problems.ridge], ids=["quadratic", "ridge"])
def test_predicted_calls_are_those_of_real_steps(name: str, make: Any) -> None:
    task = make()
    for given in options(name):
        solver = getattr(solvers, name)(**given)
        oracles, x, y = open_oracles(task.problem, task.x0, task.y0, needs_hvp=solver.needs_hvp, trains=solver.replays)
        cost = cost_of(solver, task.problem, Sizes(x.numel(), y.numel(), y.numel(), 1000, 8))
        if name in ("KKT", "SparseDescent"):
            assert cost is None
            continue
        assert cost is not None
        assert cost.exact or name not in EXACT
        state = solver.init(oracles, x, y)
        counted = []
        for _ in range(6):
            before = oracles.counts
            state = solver.step(oracles, state)
            counted.append(tuple(oracles.counts - before)[1:])
        assert all(now <= most for calls in counted for now, most in zip(calls, cost.most, strict=True))
        if cost.exact:
            assert set(counted) == {cost[:3]}
        elif given.get("measure_every") or name in ("BOME", "VPBGD", "BDA", "GPBGD", "unrolled", "Metagradient"):
            assert cost[:3] in counted  # the steps without a measurement


@pytest.mark.parametrize("equality", [False, True])
@pytest.mark.parametrize("solver", [bilevel.BLOCC(lower_steps=3), bilevel.LVHBA()], ids=["BLOCC", "LVHBA"])
def test_calls_of_constraints_are_predicted(solver: Any, equality: bool) -> None:
    extra: dict[str, Any] = {"equality": lambda x, y, batch: (y[0] - y[1]).reshape(1)} if equality else {}
    problem = bilevel.Problem(
        upper=lambda x, y, batch: (y - 2).square().sum(), lower=lambda x, y, batch: (y - x).square().sum(),
        constraint=lambda x, y, batch: y.sum().reshape(1) - 1, joint_set=lambda x, y: (x, 0 * y), **extra,
    )  # fmt: skip
    start = torch.zeros(2, dtype=torch.float64)
    oracles, x, y = open_oracles(problem, start, start)
    cost = cost_of(solver, problem, Sizes(2, 2, 2, 0, 8))
    assert cost is not None
    assert cost.exact
    state = solver.init(oracles, x, y)
    before = oracles.counts
    solver.step(oracles, state)
    assert tuple(oracles.counts - before)[1:] == cost[:3]


def test_memory_of_training_is_that_of_its_schedule() -> None:
    task = bilevel.problems.quadratic()
    sizes = Sizes(4, 10, 10, 1000, 8)
    bytes_held = {}
    for schedule in (bilevel.StoreAll(), bilevel.Sqrt(), bilevel.Binomial(5)):
        solver = bilevel.Metagradient(lower=SGD(0.1, momentum=0.9), lower_steps=100, schedule=schedule)
        cost = cost_of(solver, task.problem, sizes)
        assert cost is not None
        bytes_held[type(schedule).__name__] = cost.bytes
        run = bilevel.metagradient(
            task.problem, task.x0, task.y0, lower=SGD(0.1, momentum=0.9), steps=100, schedule=schedule
        ).run
        assert run is not None
        found = run.visited
        assert cost.bytes >= found.peak_states * found.state_bytes
        assert cost.gradients == found.steps + found.advances + 2
    assert bytes_held["StoreAll"] > bytes_held["Sqrt"] > bytes_held["Binomial"]


def test_graph_bytes_are_measured() -> None:
    x0, small = torch.full((), -1.0, dtype=torch.float64), bilevel.Full((X, T))
    y0 = torch.zeros(3, dtype=torch.float64)
    twice = bilevel.Full((X.repeat(10, 1), T.repeat(10)))
    graphs = [bilevel.plan(regression(data), x0, y0).facts.graph for data in (small, twice)]
    assert 0 < graphs[0] < graphs[1]


def test_solvers_of_ones_own_have_no_price() -> None:
    task = bilevel.problems.scalar()
    assert cost_of(object(), task.problem, Sizes(1, 1, 1, 0, 8)) is None
    assert cost_of(bilevel.implicit(linear=bilevel.Sama()), task.problem, Sizes(1, 1, 1, 0, 8)) is None
    polished = bilevel.HypergradientDescent(estimator=bilevel.Implicit(polish=True))
    assert cost_of(polished, task.problem, Sizes(1, 1, 1, 0, 8)) is None
    jacobi = cost_of(bilevel.implicit(linear=CG(preconditioner=bilevel.Jacobi())), task.problem, Sizes(1, 9, 9, 0, 8))
    assert jacobi is not None


# -- doors -----------------------------------------------------------------------------------------------------------


def test_the_text_names_facts_costs_and_a_choice() -> None:
    text = str(planned(bilevel.problems.ridge()))
    assert "x: 10 numbers; y: 10 numbers" in text
    assert "lower batches of 221, the same in every step" in text
    assert re.search(r"F2SA +first order +yes +19 ", text)
    assert "Recommended: implicit(linear=Dense()), because" in text
    assert "One upper step: ~23 gradients, 10 HVPs, 1 cross products" in text
    kinked = str(planned(bilevel.problems.lasso1()))
    assert re.search(r"F2SA +first order +no +.*does not handle Problem\(regularizer", kinked)


def test_session_takes_auto() -> None:
    task = bilevel.problems.quadratic()
    session = bilevel.Session(task.problem, "auto", task.x0, task.y0)
    assert session.solver == bilevel.implicit(linear=bilevel.Dense())
    session.step()
    with pytest.raises(InvalidProblem, match="or 'auto'"):
        bilevel.Session(task.problem, "automatic", task.x0, task.y0)  # type: ignore[arg-type]


def test_solve_refuses_other_words_and_auto_with_resume() -> None:
    task = bilevel.problems.quadratic()
    with pytest.raises(InvalidProblem, match="or 'auto'"):
        bilevel.solve(task.problem, "best", task.x0, task.y0)  # type: ignore[arg-type]
    half = bilevel.solve(task.problem, "auto", task.x0, task.y0, steps=5)
    with pytest.raises(InvalidProblem, match="resume needs the solver"):
        bilevel.solve(task.problem, "auto", task.x0, task.y0, steps=5, resume=half)
    whole = bilevel.solve(task.problem, "auto", task.x0, task.y0, steps=10)
    solver = planned(task).solver()
    after = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=5, resume=half)
    assert torch.equal(after.x, whole.x)


def test_the_command_line_plans_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "quadratic"]) == 0
    assert "Recommended: implicit(linear=Dense())" in capsys.readouterr().out
    assert cli.main(["run", "lasso1", "--solver", "auto", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("auto: SparseDescent(), because kinks")
    assert "completed after 3 steps" in out
