"""x ≈ (H + ρI)⁻¹ b, one strategy a file."""

from ._recycling import RecycledPairs
from .base import IHVP, Preconditioner, Solution
from .conjugate_gradient import CG, ConjugateGradient
from .dense import DenseSolve
from .identity import Identity
from .lancbio import LancBiO
from .neumann import Neumann
from .nhgd import NHGD
from .nystrom import Nystrom
from .nystrom_pcg import NystromPCG, NystromSketch
from .recycled_cg import RecycledCG
from .subbio import SubBiO

__all__ = [
    "CG",
    "IHVP",
    "NHGD",
    "ConjugateGradient",
    "DenseSolve",
    "Identity",
    "LancBiO",
    "Neumann",
    "Nystrom",
    "NystromPCG",
    "NystromSketch",
    "Preconditioner",
    "RecycledCG",
    "RecycledPairs",
    "Solution",
    "SubBiO",
]
