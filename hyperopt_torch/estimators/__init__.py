"""From an outer loss to its hypergradient, one family a file."""

from ._problem import BilevelProblem
from .base import HypergradientEstimator
from .implicit import ImplicitDifferentiation
from .pzobo import PZOBO
from .unrolled import Unrolled

__all__ = [
    "PZOBO",
    "BilevelProblem",
    "HypergradientEstimator",
    "ImplicitDifferentiation",
    "Unrolled",
]
