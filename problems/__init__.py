"""Ready problems, imported as `bilevel.problems`. `ready` names those that the command line lists."""

if __name__ != "bilevel.problems":
    raise ImportError("import this package as bilevel.problems, so that its classes exist once")

from bilevel.problems._base import Task
from bilevel.problems._datasets import Part, Parts
from bilevel.problems._fetch import Dataset, load
from bilevel.problems._networks import retrained
from bilevel.problems.analytic import quadratic, scalar
from bilevel.problems.audit import random_change, robustness_audit
from bilevel.problems.augmentation import augmentation
from bilevel.problems.cells import cell_search, discrete_cell
from bilevel.problems.cleaning import clean, kept
from bilevel.problems.coreset import coreset
from bilevel.problems.digits import mnist_parts, small_parts
from bilevel.problems.feature_selection import feature_selection
from bilevel.problems.few_shot import few_shot
from bilevel.problems.glyphs import glyphs
from bilevel.problems.hyper_cleaning import hyper_cleaning, hyper_cleaning_mlp, noisy_digits
from bilevel.problems.imaml import imaml_quadratic
from bilevel.problems.logistic_regression import logistic_regression
from bilevel.problems.long_tail import long_tail
from bilevel.problems.meta_weight_net import meta_weight_net
from bilevel.problems.ridge import ridge
from bilevel.problems.schedule import learning_rates
from bilevel.problems.selection import Pool, data_selection, noisy_pool
from bilevel.problems.sine import sine
from bilevel.problems.sparse import elastic_net, lasso, sparse_group
from bilevel.problems.svm import svm
from bilevel.problems.svm_primal import svm_primal
from bilevel.problems.toys import box, ineq, lasso1, llc, mc, mci, sc, shen, sin, wl
from bilevel.problems.weight_decays import weight_decays

ready = (
    "scalar", "quadratic", "imaml_quadratic", "ridge", "logistic_regression", "hyper_cleaning", "hyper_cleaning_mlp",
    "cell_search", "lasso", "elastic_net", "sparse_group", "svm", "svm_primal",
    "feature_selection", "long_tail", "coreset", "meta_weight_net", "augmentation", "glyphs", "sine",
    "weight_decays", "learning_rates", "data_selection", "robustness_audit",
    "box", "ineq", "lasso1", "llc", "mc", "mci", "sc", "shen", "sin", "wl",
)  # fmt: skip

__all__ = [
    "Dataset",
    "Part",
    "Parts",
    "Pool",
    "Task",
    "augmentation",
    "box",
    "cell_search",
    "clean",
    "coreset",
    "data_selection",
    "discrete_cell",
    "elastic_net",
    "feature_selection",
    "few_shot",
    "glyphs",
    "hyper_cleaning",
    "hyper_cleaning_mlp",
    "imaml_quadratic",
    "ineq",
    "kept",
    "lasso",
    "lasso1",
    "learning_rates",
    "llc",
    "load",
    "logistic_regression",
    "long_tail",
    "mc",
    "mci",
    "meta_weight_net",
    "mnist_parts",
    "noisy_digits",
    "noisy_pool",
    "quadratic",
    "random_change",
    "ready",
    "retrained",
    "ridge",
    "robustness_audit",
    "sc",
    "scalar",
    "shen",
    "sin",
    "sine",
    "small_parts",
    "sparse_group",
    "svm",
    "svm_primal",
    "weight_decays",
    "wl",
]
