"""Hypergradients for PyTorch training loops."""

from . import functional
from ._default import AutomaticCurvature
from .bilevel import BilevelOptimizer
from .checking import HypergradientCheck, check_hypergradient
from .curvature import Curvature, FiniteDifference, GaussNewton, Hessian
from .errors import HypergradientError, HypergradientWarning
from .estimators import PZOBO, HypergradientEstimator, ImplicitDifferentiation, Unrolled
from .health import HealthLog
from .ihvp import (
    CG,
    IHVP,
    NHGD,
    ConjugateGradient,
    DenseSolve,
    Identity,
    LancBiO,
    Neumann,
    Nystrom,
    NystromPCG,
    NystromSketch,
    Preconditioner,
    RecycledCG,
    RecycledPairs,
    Solution,
    SubBiO,
)
from .inner_optimizer import learn_hyperparameter
from .recording import PerSample
from .report import SolveReport

__version__ = "0.2.0"

__all__ = [
    "CG",
    "IHVP",
    "NHGD",
    "PZOBO",
    "AutomaticCurvature",
    "BilevelOptimizer",
    "ConjugateGradient",
    "Curvature",
    "DenseSolve",
    "FiniteDifference",
    "GaussNewton",
    "HealthLog",
    "Hessian",
    "HypergradientCheck",
    "HypergradientError",
    "HypergradientEstimator",
    "HypergradientWarning",
    "Identity",
    "ImplicitDifferentiation",
    "LancBiO",
    "Neumann",
    "Nystrom",
    "NystromPCG",
    "NystromSketch",
    "PerSample",
    "Preconditioner",
    "RecycledCG",
    "RecycledPairs",
    "Solution",
    "SolveReport",
    "SubBiO",
    "Unrolled",
    "check_hypergradient",
    "functional",
    "learn_hyperparameter",
]
