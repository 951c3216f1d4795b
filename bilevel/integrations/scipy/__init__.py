"""SciPy's optimizers on the upper level, for hypergradients that are accurate. Needs the extra `scipy`."""

from bilevel.extras import extra

with extra("scipy", {"scipy": "SciPy"}, "bilevel.integrations.scipy"):
    from bilevel.integrations.scipy._minimize import minimize

__all__ = ["minimize"]
