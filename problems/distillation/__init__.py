"""Dataset distillation: a few images such that networks trained on them alone do well; one published method a file."""

from bilevel.problems._datasets import Split
from bilevel.problems.distillation.adabelief import AdaBelief
from bilevel.problems.distillation.baselines import cluster_centers, random_images
from bilevel.problems.distillation.cda import cda
from bilevel.problems.distillation.digits import digits, mnist_from
from bilevel.problems.distillation.evaluation import Evaluation, Recipe, evaluate
from bilevel.problems.distillation.frepo import FRePo
from bilevel.problems.distillation.implicit import implicit
from bilevel.problems.distillation.mtt import MTT, Trajectories, train_experts
from bilevel.problems.distillation.networks import Network, conv_net, mlp
from bilevel.problems.distillation.picture import save_grid
from bilevel.problems.distillation.pool import Pool
from bilevel.problems.distillation.rat_bptt import RaTBPTT
from bilevel.problems.distillation.rates import RateControl
from bilevel.problems.distillation.rcig import RCIG
from bilevel.problems.distillation.statement import Distillation, distillation
from bilevel.problems.distillation.synthetic import Synthetic

__all__ = [
    "MTT",
    "RCIG",
    "AdaBelief",
    "Distillation",
    "Evaluation",
    "FRePo",
    "Network",
    "Pool",
    "RaTBPTT",
    "RateControl",
    "Recipe",
    "Split",
    "Synthetic",
    "Trajectories",
    "cda",
    "cluster_centers",
    "conv_net",
    "digits",
    "distillation",
    "evaluate",
    "implicit",
    "mlp",
    "mnist_from",
    "random_images",
    "save_grid",
    "train_experts",
]
