"""Nested variables and flat vectors: round trips, messages, and the exact overlap check."""

from collections import namedtuple

import pytest
import torch

from bilevel.layout import Layout, named_leaves, rebuild
from bilevel.status import InvalidProblem

Pair = namedtuple("Pair", ["a", "b"])


def nested(generator=None):
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return {
        "w": torch.randn(2, 3, generator=generator),
        "parts": [torch.randn((), generator=generator), (torch.randn(4, generator=generator),)],
        "pair": Pair(torch.randn(1, generator=generator), torch.randn(2, 1, generator=generator)),
    }


def test_round_trip_keeps_structure_and_values():
    x = nested()
    layout = Layout.of(x)
    flat = layout.flatten(x)
    assert layout.names == ("w", "parts[0]", "parts[1][0]", "pair[0]", "pair[1]")
    assert (layout.size, layout.shape, flat.shape) == (14, (14,), (14,))
    back = layout.unflatten(flat)
    assert isinstance(back["pair"], Pair)
    assert isinstance(back["parts"][1], tuple)
    for (name, one), (other_name, other) in zip(named_leaves(x), named_leaves(back), strict=True):
        assert name == other_name
        assert torch.equal(one, other)


def test_flatten_copies():
    x = torch.zeros(3)
    layout = Layout.of(x)
    layout.flatten(x).add_(1)
    assert torch.equal(x, torch.zeros(3))
    assert not layout.flatten(x.requires_grad_()).requires_grad


def test_unflattened_leaves_are_views_and_concat_inverts_them():
    layout = Layout.of(nested())
    flat = torch.zeros(layout.size)
    layout.unflatten(flat)["w"].fill_(7.0)
    assert torch.equal(flat[:6], torch.full((6,), 7.0))
    many = torch.randn(3, layout.size)
    assert torch.equal(layout.concat(layout.views(many)), many)


def test_flatten_reads_dicts_by_key():
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(2)})
    flat = layout.flatten({"b": torch.ones(2), "a": torch.zeros(2)})
    assert torch.equal(flat, torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    "other",
    [{"a": torch.zeros(2)}, {"a": torch.zeros(2), "c": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(3)}],
)
def test_flatten_refuses_another_structure(other):
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(InvalidProblem, match="expected"):
        layout.flatten(other)
    with pytest.raises(InvalidProblem, match="expected"):
        Layout.of([torch.zeros(2), torch.zeros(1)]).flatten([torch.zeros(2)])


def test_blocks_come_first():
    y = {"w": torch.randn(5, 2, 3), "b": torch.randn(5)}
    layout = Layout.of(y, name="y", blocks=5)
    assert layout.shapes == (torch.Size([2, 3]), torch.Size([]))
    flat = layout.flatten(y)
    assert flat.shape == layout.shape == (5, 7)
    assert torch.equal(layout.unflatten(flat)["b"], y["b"])
    with pytest.raises(InvalidProblem, match=r"leaf 'b' has shape \(4,\), but blocks=5"):
        Layout.of({"w": torch.zeros(5, 2), "b": torch.zeros(4)}, blocks=5)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"a": 1.0}, "leaf 'a' is a float"),
        (torch.zeros(2, dtype=torch.long), "leaf 'x' has dtype torch.int64"),
        (torch.zeros(0), "no hyperparameters"),
        ([], "no hyperparameters"),
        ([torch.zeros(1), torch.zeros(1).double()], r"'\[0\]' is torch.float32 but '\[1\]' is torch.float64"),
        (torch.zeros(1).expand(3), "shares memory between its entries"),
    ],
)
def test_unusable_variables_are_refused(variables, message):
    with pytest.raises(InvalidProblem, match=message):
        Layout.of(variables)
    with pytest.raises(InvalidProblem, match="no variables: y"):
        Layout.of([], name="y")


def test_name_of():
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(3)})
    assert [layout.name_of(index) for index in range(5)] == ["a", "a", "b", "b", "b"]
    with pytest.raises(IndexError):
        layout.name_of(5)


def base():
    return torch.arange(24.0).reshape(6, 4)


@pytest.mark.parametrize(
    "views",
    [
        lambda a: [a[:, 0], a[:, 1]],
        lambda a: [a[::2], a[1::2]],
        lambda a: [a[:3], a[3:]],
        lambda a: [a.t()[:2], a.t()[2:]],
        lambda a: [a[1:3, :2], a[1:3, 2:]],
        lambda a: [a.t()],
        lambda a: [a[:0], a],
    ],
)
def test_views_that_share_no_entry_are_accepted(views):
    leaves = views(base())
    layout = Layout.of(leaves)
    assert torch.equal(layout.flatten(leaves), torch.cat([leaf.reshape(-1) for leaf in leaves]))


@pytest.mark.parametrize(
    "views",
    [
        lambda a: [a, a],
        lambda a: [a, a[0]],
        lambda a: [a[:, 0], a[2]],
        lambda a: [a[::2], a[1::3]],
        lambda a: [a.t(), a.reshape(-1)[3:5]],
        lambda a: [torch.zeros(2), a[0], a[0, 3:]],
    ],
)
def test_views_that_share_an_entry_are_refused(views):
    with pytest.raises(InvalidProblem, match=r"leaves '\[\d\]' and '\[\d\]' overlap in memory"):
        Layout.of(views(base()))


def test_a_view_that_overlaps_itself_is_refused():
    with pytest.raises(InvalidProblem, match="shares memory between its entries"):
        Layout.of(torch.arange(5.0).unfold(0, 3, 1))


def test_align():
    layout = Layout.of({"a": torch.zeros(2), "b": [torch.zeros(1), torch.zeros(1)]})
    assert layout.align(5, None, what="it") == [5, 5, 5]
    assert layout.align({"b": 1}, None, what="it") == [None, 1, 1]
    assert layout.align({"a": [1, 2], "b": [3, 4]}, None, what="it") == [[1, 2], 3, 4]
    with pytest.raises(InvalidProblem, match=r"it: unknown keys \['c'\]"):
        layout.align({"c": 1}, None, what="it")
    with pytest.raises(InvalidProblem, match="a list of length 2, got a list of length 1"):
        layout.align({"b": [1]}, None, what="it")
    with pytest.raises(InvalidProblem, match="expected nesting like a dict"):
        layout.align([1, 2], None, what="it")


def test_spread():
    layout = Layout.of({"a": torch.zeros(2, 2), "b": torch.zeros(1)})
    assert torch.equal(layout.spread(3, 0.0, what="it"), torch.tensor(3.0))
    flat = torch.arange(5.0)
    assert torch.equal(layout.spread(flat, 0.0, what="it"), flat)
    assert torch.equal(layout.spread({"a": [1, 2]}, -1.0, what="it"), torch.tensor([1.0, 2, 1, 2, -1]))
    assert layout.spread(flat.double(), 0.0, what="it").dtype == torch.float32
    with pytest.raises(InvalidProblem, match="expected a scalar, a flat tensor"):
        layout.spread(torch.zeros(4), 0.0, what="it")
    with pytest.raises(InvalidProblem, match=r"shape \(3,\) given for leaf 'a' does not broadcast"):
        layout.spread({"a": torch.zeros(3)}, 0.0, what="it")
    with pytest.raises(InvalidProblem, match="'many' for 'all leaves' is not a number"):
        layout.spread("many", 0.0, what="it")


def test_spread_over_blocks():
    layout = Layout.of(torch.zeros(3, 2), blocks=3)
    assert layout.spread(torch.tensor([1.0, 2.0]), 0.0, what="it").shape == (2,)
    by_block = layout.spread(torch.tensor([1.0, 2.0, 3.0]), 0.0, what="it")
    assert torch.equal(by_block, torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    assert layout.spread(torch.ones(3, 1), 0.0, what="it").shape == (3, 2)
    with pytest.raises(InvalidProblem, match="with or without the leading 3 blocks"):
        layout.spread(torch.ones(4), 0.0, what="it")
    mixed = Layout.of({"a": torch.zeros(3, 2), "b": torch.zeros(3)}, blocks=3)
    spread = mixed.spread({"a": torch.arange(3.0), "b": 5.0}, 0.0, what="it")
    assert torch.equal(spread, torch.tensor([[0.0, 0, 5], [1, 1, 5], [2, 2, 5]]))


def test_part():
    layout = Layout.of({"a": torch.zeros(2), "b": {"c": torch.zeros(3), "d": torch.zeros(1)}})
    place, own = layout.part(layout.skeleton["b"])
    assert (place, own.names, own.size) == (slice(2, 6), ("b.c", "b.d"), 4)
    assert own.unflatten(torch.arange(4.0))["d"].item() == 3.0


def test_rebuild_accepts_any_leaf():
    assert rebuild({"a": [0, (0,)]}, iter("xy")) == {"a": ["x", ("y",)]}
