"""Conjugate gradients with the two defects behind a published comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperopt_torch import IHVP
from hyperopt_torch.operators import LinearOperator


class BettyCG(IHVP):
    """Conjugate gradients as in betty 0.1.1, scaled by α; either defect can be mended.

    Args:
        old_residual: make the new direction from the residual before the step.
        long_residual: leave out α in the residual's update, which is then 1/α times too long.
    """

    def __init__(
        self, scale: float, max_iter: int = 5, old_residual: bool = True, long_residual: bool = True
    ) -> None:
        super().__init__()
        self.scale, self.max_iter = scale, max_iter
        self.old_residual, self.long_residual = old_residual, long_residual

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Tensor:
        x, r, p = torch.zeros_like(rhs), rhs, rhs
        for _ in range(self.max_iter):
            Hp, rr = operator @ p, operator.inner(r, r)
            step = rr / (self.scale * operator.inner(p, Hp))
            x = x + step * p
            new = r - (1.0 if self.long_residual else self.scale) * step * Hp
            p = (r if self.old_residual else new) + operator.inner(new, new) / rr * p
            r = new
        return self.scale * x
