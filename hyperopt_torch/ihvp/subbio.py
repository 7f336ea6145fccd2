"""SubBiO: the Galerkin solution in a plane that turns with every outer step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import check_number
from ..operators import LinearOperator
from ._projected import CUT, ROUNDING, clipped_solve, nonzero
from .base import IHVP, Solution


class SubBiO(IHVP):
    """The Galerkin solution in the plane of b and (I - ηA)x, where x is that of the last solve.

    With an orthonormal basis V of the plane and A = H + ρI: x ← V (VᵀAV)⁻¹ Vᵀb. The plane holds
    x + η(b - Ax), one step of gradient descent on ½xᵀAx - bᵀx, so in a fixed system it converges
    at least as fast as gradient descent with steps η does.

    Args:
        step_size: η > 0; about 1 / λ_max(A).
        damping: ρ >= 0, or "auto": relative to ‖H‖.

    Raises:
        ValueError: ``step_size`` is not positive, or ``damping`` < 0.

    Exact limit: a fixed positive definite system, after infinitely many solves; on a plane (n = 2)
    at the second.

    Trouble: where (I - ηA)x is parallel to b, or nothing is remembered, the plane is the line of
    b. Eigenvalues of VᵀAV that are not above 1e-8 of the largest are left out, and flagged where
    they show nonpositive curvature; if none is left, b·‖b‖/‖Ab‖ is returned. NaN is returned as it
    comes, and then forgotten.

    Cost: 3 products, Jᵀx included (one at the first solve); 14 vectors of memory at its peak, one
    kept; no sync.

    Example:
        >>> import torch
        >>> from hyperopt_torch.operators import Dense
        >>> H, b = torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 1.0])
        >>> solver = SubBiO(step_size=0.2)
        >>> for outer_step in range(2):
        ...     x = solver.solve(Dense(H), b).x
        >>> x
        tensor([1.0000, 0.2500])

    Reference: Yang, Gao & Yuan, "LancBiO: dynamic Lanczos-aided bilevel optimization via Krylov
    subspace", ICLR 2025.
    """

    def __init__(self, step_size: float, *, damping: float | str = 0.0) -> None:
        super().__init__()
        self.step_size = check_number("step_size", step_size, positive=True)
        self._set_damping(damping)

    @property
    def vectors(self) -> int:
        return 14

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        A = self.damped(operator, rhs)
        basis = self._basis(A, rhs)
        products, crosses = zip(*(A.joint(v) for v in basis), strict=True)
        V, AV, JV = (torch.stack(parts, dim=1) for parts in (basis, products, crosses))
        G, Vb = A.inner(V, AV), A.inner(V, rhs)
        y, mu = clipped_solve(G, Vb, torch.zeros_like(Vb[0]))
        size = A.inner(AV, AV).diagonal()
        # Nothing better is known than b, at a length that fits ‖A‖.
        along = torch.where(torch.arange(len(basis), device=y.device) == 0, Vb, 0.0)
        y = torch.where((y == 0).all(), along / nonzero(size[0].sqrt()), y)
        eps = torch.finfo(rhs.dtype).eps
        flat = ((size > 0) & (G.diagonal() <= 4 * eps * size.sqrt())).any()
        flat = flat | (mu[0] < -CUT * mu[-1])
        weights = y.to(rhs.dtype)
        x, r = V @ weights, rhs - AV @ weights
        self.state["x"] = x
        residual = (A.inner(r, r) / nonzero(A.inner(rhs, rhs))).sqrt()
        return Solution(x, JV @ weights, residual, negative_curvature=flat)

    def _basis(self, A: LinearOperator, b: Tensor) -> list[Tensor]:
        """b and (I - ηA)x, orthonormal; a zero vector stands for a direction that is not there."""
        v = b / nonzero(A.inner(b, b).sqrt())
        x: Tensor | None = self.state.get("x")
        if x is None or (x.shape, x.dtype, x.device) != (b.shape, b.dtype, b.device):
            return [v]
        x = torch.where(A.inner(x, x).isfinite(), x, 0.0)
        z = x - self.step_size * (A @ x)
        length = A.inner(z, z).sqrt()
        for _ in range(2):  # once leaves rounding along b
            z = z - A.inner(v, z) * v
        rest = A.inner(z, z).sqrt()
        parallel = rest <= ROUNDING * torch.finfo(b.dtype).eps * length
        return [v, torch.where(parallel, 0.0, z / nonzero(rest))]
