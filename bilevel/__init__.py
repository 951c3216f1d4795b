"""Bilevel and hyperparameter optimization for PyTorch: one problem, every method, no silently wrong hypergradient."""

from bilevel import problems
from bilevel.callbacks import CSVLogger, EarlyStopping, Event, KeepBest
from bilevel.check import LayerCheck, ProblemReport, SecondOrderReport, Verdict, check, check_second_order
from bilevel.compare import compare
from bilevel.data import DataSource, Episodes, Full, Loader, Shuffled, episodes
from bilevel.hypergradients import (
    PES,
    ActiveSet,
    Certificate,
    Estimator,
    FirstOrder,
    ForwardMode,
    Hypergradient,
    Implicit,
    ImplicitKKT,
    Metasmoothness,
    OneStep,
    PoolGradient,
    TrainingRun,
    Unrolled,
    ZerothOrder,
    hypergradient,
    implicit_function,
    metagradient,
    metasmoothness,
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
from bilevel.lower_level import LowerSolution, solve_lower
from bilevel.modules import FunctionalModule, functional, weight_norm
from bilevel.optimizers import (
    LBFGS,
    SGD,
    Adam,
    AdamW,
    CoordinateDescent,
    Cosine,
    CountSteps,
    Knots,
    L1Normalized,
    OnlineRate,
    Optimizer,
    Power,
    ProximalGradient,
    Sign,
    StepDecay,
    from_torch,
)
from bilevel.oracles import Counts, Oracles
from bilevel.plan import Plan, plan
from bilevel.problem import Problem
from bilevel.regularizers import L1, L2, ElasticNet, GroupL1, Regularizer, SparseGroupL1
from bilevel.replay import Binomial, Disk, Host, KAry, Memory, Schedule, Sqrt, Store, StoreAll, Visited
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
    Metagradient,
    ProxF2SA,
    SparseDescent,
    amigo,
    imaml,
    implicit,
    neumann,
    nystrom,
    unrolled,
)
from bilevel.solvers._base import Metrics, Solver
from bilevel.solvers.published import darts, maml, reptile
from bilevel.space import (
    Curve,
    PerExample,
    PerInput,
    PerLayer,
    PerParameter,
    PerStep,
    PerUnit,
    Real,
    Space,
    Weights,
)
from bilevel.status import (
    BilevelError,
    BilevelWarning,
    Chaotic,
    CheckpointError,
    DataExhausted,
    Diverged,
    HypergradientInaccurate,
    IneffectiveHyperparameter,
    Infeasible,
    InfeasibleStart,
    InvalidProblem,
    LinearSolveFailed,
    MissingPackage,
    MultiplierAtBound,
    MultipliersUnbounded,
    NonDeterministic,
    NonFinite,
    NotMetasmooth,
    OutOfMemory,
    PrecisionWarning,
    ReplayMismatch,
    SecondOrderFallback,
    SecondOrderUnsupported,
    SolveFailed,
    Status,
    UnusedHyperparameter,
)
from bilevel.tune import Tuned, tune

__all__ = [
    "BAMM", "BDA", "BLOCC", "BOME", "CG", "F2BA", "F2SA", "F3SA", "GMRES", "GPBGD", "KKT", "L1", "L2", "LBFGS", "LVHBA",
    "MEHA", "MFAC", "MINRES", "PES", "SGD", "VPBGD", "ActiveSet", "Adam", "AdamW", "Affine", "Ball", "BilevelError",
    "BilevelWarning", "Binomial", "Box", "CSVLogger", "Certificate", "Chaotic", "CheckpointError", "Conditions",
    "CoordinateDescent", "Cosine", "CountSteps", "Counts", "Curve", "DataExhausted", "DataSource", "Dense", "Disk",
    "Diverged", "EarlyStopping", "ElasticNet", "Episodes", "Estimator", "Event", "FirstOrder", "ForwardMode", "Full",
    "FunctionalModule", "GroupL1", "Halfspace", "History", "Host", "Hypergradient", "HypergradientDescent",
    "HypergradientInaccurate", "Identity", "Implicit", "ImplicitKKT", "IneffectiveHyperparameter", "Infeasible",
    "InfeasibleStart", "InvalidProblem", "Jacobi", "JointHalfspace", "JointPolyhedron", "KAry", "KeepBest", "Knots",
    "L1Ball", "L1Normalized", "LayerCheck", "LinearSolution", "LinearSolveFailed", "LinearSolver", "Loader",
    "LowerSolution", "Memory", "Metagradient", "Metasmoothness", "Metrics", "MissingPackage", "MultiplierAtBound",
    "MultipliersUnbounded", "Neumann", "NonDeterministic", "NonFinite", "NonNegative", "NormalCG", "NotMetasmooth",
    "Nystrom", "NystromPreconditioner", "OneStep", "OnlineRate", "Operator", "Optimizer", "Oracles", "OutOfMemory",
    "PerExample", "PerInput", "PerLayer", "PerParameter", "PerStep", "PerUnit", "Plan", "PoolGradient", "Power",
    "PrecisionWarning", "Problem", "ProblemReport", "Product", "ProxF2SA", "ProximalGradient", "Real", "Regularizer",
    "ReplayMismatch", "Sama", "Schedule", "SecondOrderFallback", "SecondOrderReport", "SecondOrderUnsupported",
    "Session", "Set", "Shuffled", "Sign", "Simplex", "Solution", "SolveFailed", "Solver", "Space", "SparseDescent",
    "SparseGroupL1", "Sqrt", "Status", "StepDecay", "Store", "StoreAll", "TrainingRun", "Tuned", "Unrolled",
    "UnusedHyperparameter", "Verdict", "Visited", "Weights", "ZerothOrder", "amigo", "check", "check_second_order",
    "compare", "conditions", "darts", "episodes", "from_torch", "functional", "hypergradient", "imaml", "implicit",
    "implicit_function", "maml", "metagradient", "metasmoothness", "neumann", "nystrom", "plan", "problems", "reptile",
    "solve", "solve_lower", "tune", "unrolled", "weight_norm",
]  # fmt: skip
