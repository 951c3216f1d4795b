"""Estimators with the conventions of scikit-learn, penalties tuned by hypergradients. Needs the extra `sklearn`."""

from bilevel.extras import extra

with extra("sklearn", {"sklearn": "scikit-learn"}, "bilevel.integrations.sklearn"):
    from bilevel.integrations.sklearn.kernel_ridge import BilevelKernelRidge
    from bilevel.integrations.sklearn.lasso import BilevelElasticNet, BilevelLasso
    from bilevel.integrations.sklearn.logistic import BilevelLogisticRegression
    from bilevel.integrations.sklearn.ridge import BilevelRidge
    from bilevel.integrations.sklearn.svc import BilevelLinearSVC

__all__ = [
    "BilevelElasticNet",
    "BilevelKernelRidge",
    "BilevelLasso",
    "BilevelLinearSVC",
    "BilevelLogisticRegression",
    "BilevelRidge",
]
