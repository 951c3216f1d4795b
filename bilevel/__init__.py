"""Bilevel and hyperparameter optimization for PyTorch: one problem, every method, no silently wrong hypergradient."""

from bilevel import problems
from bilevel.callbacks import CSVLogger, EarlyStopping, Event
from bilevel.compare import compare
from bilevel.data import DataSource, Full, Loader, Shuffled
from bilevel.hypergradients import (
    ActiveSet,
    Certificate,
    Estimator,
    Hypergradient,
    Implicit,
    ImplicitKKT,
    hypergradient,
    implicit_function,
)
from bilevel.linear import (
    CG,
    GMRES,
    MFAC,
    MINRES,
    Dense,
    Identity,
    Jacobi,
    LinearSolution,
    LinearSolver,
    Neumann,
    NormalCG,
    Nystrom,
    NystromPreconditioner,
    Operator,
    Sama,
)
from bilevel.loop import solve
from bilevel.lower_conditions import Conditions, conditions
from bilevel.modules import FunctionalModule, functional
from bilevel.optimizers import (
    LBFGS,
    SGD,
    Adam,
    AdamW,
    CoordinateDescent,
    Cosine,
    Optimizer,
    Power,
    ProximalGradient,
    StepDecay,
    from_torch,
)
from bilevel.oracles import Counts, Oracles
from bilevel.problem import Problem
from bilevel.regularizers import L1, L2, ElasticNet, GroupL1, Regularizer, SparseGroupL1
from bilevel.session import Session
from bilevel.sets import (
    Affine,
    Ball,
    Box,
    Halfspace,
    JointHalfspace,
    JointPolyhedron,
    L1Ball,
    NonNegative,
    Product,
    Set,
    Simplex,
)
from bilevel.solution import History, Solution
from bilevel.solvers import (
    BAMM,
    BDA,
    BLOCC,
    BOME,
    F2BA,
    F2SA,
    F3SA,
    GPBGD,
    KKT,
    LVHBA,
    MEHA,
    VPBGD,
    HypergradientDescent,
    ProxF2SA,
    SparseDescent,
    amigo,
    imaml,
    implicit,
    neumann,
    nystrom,
)
from bilevel.solvers._base import Metrics, Solver
from bilevel.status import (
    BilevelError,
    BilevelWarning,
    DataExhausted,
    Diverged,
    HypergradientInaccurate,
    IneffectiveHyperparameter,
    Infeasible,
    InfeasibleStart,
    InvalidProblem,
    LinearSolveFailed,
    MultiplierAtBound,
    MultipliersUnbounded,
    NonDeterministic,
    NonFinite,
    PrecisionWarning,
    SecondOrderFallback,
    SecondOrderUnsupported,
    SolveFailed,
    Status,
    UnusedHyperparameter,
)

__all__ = [
    "BAMM", "BDA", "BLOCC", "BOME", "CG", "F2BA", "F2SA", "F3SA", "GMRES", "GPBGD", "KKT", "L1", "L2", "LBFGS", "LVHBA",
    "MEHA", "MFAC", "MINRES", "SGD", "VPBGD", "ActiveSet", "Adam", "AdamW", "Affine", "Ball", "BilevelError",
    "BilevelWarning", "Box", "CSVLogger", "Certificate", "Conditions", "CoordinateDescent", "Cosine", "Counts",
    "DataExhausted", "DataSource", "Dense", "Diverged", "EarlyStopping", "ElasticNet", "Estimator", "Event", "Full",
    "FunctionalModule", "GroupL1", "Halfspace", "History", "Hypergradient", "HypergradientDescent",
    "HypergradientInaccurate", "Identity", "Implicit", "ImplicitKKT", "IneffectiveHyperparameter", "Infeasible",
    "InfeasibleStart", "InvalidProblem", "Jacobi", "JointHalfspace", "JointPolyhedron", "L1Ball", "LinearSolution",
    "LinearSolveFailed", "LinearSolver", "Loader", "Metrics", "MultiplierAtBound", "MultipliersUnbounded", "Neumann",
    "NonDeterministic", "NonFinite", "NonNegative", "NormalCG", "Nystrom", "NystromPreconditioner", "Operator",
    "Optimizer", "Oracles", "Power", "PrecisionWarning", "Problem", "Product", "ProxF2SA", "ProximalGradient",
    "Regularizer", "Sama", "SecondOrderFallback", "SecondOrderUnsupported", "Session", "Set", "Shuffled", "Simplex",
    "Solution", "SolveFailed", "Solver", "SparseDescent", "SparseGroupL1", "Status", "StepDecay",
    "UnusedHyperparameter", "amigo", "compare", "conditions", "from_torch", "functional", "hypergradient", "imaml",
    "implicit", "implicit_function", "neumann", "nystrom", "problems", "solve",
]  # fmt: skip
