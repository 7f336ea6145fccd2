"""What stands for the inner Hessian, one choice a file."""

from .base import Curvature
from .gauss_newton import GaussNewton, NoGaussNewton
from .hessian import Hessian

__all__ = ["Curvature", "GaussNewton", "Hessian", "NoGaussNewton"]
