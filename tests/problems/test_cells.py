"""The cell search: the mixture is what it says, discrete cells follow the rule, and judging trains anew."""

from __future__ import annotations

import pytest
import torch

import bilevel
from bilevel.problems import cell_search, discrete_cell
from bilevel.problems.cells import EDGES, KEPT, NODES, OPERATIONS, Network, accuracy, largest_eigenvalue, small_split


def seeded(*arguments: object) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network(*arguments)  # type: ignore[arg-type]


def logits(*chosen: str) -> torch.Tensor:
    """Return logits that leave one operation an edge all the weight."""
    x = torch.zeros(len(EDGES), len(OPERATIONS))
    for row, name in enumerate(chosen):
        x[row, OPERATIONS.index(name)] = 200.0
    return x


def test_parts_are_disjoint_and_of_the_promised_size() -> None:
    split = small_split(0)
    assert [len(part.targets) for part in split] == [500, 500, 797]
    images = torch.cat([part.inputs.flatten(1) for part in split])
    assert len(images.unique(dim=0)) >= 1797 - 5  # but for digits drawn alike
    assert float(images.min()) == 0.0
    assert float(images.max()) == 1.0


def test_a_mixture_with_all_weight_on_one_operation_is_that_operation() -> None:
    net, images = seeded(4), torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    names = ("skip", "conv 3x3", "zero", "max pool", "average pool", "dilated conv 3x3")
    nodes = [net.stem(images)]
    for node in range(1, NODES + 1):
        total = torch.zeros_like(nodes[0])
        for row, (source, to) in enumerate(EDGES):
            if to == node and names[row] != "zero":
                total = total + net.operations[row][OPERATIONS.index(names[row]) - 1](nodes[source])  # type: ignore[index]
        nodes.append(total)
    expected = net.last(torch.cat(nodes[1:], 1).mean((2, 3)))
    torch.testing.assert_close(net(images, logits(*names)), expected)


def test_equal_logits_weigh_all_operations_alike() -> None:
    net, images = seeded(4), torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(images, torch.zeros(6, 6)), net(images, torch.full((6, 6), 3.0)))


def test_a_discrete_cell_has_the_two_strongest_edges_into_each_node() -> None:
    x = torch.zeros(len(EDGES), len(OPERATIONS))
    x[:, 0] = 5.0  # zero is strongest everywhere, and never chosen
    x[1, 3], x[2, 4] = 1.0, 2.0
    x[3, 1], x[4, 2], x[5, 5] = 1.0, 3.0, 2.0
    cell = discrete_cell(x)
    assert [tuple(edge) for edge in cell] == [
        (0, 1, "skip"), (0, 2, "dilated conv 3x3"), (1, 2, "average pool"), (1, 3, "conv 3x3"), (2, 3, "max pool"),
    ]  # fmt: skip
    assert len(cell) == 1 + KEPT * (NODES - 1)


def test_the_weights_gradient_is_exact_in_both_levels() -> None:
    task = cell_search(channels=2)
    x = task.x0.double().requires_grad_()
    y = {name: leaf.double() for name, leaf in task.y0.items()}
    images, labels = task.problem.upper_data.batch(0, 0)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(point: torch.Tensor) -> torch.Tensor:
        return task.problem.upper(point, y, (images.double(), labels))

    (gradient,) = torch.autograd.grad(value(x), x)
    for step in (1e-4, 1e-5):
        difference = (value(x.detach() + step * v) - value(x.detach() - step * v)) / (2 * step)
        torch.testing.assert_close((gradient * v).sum(), difference, rtol=1e-6, atol=1e-8)


def test_the_largest_eigenvalue_is_that_of_the_hessian() -> None:
    a = torch.diag(torch.tensor([3.0, -7.0, 1.0])).double()
    assert largest_eigenvalue(lambda x: x @ a @ x / 2, torch.ones(3).double()) == pytest.approx(3.0)


@pytest.mark.slow
def test_a_search_lowers_the_validation_loss_and_moves_x() -> None:
    task = cell_search(channels=4)
    solver = bilevel.darts(0.05, order=2, upper=bilevel.Adam(0.02))
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=30)
    values = solution.history["upper_value"]
    assert sum(values[-5:]) < 0.9 * sum(values[:5])
    assert float((solution.x - task.x0).abs().max()) > 0.1


@pytest.mark.slow
def test_judging_trains_anew_and_repeats_itself() -> None:
    task = cell_search(epochs=4, random_cells=1)
    random = torch.get_rng_state()
    found = task.evaluate(task.x0, task.y0)
    assert set(found) == {"test_accuracy", "random_cells", "eigenvalue", "skips"}
    assert all(isinstance(value, float) for value in found.values())
    assert found == task.evaluate(task.x0, task.y0)
    assert torch.equal(torch.get_rng_state(), random)
    cell, split = discrete_cell(logits(*["conv 3x3"] * 6)), small_split(0)
    assert accuracy(cell, split, 6, 6, 0) > accuracy(cell, split, 6, 1, 0)
