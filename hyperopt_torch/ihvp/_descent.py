"""Preconditioned conjugate directions, with every pair (q, Aq) kept: what the strategies share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .._tensors import wide_dtype
from ..operators import LinearOperator
from .base import Solution

FLAT = 1e-10  # curvature qᵀAq below this, relative to ‖Aq‖ at ‖q‖ = 1, is not positive


@dataclass(frozen=True)
class Pair:
    """A direction, its product, and its curvature qᵀAq > 0."""

    q: Tensor
    Aq: Tensor
    curvature: float


@dataclass
class Descent:
    """An iterate of A x = b, with Jᵀx, the residual, and the directions that led to it."""

    x: Tensor
    cross: Tensor | None
    r: Tensor
    norm: float  # ‖r‖
    rhs_norm: float  # ‖b‖
    curvature: float = 0.0  # xᵀAx
    squared: float | None = None  # ‖x‖², where it is known
    pairs: list[Pair] = field(default_factory=list)
    steps: int = 0  # without the warm start
    negative: bool = False

    @property
    def residual(self) -> float:
        return self.norm / self.rhs_norm if self.rhs_norm > 0 else 0.0

    def rayleigh(self, A: LinearOperator) -> float:
        """xᵀAx / xᵀx; 0 for x = 0. A sync where ‖x‖ is not known."""
        size = float(A.inner(self.x, self.x)) if self.squared is None else self.squared
        return self.curvature / size if size > 0 else 0.0

    def solution(self, tol: float | None, damping: float | None = None) -> Solution:
        """The result as a strategy returns it; ``tol`` is what it promised, if anything."""
        wide = wide_dtype(self.x)
        return Solution(
            self.x,
            cross=self.cross,
            residual=self.x.new_tensor(self.residual, dtype=wide),
            negative_curvature=self.negative,
            converged=None if tol is None else self.residual <= tol,
            curvature=self.x.new_tensor(self.curvature, dtype=wide),
            damping=damping,
        )


def begin(A: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Descent:
    """x = 0, or the best multiple of ``guess``, of either sign: one joint product."""
    rhs_norm = float(A.inner(b, b).sqrt())
    cold = Descent(torch.zeros_like(b), None, b, rhs_norm, rhs_norm)
    if guess is None or guess.shape != b.shape or rhs_norm == 0:
        return cold
    guess = guess.to(b)
    size = float(A.inner(guess, guess).sqrt())
    if not 0 < size < float("inf"):
        return cold
    q = guess / size
    Aq, Jq = A.joint(q)
    curvature, along = float(A.inner(q, Aq)), float(A.inner(q, b))
    if not curvature > FLAT * float(A.inner(Aq, Aq).sqrt()):
        return cold
    a = along / curvature
    r = b - a * Aq
    norm = float(A.inner(r, r).sqrt())
    pairs = [Pair(q, Aq, curvature)]
    return Descent(a * q, a * Jq, r, norm, rhs_norm, a * a * curvature, pairs=pairs)


def descend(
    A: LinearOperator,
    state: Descent,
    precondition: Callable[[Tensor], Tensor] | None,
    max_iter: int,
    tol: float = 0.0,
) -> Descent:
    """Up to ``max_iter`` steps along preconditioned residuals, A-orthogonal to all former ones.

    In exact arithmetic these are the iterates of preconditioned conjugate gradients; full
    orthogonalisation keeps them so in float32, and includes the warm start. Stops at
    ‖r‖ <= tol·‖b‖ before a product is spent, and at a direction of nonpositive curvature.

    Cost: one joint product and (2 + 2·directions) vector operations a step; syncs.
    """
    state = replace(state, pairs=list(state.pairs))
    floor = max(tol, torch.finfo(state.r.dtype).eps) * state.rhs_norm
    for _ in range(max_iter):
        if state.norm <= floor:
            break
        d = state.r if precondition is None else precondition(state.r)
        for pair in state.pairs:
            d = torch.sub(d, pair.q, alpha=float(A.inner(pair.Aq, d)) / pair.curvature)
        size = float(A.inner(d, d).sqrt())
        if not 0 < size < float("inf"):
            break
        q = d / size
        Aq, Jq = A.joint(q)
        curvature = float(A.inner(q, Aq))
        if not curvature > FLAT * float(A.inner(Aq, Aq).sqrt()):
            state.negative = curvature == curvature  # NaN is another trouble, and shows itself
            if not state.negative:
                state.x, state.norm = state.x + Aq, float("nan")
            break
        _advance(A, state, Pair(q, Aq, curvature), Jq)
    return state


def _advance(A: LinearOperator, state: Descent, pair: Pair, Jq: Tensor) -> None:
    alpha = float(A.inner(pair.q, state.r)) / pair.curvature
    state.x = torch.add(state.x, pair.q, alpha=alpha)
    state.r = torch.sub(state.r, pair.Aq, alpha=alpha)
    state.cross = alpha * Jq if state.cross is None else torch.add(state.cross, Jq, alpha=alpha)
    state.norm = float(A.inner(state.r, state.r).sqrt())
    state.curvature += alpha * alpha * pair.curvature
    state.pairs.append(pair)
    state.steps += 1


def rescued(A: LinearOperator, b: Tensor, found: Descent) -> Descent:
    """Where curvature failed: the multiple of x that is best for the residual, at no product.

    On an indefinite A an iterate may be any length. Ax = b - r is known, and ‖b - aAx‖ is least at
    a = bᵀAx/‖Ax‖². Where that says nothing, the same for b: one product.
    """
    if not found.negative or not found.rhs_norm > 0:
        return found
    x, cross, Ax = found.x, found.cross, b - found.r
    along, size = float(A.inner(b, Ax)), float(A.inner(Ax, Ax))
    if cross is None or not (along > 0 and size > 0):
        x, (Ax, cross) = b, A.joint(b)
        along, size = float(A.inner(b, Ax)), float(A.inner(Ax, Ax))
    a = along / size if along > 0 and size > 0 else found.rhs_norm / size**0.5 if size > 0 else 1.0
    r = b - a * Ax
    norm = float(A.inner(r, r).sqrt())
    curvature = a * a * float(A.inner(x, Ax))
    return replace(
        found, x=a * x, cross=a * cross, r=r, norm=norm, curvature=curvature, squared=None
    )
