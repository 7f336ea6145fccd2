"""Entries of θ that hooks keep from moving are constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._tensors import FlatLayout, here
from ..operators import LinearOperator, Wrapping


class Moving(Wrapping):
    """P H P + (I - P) for a projection P onto entries: the others are zero in, zero out.

    Args:
        operator: H.
        moving: (n,) 1 where θ moves, 0 where it stands still.
    """

    def __init__(self, operator: LinearOperator, moving: Tensor) -> None:
        super().__init__(operator)
        self.moving = moving

    def _product(self, x: Tensor) -> Tensor:
        m = self.moving
        return m * (self.operator @ (m * x)) + (1 - m) * x

    def _products(self, X: Tensor) -> Tensor:
        m = self.moving[:, None]
        return m * (self.operator @ (m * X)) + (1 - m) * X

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = self.moving
        product, cross = self.operator.joint(m * x)
        return m * product + (1 - m) * x, cross

    def _exact(self, x: Tensor) -> Tensor:
        m = self.moving
        return m * self.operator.exact(m * x) + (1 - m) * x


def hook_zeros(parameters: Sequence[Tensor]) -> dict[int, Tensor]:
    """Where the gradients of parameters with hooks are zero, by their number.

    A hook that multiplies by a mask, as for pruning, keeps these entries from moving.
    """
    hooked = [(i, p) for i, p in enumerate(parameters) if p._backward_hooks]
    return {i: here(p.grad) == 0 for i, p in hooked if p.grad is not None and not p.grad.is_sparse}


def moving(zeros: Mapping[int, Tensor], gradient: Tensor, layout: FlatLayout) -> Tensor | None:
    """(n,) 0 where a hook made zero of a gradient that is none; None where it cannot be."""
    if not zeros:
        return None
    parts = layout.unflatten(gradient)
    found = [
        ~(zeros[i] & (part != 0)) if i in zeros else torch.ones_like(part, dtype=torch.bool)
        for i, part in enumerate(parts)
    ]
    return torch.cat([part.reshape(-1) for part in found]).to(layout.dtype)
