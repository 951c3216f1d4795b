"""Estimators with the conventions of scikit-learn, penalties tuned by hypergradients. Needs the extra `sklearn`."""

try:
    from bilevel.integrations.sklearn.logistic import BilevelLogisticRegression
    from bilevel.integrations.sklearn.ridge import BilevelRidge
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "sklearn":
        raise
    raise ImportError("bilevel.integrations.sklearn needs scikit-learn: pip install 'bilevel[sklearn]'.") from error

__all__ = [
    "BilevelLogisticRegression",
    "BilevelRidge",
]
