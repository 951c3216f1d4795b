"""Estimators with the conventions of scikit-learn, penalties tuned by hypergradients. Needs the extra `sklearn`."""

try:
    from bilevel.integrations.sklearn.kernel_ridge import BilevelKernelRidge
    from bilevel.integrations.sklearn.lasso import BilevelElasticNet, BilevelLasso
    from bilevel.integrations.sklearn.logistic import BilevelLogisticRegression
    from bilevel.integrations.sklearn.ridge import BilevelRidge
    from bilevel.integrations.sklearn.svc import BilevelLinearSVC
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "sklearn":
        raise
    raise ImportError("bilevel.integrations.sklearn needs scikit-learn: pip install 'bilevel[sklearn]'.") from error

__all__ = [
    "BilevelElasticNet",
    "BilevelKernelRidge",
    "BilevelLasso",
    "BilevelLinearSVC",
    "BilevelLogisticRegression",
    "BilevelRidge",
]
