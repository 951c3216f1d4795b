"""Oracles against autograd on the whole formula, in float64; what they count; and that a step fixes its randomness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bilevel
from bilevel import Counts, DataSource, InvalidProblem, Problem
from bilevel.dry_run import open_oracles
from bilevel.layout import Layout
from bilevel.oracles import Oracles, random_state, tensors_in


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B, C = draw(5, 4, seed=1), draw(5, 7, seed=2), draw(3, 7, seed=3)
X = {"a": draw(3, seed=4), "rest": [draw(1, seed=5), draw(2, seed=6)]}
Y = {"u": draw(2, 2, seed=7), "v": (draw(3, seed=8),)}
"""x = (a, rest): 4 of 6 entries enter below, the last 2 above only. y = (u, v): 7 entries; v enters above, u below."""


def flat_upper(x: Tensor, y: Tensor) -> Tensor:
    return (y[4:].sin() * x[:3]).sum() + x[4:].square().sum() + 0.5 * y[4:].square().sum()


def flat_lower(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.softplus(A @ x[:4] + B @ y).sum() + (x[:3] * y[:3].square()).sum() + (C @ y).cos().prod()


def flat_term(x: Tensor, y: Tensor) -> Tensor:
    """The regularizer as a formula: groups 0 and 1 of x["rest"][0] and x["a"][0], the last entry free."""
    weights = torch.stack([x[3].exp(), x[0].square(), torch.zeros_like(x[0])])
    return 0.5 * (weights[[0, 0, 1, 1, 0, 1, 2]] * y.square()).sum()


def flat(variables: Any) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in tensors_in(variables)])


REGULARIZER = bilevel.L2(
    lambda x: torch.stack([x["rest"][0][0].exp(), x["a"][0].square()]),
    groups={"u": torch.tensor([[0, 0], [1, 1]]), "v": (torch.tensor([0, 1, -1]),)},
)


def nested(regularized: bool = True, **options: Any) -> Problem:
    return Problem(
        upper=lambda x, y, b: flat_upper(flat(x), flat(y)),
        lower=lambda x, y, b: flat_lower(flat(x), flat(y)),
        regularizer=REGULARIZER if regularized else None,
        **options,
    )


def opened(problem: Problem, x0: Any = X, y0: Any = Y, **options: Any) -> tuple[Oracles, Tensor, Tensor]:
    """Return oracles without a dry run."""
    x_layout, y_layout = Layout.of(x0), Layout.of(y0, name="y", blocks=problem.blocks)
    return Oracles(problem, x_layout, y_layout, **options), x_layout.flatten(x0), y_layout.flatten(y0)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularized", [False, True])
def test_values_and_gradients_against_the_formula(regularized: bool) -> None:
    oracles, x, y = opened(nested(regularized))

    def whole(x: Tensor, y: Tensor) -> Tensor:
        return flat_lower(x, y) + (flat_term(x, y) if regularized else 0.0)

    close(oracles.upper_value(x, y), flat_upper(x, y))
    close(oracles.lower_value(x, y), whole(x, y))
    upper = oracles.upper_gradient(x, y)
    close(upper.value, flat_upper(x, y))
    close(upper.x, torch.func.grad(flat_upper, 0)(x, y))
    close(upper.y, torch.func.grad(flat_upper, 1)(x, y))
    value, gradient = oracles.lower_gradient(x, y)
    close(value, whole(x, y))
    close(gradient, torch.func.grad(whole, 1)(x, y))
    both = oracles.lower_gradients(x, y)
    close(both.value, whole(x, y))
    close(both.x, torch.func.grad(whole, 0)(x, y))
    close(both.y, gradient)
    traced = oracles.lower_gradients(x, y, declared=False)
    close(traced.x, torch.func.grad(flat_lower, 0)(x, y))
    close(traced.y, torch.func.grad(flat_lower, 1)(x, y))


def test_results_are_detached_and_share_no_memory() -> None:
    oracles, x, y = opened(nested())
    linearization = oracles.linearize_lower(x, y)
    results = [
        oracles.upper_value(x, y), *oracles.upper_gradient(x, y), oracles.lower_value(x, y),
        *oracles.lower_gradient(x, y), *oracles.lower_gradients(x, y), linearization.value, linearization.gradient,
        linearization.hvp(y), linearization.hvps(y.expand(2, -1)), linearization.cross(y),
    ]  # fmt: skip
    kept = x.clone(), y.clone()
    for result in results:
        assert not result.requires_grad
        result.fill_(99.0)
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])


def test_gradients_are_right_inside_no_grad_and_leave_no_trace() -> None:
    oracles, x, y = opened(nested())
    expected = oracles.lower_gradient(x, y)[1]
    with torch.no_grad():
        assert torch.equal(oracles.lower_gradient(x, y)[1], expected)
        assert torch.equal(oracles.linearize_lower(x, y).gradient, expected)
    assert x.grad is None
    assert y.grad is None


def test_leaves_that_do_not_enter_have_zero_gradients() -> None:
    oracles, x, y = opened(nested())
    assert oracles.upper_gradient(x, y).y[:4].tolist() == [0, 0, 0, 0]
    assert oracles.lower_gradients(x, y).x[4:].tolist() == [0, 0]


def test_objectives_see_the_structure_of_the_user() -> None:
    seen: list[Any] = []

    def lower(x: Any, y: Any, b: Any) -> Tensor:
        seen.append((x, y, b))
        return flat_lower(flat(x), flat(y))

    oracles, x, y = opened(Problem(upper=nested().upper, lower=lower))
    oracles.lower_gradient(x, y)
    seen_x, seen_y, batch = seen[0]
    assert batch is None
    assert [type(part) for part in (seen_x, seen_x["rest"], seen_y, seen_y["v"])] == [dict, list, dict, tuple]
    assert [leaf.shape for leaf in tensors_in((seen_x, seen_y))] == [leaf.shape for leaf in tensors_in((X, Y))]


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_blocks_are_a_sum_below_and_a_mean_above() -> None:
    weights = draw(3, 2, seed=9)
    problem = Problem(
        upper=lambda x, y, b: (b["w"] * y["v"]).sum() ** 2 + x.sum() * y["s"],
        lower=lambda x, y, b: (b["w"] * (y["v"] - x) ** 4).sum() + y["s"] * x.prod() + y["s"] ** 3,
        upper_data=bilevel.Full({"w": weights}),
        lower_data=bilevel.Full({"w": weights}),
        regularizer=bilevel.L2(lambda x: x.square().sum()),
        blocks=3,
    )
    x0, y0 = draw(2), {"v": draw(3, 2, seed=1), "s": draw(3, seed=2)}
    oracles, x, y = opened(problem, x0, y0)
    assert y.shape == (3, 3)

    def rows(function: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack(
            [function(x, {"v": row[:2], "s": row[2]}, {"w": w}) for row, w in zip(y, weights, strict=True)]
        )

    def above(x: Tensor, y: Tensor) -> Tensor:
        return rows(problem.upper, x, y).mean()

    def below(x: Tensor, y: Tensor) -> Tensor:
        return rows(problem.lower, x, y).sum() + 0.5 * x.square().sum() * y.square().sum()

    upper = oracles.upper_gradient(x, y)
    close(upper.value, above(x, y))
    close(upper.x, torch.func.grad(above, 0)(x, y))
    close(upper.y, torch.func.grad(above, 1)(x, y))
    both = oracles.lower_gradients(x, y)
    close(oracles.lower_value(x, y), below(x, y))
    close(both.x, torch.func.grad(below, 0)(x, y))
    close(both.y, torch.func.grad(below, 1)(x, y))


def test_blocks_draw_their_own_randomness_each_step_the_same() -> None:
    problem = Problem(
        upper=lambda x, y, b: y.sum() * x.sum(),
        lower=lambda x, y, b: (torch.randn_like(y) * y).sum() + x.sum(),
        blocks=4,
    )
    oracles, x, y = opened(problem, draw(2), draw(4, 3))
    noise = oracles.lower_gradient(x, y, 0)[1]
    assert len({tuple(row.tolist()) for row in noise}) == 4
    assert torch.equal(noise, oracles.lower_gradient(x, y, 0)[1])
    assert not torch.equal(noise, oracles.lower_gradient(x, y, 1)[1])


# -- counts ------------------------------------------------------------------------------------------------------------


def test_every_call_is_counted() -> None:
    oracles, x, y = opened(nested())
    oracles.upper_value(x, y)
    oracles.lower_value(x, y)
    assert oracles.counts == Counts(values=2)
    oracles.upper_gradient(x, y)
    oracles.lower_gradient(x, y)
    oracles.lower_gradients(x, y)
    assert oracles.counts == Counts(values=2, gradients=3)
    linearization = oracles.linearize_lower(x, y)
    assert oracles.counts == Counts(values=2, gradients=4)
    linearization.hvp(y)
    linearization.hvps(y.expand(5, -1))
    linearization.cross(y)
    assert oracles.counts == Counts(values=2, gradients=4, hvps=6, crosses=1)
    before = oracles.counts
    oracles.upper_value(x, y)
    assert oracles.counts - before == Counts(values=1)


def test_differences_count_as_the_gradients_they_are() -> None:
    oracles, x, y = opened(nested(), way="differences")
    linearization = oracles.linearize_lower(x, y)
    linearization.hvp(y)
    linearization.hvps(y.expand(3, -1))
    linearization.cross(y)
    assert oracles.counts == Counts(gradients=1 + 2 * 5)


def test_the_dry_run_is_not_counted() -> None:
    oracles, _, _ = open_oracles(nested(), X, Y)
    assert oracles.counts == Counts()


# -- batches and randomness --------------------------------------------------------------------------------------------


class Named(DataSource):
    """The batch says for which step and seed it was asked."""

    @property
    def deterministic(self) -> bool:
        return False

    def batch(self, step: int, seed: int) -> Any:
        return torch.tensor([float(step), float(seed % 1000)], dtype=torch.float64)


def test_a_step_fixes_the_batch_of_every_call() -> None:
    problem = Problem(
        upper=lambda x, y, b: (b * y).sum() + x.sum(), lower=lambda x, y, b: (b * y.square()).sum(),
        upper_data=Named(), lower_data=Named(),
    )  # fmt: skip
    oracles, x, y = opened(problem, draw(2), draw(2), seed=5)
    for step in (0, 3, 3, 0):
        assert float(oracles.upper_gradient(x, y, step).y[0]) == step
        assert float(oracles.lower_gradient(x, y, step)[1][0]) == pytest.approx(2 * step * float(y[0]))
        assert float(oracles.linearize_lower(x, y, step).hvp(torch.ones(2).double())[0]) == 2 * step
    # One data set at both levels is not read in the same order.
    assert float(oracles.batch("upper", 0)[1]) != float(oracles.batch("lower", 0)[1])
    other, _, _ = opened(problem, draw(2), draw(2), seed=6)
    assert float(other.batch("lower", 0)[1]) != float(oracles.batch("lower", 0)[1])


def random_problem() -> Problem:
    return Problem(
        upper=lambda x, y, b: (torch.rand_like(y) * y).sum() + x.sum(),
        lower=lambda x, y, b: (torch.bernoulli(torch.full_like(y, 0.5)) * (y - x) ** 4).sum(),
    )


@pytest.mark.parametrize("way", ["double_backward", "forward_over_reverse", "math_attention", "differences"])
def test_randomness_depends_on_seed_level_and_step_alone(way: str) -> None:
    oracles, x, y = opened(random_problem(), draw(30), draw(30, seed=1), way=way)
    state = torch.get_rng_state()

    def answers(oracles: Oracles, step: int) -> list[Tensor]:
        linearization = oracles.linearize_lower(x, y, step)
        first = [oracles.upper_gradient(x, y, step).y, linearization.gradient]
        return [*first, linearization.hvp(y), linearization.hvps(y.expand(2, -1))[1], linearization.cross(y)]

    one = answers(oracles, 4)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert all(map(torch.equal, one, answers(oracles, 4)))
    assert torch.equal(one[1], oracles.lower_gradient(x, y, 4)[1])
    for different in (
        answers(oracles, 5),
        answers(opened(random_problem(), draw(30), draw(30, seed=1), seed=1, way=way)[0], 4),
    ):
        assert not any(map(torch.equal, one, different))
    same = opened(random_problem(), draw(30), draw(30, seed=1), way=way)[0]
    assert all(map(torch.equal, one, answers(same, 4)))
    close(one[2], one[3], 1e-5 if way == "differences" else 1e-10)


def test_the_random_state_comes_back_after_an_error() -> None:
    def broken(x: Tensor, y: Tensor, b: Any) -> Tensor:
        torch.rand(5)
        raise KeyError("the user's own")

    oracles, x, y = opened(Problem(upper=broken, lower=broken), draw(2), draw(2))
    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        oracles.upper_gradient(x, y)
    assert torch.equal(state, torch.get_rng_state())


def test_random_state_is_seeded_and_put_back() -> None:
    device = torch.device("cpu")
    state = torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        with random_state(seed, device):
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(state, torch.get_rng_state())


# -- gradients by example ----------------------------------------------------------------------------------------------


def test_sample_gradients_are_those_of_single_examples() -> None:
    features, targets = draw(6, 3), draw(6, seed=1)
    problem = Problem(
        upper=lambda x, y, b: y.sum(),
        lower=lambda x, y, b: (x.sum() * (b["f"] @ y - b["t"]).square()).mean(),
        lower_data=bilevel.Full({"f": features, "t": targets}),
        regularizer=bilevel.L2(1.0),
    )
    oracles, x, y = opened(problem, draw(2), draw(3, seed=2))
    found = oracles.linearize_lower(x, y).sample_gradients(4)
    expected = 2 * x.sum() * (features @ y - targets)[:4, None] * features[:4]
    close(found, expected)
    assert oracles.counts == Counts(gradients=5)
    with pytest.raises(InvalidProblem, match=r"7 per-example gradients.*found lengths \[6\]"):
        oracles.sample_gradients(x, y, 0, 7)


def test_sample_gradients_keep_what_is_no_tensor_in_a_batch() -> None:
    problem = Problem(
        upper=lambda x, y, b: y.sum(),
        lower=lambda x, y, b: b["power"] * (b["f"] @ y - x).square().mean(),
        lower_data=bilevel.Full({"name": "set", "f": draw(6, 3), "power": 2}),
    )
    oracles, x, y = opened(problem, draw(), draw(3, seed=2))
    found = oracles.sample_gradients(x, y, 0, 2)
    features = draw(6, 3)[:2]
    close(found, 4 * (features @ y - x)[:, None] * features)


def test_sample_gradients_refuse_what_has_no_examples() -> None:
    for data, blocks, y in ((bilevel.Full((draw(3), draw(4))), None, draw(2)), (bilevel.Full(draw(3)), 3, draw(3, 2))):
        problem = Problem(
            upper=lambda x, y, b: y.sum(), lower=lambda x, y, b: (y - x).square().sum(), lower_data=data, blocks=blocks
        )
        oracles, x, y = opened(problem, draw(2), y)
        with pytest.raises(InvalidProblem, match=r"per-example gradients.*no blocks"):
            oracles.sample_gradients(x, y, 0, 2)


# -- constraints and projections ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constraint", "equality"])
def test_constraints_against_the_formula(name: Any) -> None:
    problem = nested(**{name: lambda x, y, b: torch.stack([x["a"].sum() * y["u"].sum(), (y["v"][0] ** 2).sum()])})
    oracles, x, y = opened(problem)
    multiplier = draw(2, seed=11)

    def values(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x[:3].sum() * y[:4].sum(), (y[4:] ** 2).sum()])

    found = oracles.constraint(x, y, multiplier, name=name)
    close(found.value, values(x, y))
    close(found.x, torch.func.grad(lambda x: values(x, y) @ multiplier)(x))
    close(found.y, torch.func.grad(lambda y: values(x, y) @ multiplier)(y))
    assert oracles.counts == Counts(gradients=1)
    assert not oracles.constraint(x, y, name=name).y.any()
    assert oracles.counts == Counts(gradients=1, values=1)


def test_projections_are_those_of_the_sets() -> None:
    oracles, x, y = opened(nested(upper_set=bilevel.Box(-0.1, 0.1), lower_set=bilevel.NonNegative()))
    assert torch.equal(oracles.project_x(x), x.clamp(-0.1, 0.1))
    assert torch.equal(oracles.project_y(y), y.clamp_min(0))
    free, _, _ = opened(nested())
    assert torch.equal(free.project_x(x), x)
    assert torch.equal(free.project_y(y), y)


# -- properties --------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(x_shapes=SHAPES, y_shapes=SHAPES, seed=st.integers(0, 2**31), c=st.floats(0.1, 10))
def test_any_structure_gives_the_gradients_of_the_flat_problem(
    x_shapes: Any, y_shapes: Any, seed: int, c: float
) -> None:
    x0 = [draw(*shape, seed=seed + i) for i, shape in enumerate(x_shapes)]
    y0 = {str(i): draw(*shape, seed=seed + 50 + i) for i, shape in enumerate(y_shapes)}
    p, d = sum(leaf.numel() for leaf in x0), sum(leaf.numel() for leaf in y0.values())
    if p == 0 or d == 0:
        return
    mix = draw(p, d, seed=seed + 100) / (p * d) ** 0.5

    def coupled(x: Tensor, y: Tensor) -> Tensor:
        return (x @ mix).sin() @ y + (y**3).sum()

    problem = Problem(
        upper=lambda x, y, b: c * coupled(flat(x), flat(y)) + 1, lower=lambda x, y, b: coupled(flat(x), flat(y))
    )
    oracles, x, y = opened(problem, x0, y0)
    upper, lower = oracles.upper_gradient(x, y), oracles.lower_gradients(x, y)
    close(lower.x, torch.func.grad(coupled, 0)(x, y))
    close(lower.y, torch.func.grad(coupled, 1)(x, y))
    close(upper.x, c * lower.x)
    close(upper.y, c * lower.y)
    v = draw(d, seed=seed + 200)
    linearization = oracles.linearize_lower(x, y)
    close(linearization.hvp(v), 6 * y * v)
    close(linearization.cross(v), torch.func.grad(lambda x: (x @ mix).sin() @ v)(x))
