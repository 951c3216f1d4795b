"""Ready problems, imported as `bilevel.problems`. `ready` names those that the command line lists."""

if __name__ != "bilevel.problems":
    raise ImportError("import this package as bilevel.problems, so that its classes exist once")

from bilevel.problems._base import Task
from bilevel.problems.analytic import quadratic, scalar
from bilevel.problems.cells import cell_search, discrete_cell
from bilevel.problems.cleaning import clean, kept
from bilevel.problems.few_shot import few_shot
from bilevel.problems.glyphs import glyphs
from bilevel.problems.hyper_cleaning import hyper_cleaning, hyper_cleaning_mlp, noisy_digits
from bilevel.problems.imaml import imaml_quadratic
from bilevel.problems.logistic_regression import logistic_regression
from bilevel.problems.ridge import ridge
from bilevel.problems.sine import sine
from bilevel.problems.sparse import elastic_net, lasso, sparse_group
from bilevel.problems.svm import svm
from bilevel.problems.svm_primal import svm_primal
from bilevel.problems.toys import box, ineq, lasso1, llc, mc, mci, sc, shen, sin, wl

ready = (
    "scalar", "quadratic", "imaml_quadratic", "ridge", "logistic_regression", "hyper_cleaning", "hyper_cleaning_mlp",
    "cell_search", "lasso", "elastic_net", "sparse_group", "svm", "svm_primal", "glyphs", "sine",
    "box", "ineq", "lasso1", "llc", "mc", "mci", "sc", "shen", "sin", "wl",
)  # fmt: skip

__all__ = [
    "Task",
    "box",
    "cell_search",
    "clean",
    "discrete_cell",
    "elastic_net",
    "few_shot",
    "glyphs",
    "hyper_cleaning",
    "hyper_cleaning_mlp",
    "imaml_quadratic",
    "ineq",
    "kept",
    "lasso",
    "lasso1",
    "llc",
    "logistic_regression",
    "mc",
    "mci",
    "noisy_digits",
    "quadratic",
    "ready",
    "ridge",
    "sc",
    "scalar",
    "shen",
    "sin",
    "sine",
    "sparse_group",
    "svm",
    "svm_primal",
    "wl",
]  # fmt: skip
