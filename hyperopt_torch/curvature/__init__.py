"""What stands for the inner Hessian, one choice a file."""

from .base import Curvature, FirstOrderCurvature
from .finite_difference import FiniteDifference
from .gauss_newton import GaussNewton, NoGaussNewton
from .hessian import Hessian

__all__ = [
    "Curvature",
    "FiniteDifference",
    "FirstOrderCurvature",
    "GaussNewton",
    "Hessian",
    "NoGaussNewton",
]
