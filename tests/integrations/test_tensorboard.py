"""What TensorBoard is given is what the history holds."""

import pytest
import torch

import bilevel

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

from bilevel.integrations.tensorboard import TensorBoard  # noqa: E402


def solved(folder, x0, **options):
    def flat(x):
        return x if isinstance(x, torch.Tensor) else torch.cat([x["rate"], x["many"]["w"].flatten()])

    problem = bilevel.Problem(
        upper=lambda x, y, batch: (y - 1.0).square().sum(),
        lower=lambda x, y, batch: 0.5 * (y - flat(x)).square().sum(),
    )
    with TensorBoard(folder, **options) as board:
        return bilevel.solve(
            problem, bilevel.implicit(), x0, torch.zeros_like(flat(x0)), steps=6, callbacks=[board], progress=False
        )


def read(folder):
    events = event_accumulator.EventAccumulator(str(folder), {"histograms": 0})
    events.Reload()
    return events


def test_the_history_is_written(tmp_path):
    solution = solved(tmp_path, torch.zeros(()))
    events = read(tmp_path)
    written = events.Scalars("objective/upper_value")
    assert [event.step for event in written] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in written] == pytest.approx(solution.history["upper_value"])
    assert [event.value for event in events.Scalars("cost/gradients")] == solution.history["gradients"]
    assert events.Scalars("x")[-1].value == pytest.approx(float(solution.x))
    assert "convergence/error_estimate" not in events.Tags()["scalars"]  # nothing but NaN


def test_large_leaves_are_histograms(tmp_path):
    solution = solved(tmp_path, {"rate": torch.zeros(2), "many": {"w": torch.zeros(5, 4)}}, every=3)
    events = read(tmp_path)
    assert events.Tags()["histograms"] == ["x/many/w"]
    assert [event.step for event in events.Histograms("x/many/w")] == [3, 6]
    assert events.Scalars("x/rate/1")[-1].value == pytest.approx(float(solution.x["rate"][1]))


def test_every_must_be_positive(tmp_path):
    with pytest.raises(bilevel.InvalidProblem, match="every"):
        TensorBoard(tmp_path, every=0)
