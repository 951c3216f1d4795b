"""Conversion of torch.optim optimizers."""

import pytest
import torch

from bilevel.optimizers import SGD, Adam, AdamW, Cosine, from_torch
from bilevel.status import InvalidProblem


def leaf():
    return torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda: torch.optim.SGD([leaf()], lr=0.1), SGD(0.1)),
        (
            lambda: torch.optim.SGD([leaf()], 0.2, 0.9, 0.0, 0.3, True, maximize=True),
            SGD(0.2, 0.9, nesterov=True, weight_decay=0.3, maximize=True),
        ),
        (lambda: torch.optim.SGD([leaf()], 0.2, 0.9, dampening=0.4), SGD(0.2, 0.9, dampening=0.4)),
        (lambda: torch.optim.Adam([leaf()]), Adam()),
        (
            lambda: torch.optim.Adam([leaf()], 0.2, (0.5, 0.6), 1e-3, 0.7, True, maximize=True),
            Adam(0.2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.7, amsgrad=True, maximize=True),
        ),
        (lambda: torch.optim.Adam([leaf()], betas=[0.5, 0.6]), Adam(betas=(0.5, 0.6))),
        (
            lambda: torch.optim.Adam([leaf()], weight_decay=0.1, decoupled_weight_decay=True),
            AdamW(weight_decay=0.1),
        ),
        (lambda: torch.optim.AdamW([leaf()]), AdamW()),
        (lambda: torch.optim.AdamW([leaf()], 0.2, weight_decay=0.5), AdamW(0.2, weight_decay=0.5)),
        (lambda: torch.optim.AdamW([leaf()], foreach=True), AdamW()),
        (lambda: torch.optim.AdamW([leaf()], fused=True), AdamW()),
        (lambda: torch.optim.AdamW([leaf()], differentiable=True), AdamW()),
        (lambda: torch.optim.SGD([("w", leaf())], lr=0.1), SGD(0.1)),
    ],
)
def test_settings_carry_over(theirs, ours):
    assert from_torch(theirs()) == ours


def test_a_tensor_rate_is_kept():
    rate = torch.tensor(0.1, requires_grad=True)
    assert from_torch(torch.optim.SGD([leaf()], lr=rate)).lr is rate


def test_groups_that_agree_are_one():
    assert from_torch(torch.optim.SGD([{"params": [leaf()]}, {"params": [leaf()], "lr": 0.1}], lr=0.1)) == SGD(0.1)


def test_groups_that_differ_are_refused():
    # A peer rebuilds from the defaults, and per-group rates are lost.
    groups = [{"params": [leaf()]}, {"params": [leaf()], "lr": 0.2, "momentum": 0.5}]
    with pytest.raises(InvalidProblem, match="groups 0 and 1 differ in lr, momentum"):
        from_torch(torch.optim.SGD(groups, lr=0.1))
    rates = [{"params": [leaf()], "lr": torch.tensor(0.1)}, {"params": [leaf()], "lr": torch.tensor(0.3)}]
    with pytest.raises(InvalidProblem, match="differ in lr"):
        from_torch(torch.optim.SGD(rates))


def test_a_lone_group_may_differ_from_the_defaults():
    optimizer = torch.optim.SGD([{"params": [leaf()], "lr": 0.5}], lr=0.1)
    assert from_torch(optimizer) == SGD(0.5)


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.LBFGS, torch.optim.Adamax])
def test_other_classes_are_refused(kind):
    with pytest.raises(InvalidProblem, match=rf"{kind.__name__}; supported are torch.optim.SGD, Adam and AdamW"):
        from_torch(kind([leaf()]))


def test_subclasses_are_refused():
    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(InvalidProblem, match="Mine"):
        from_torch(Mine([leaf()], lr=0.1))


def test_unknown_settings_are_refused():
    optimizer = torch.optim.SGD([leaf()], lr=0.1)
    optimizer.param_groups[0]["trust"] = 0.1
    with pytest.raises(InvalidProblem, match=r"torch\.optim\.SGD has settings unknown here: trust"):
        from_torch(optimizer)


def test_a_scheduler_needs_a_schedule():
    optimizer = torch.optim.SGD([leaf()], lr=0.1)
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    with pytest.raises(InvalidProblem, match="pass lr="):
        from_torch(optimizer)
    assert from_torch(optimizer, lr=Cosine(0.1, steps=10)) == SGD(Cosine(0.1, steps=10))
