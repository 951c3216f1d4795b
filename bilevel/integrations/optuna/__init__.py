"""Optuna for what has no gradient, hypergradients for what has one. Needs the extra `optuna`."""

from bilevel.extras import extra

with extra("optuna", {"optuna": "Optuna"}, "bilevel.integrations.optuna"):
    from bilevel.integrations.optuna.export import to_study
    from bilevel.integrations.optuna.objective import BilevelObjective, report_callback
    from bilevel.integrations.optuna.sampler import HypergradientSampler, report_hypergradient
    from bilevel.integrations.optuna.storage import shared_storage
    from bilevel.integrations.optuna.worker import run_trials

__all__ = [
    "BilevelObjective",
    "HypergradientSampler",
    "report_callback",
    "report_hypergradient",
    "run_trials",
    "shared_storage",
    "to_study",
]
