"""The best length of a vector as an answer to Ax = b, and what it achieves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator
from .base import Solution


class Multiple:
    """The multiple of x with the smallest A-norm error, for one joint product.

    Attributes:
        length: of the multiple.
        gain: ‖x*‖² - ‖x* - length·x‖² in the A-norm, x* being the solution.
        flat: whether xᵀAx shows nonpositive curvature; x = 0 shows none.
    """

    def __init__(self, A: LinearOperator, b: Tensor, x: Tensor) -> None:
        self.b, self._x = b, x
        self._Ax, self._cross = A.joint(x)
        r = b - self._Ax
        pairs = [
            *((b, b), (b, x), (b, self._Ax)),
            *((x, x), (x, self._Ax), (self._Ax, self._Ax), (r, r)),
        ]
        self._scalars = torch.stack([A.inner(*pair) for pair in pairs])
        self.eps = torch.finfo(b.dtype).eps

    def read(self, *more: Tensor) -> list[float]:
        """Brings the scalars to the host, and ``more``, which it returns: one sync."""
        values: list[float] = torch.cat([self._scalars, *more]).tolist()
        self.bb, bx, self._bAx, self.xx, self.xAx, self.size, self.rr = values[:7]
        self.finite = all(map(math.isfinite, values))
        positive = self.xAx > 4 * self.eps * math.sqrt(self.xx * self.size)
        self.flat = self.xx > 0 and not positive
        self.length = bx / self.xAx if positive else 0.0
        self.gain = bx * self.length
        if not self.finite:
            self.length = 1.0
        return values[7:]

    def by_residual(self) -> None:
        """Goes by the residual instead, for an A that defines no norm; forward only."""
        self.length = max(self._bAx, 0.0) / self.size if self.size > 0 else 0.0
        self.gain = self._bAx * self.length

    @property
    def x(self) -> Tensor:
        return self.length * self._x

    @property
    def Ax(self) -> Tensor:
        return self.length * self._Ax

    def solution(self, A: LinearOperator, **known: Any) -> Solution:
        r = self.b - self.Ax
        residual = (A.inner(r, r) / (self.bb or 1.0)).sqrt()
        return Solution(self.x, self.length * self._cross, residual, **known)
