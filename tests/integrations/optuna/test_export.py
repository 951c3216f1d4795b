"""Histories as studies."""

import optuna
import pytest
import torch

import bilevel
from bilevel.integrations.optuna import shared_storage, to_study

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def solution():
    problem = bilevel.Problem(
        upper=lambda x, y, batch: (y["w"] - 1.0).square().sum() + x["shift"].square(),
        lower=lambda x, y, batch: 0.5 * (y["w"] - x["rate"] - x["shift"]).square().sum(),
    )
    x0 = {"rate": torch.zeros(2, dtype=torch.float64), "shift": torch.ones((), dtype=torch.float64)}
    return bilevel.solve(
        problem, bilevel.implicit(), x0, {"w": torch.zeros(2, dtype=torch.float64)}, steps=8, progress=False
    )


def test_each_step_is_a_trial(solution, tmp_path):
    where = str(tmp_path / "journal.log")
    to_study(solution, name="mine", storage=where)
    study = optuna.load_study(study_name="mine", storage=shared_storage(where))
    assert [trial.value for trial in study.trials] == solution.history["upper_value"]
    assert study.trials[0].params == {"rate[0]": 0.0, "rate[1]": 0.0, "shift": 1.0}
    assert study.trials[3].params["shift"] == float(solution.history.xs[3][2])
    assert study.trials[3].user_attrs["gradients"] == solution.history["gradients"][3]
    assert study.trials[3].user_attrs["error_estimate"] is None
    assert study.user_attrs["status"] == "COMPLETED"
    assert len(study.trials_dataframe()) == 8


def test_each_solution_is_a_trial(solution):
    study = to_study({"adam": solution, "again": solution})
    assert [trial.params for trial in study.trials] == [{"solver": "adam"}, {"solver": "again"}]
    assert study.best_value == solution.best_value
    assert list(study.trials[0].intermediate_values.values()) == solution.history["upper_value"]


def test_large_x_is_left_out(tmp_path):
    problem = bilevel.Problem(
        upper=lambda x, y, batch: (y - 1.0).square().sum(), lower=lambda x, y, batch: (y - x).square().sum()
    )
    big = bilevel.solve(problem, bilevel.implicit(), torch.zeros(300), torch.zeros(300), steps=2, progress=False)
    study = to_study(big, storage=str(tmp_path / "journal.log"))
    assert [trial.params for trial in study.trials] == [{}, {}]


def test_nothing_to_write_is_refused(solution):
    with pytest.raises(bilevel.InvalidProblem, match="nothing to write"):
        to_study({})
