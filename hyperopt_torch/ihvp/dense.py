"""The exact solve, by forming the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .._tensors import wide_dtype
from ..operators import LinearOperator
from .base import IHVP, Solution


class DenseSolve(IHVP):
    """x = (H + ρI)⁻¹ b by n products and one eigendecomposition: the oracle for small problems.

    The blocks of H between different parameter tensors are all there.

    Args:
        damping: ρ >= 0, or "auto": relative to ‖H‖.

    Raises:
        ValueError: ``damping`` is not a finite number >= 0.

    Exact limit: always exact, to rounding. Eigenvalues of either sign are inverted as they are;
    those that are not positive set ``negative_curvature``. A singular matrix gives inf or NaN.

    Cost: n products, O(n²) memory, O(n³) time in float64; no sync.

    Example:
        >>> import torch
        >>> from hyperopt_torch.operators import Dense
        >>> DenseSolve(damping=1.0).solve(Dense(torch.eye(2)), torch.tensor([2.0, 4.0])).x
        tensor([1., 2.])
    """

    def __init__(self, damping: float | str = 0.0) -> None:
        super().__init__()
        self._set_damping(damping)

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        H = operator.dense().to(wide_dtype(rhs))  # (n, n)
        eigenvalues, V = torch.linalg.eigh((H + H.mT) / 2)
        shifted = eigenvalues + self.damped(operator, rhs).damping
        every = range(operator.shape[0])
        b = operator.take(rhs, every).to(H.dtype)
        x = operator.place((V @ ((V.mT @ b) / shifted)).to(rhs.dtype), every)
        return Solution(x, negative_curvature=(shifted <= 0).any())
