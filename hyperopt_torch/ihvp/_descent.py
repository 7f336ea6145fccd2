"""Preconditioned conjugate directions, with every pair (q, Aq) kept: what the strategies share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..operators import LinearOperator
from .base import Solution

_FLAT = 1e-10  # curvature qᵀAq below this, relative to ‖Aq‖ at ‖q‖ = 1, is not positive


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
    pairs: list[Pair] = field(default_factory=list)
    steps: int = 0  # without the warm start
    negative: bool = False
    slope: float = 0.0  # |qᵀAq| / qᵀq where curvature failed

    @property
    def residual(self) -> float:
        return self.norm / self.rhs_norm if self.rhs_norm > 0 else 0.0

    def solution(
        self, A: LinearOperator, b: Tensor, tol: float | None, notes: tuple[str, ...] = ()
    ) -> Solution:
        """The result as a strategy returns it; ``tol`` is what it promised, if anything."""
        return Solution(
            self.x,
            cross=self.cross,
            residual=torch.tensor(self.residual, dtype=torch.float64, device=self.x.device),
            negative_curvature=self.negative,
            converged=None if tol is None else self.residual <= tol,
            curvature=A.inner(self.x, b - self.r),
            notes=notes,
        )


def begin(A: LinearOperator, b: Tensor, guess: Tensor | None = None) -> Descent:
    """x = 0, or the best multiple of ``guess`` if it points downhill: one joint product."""
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
    if not (curvature > _FLAT * float(A.inner(Aq, Aq).sqrt()) and along > 0):
        return cold
    a = along / curvature
    r = b - a * Aq
    norm = float(A.inner(r, r).sqrt())
    return Descent(a * q, a * Jq, r, norm, rhs_norm, [Pair(q, Aq, curvature)])


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
        if not curvature > _FLAT * float(A.inner(Aq, Aq).sqrt()):
            state.negative = curvature == curvature  # NaN is another trouble, and shows itself
            state.slope = abs(curvature)
            if not state.negative:
                state.x, state.norm = state.x + Aq, float("nan")
            elif not state.steps and not state.pairs:  # nothing better than b is known
                _fall_back(A, state, q, Aq, Jq)
            break
        _advance(A, state, Pair(q, Aq, curvature), Jq)
    return state


def _advance(A: LinearOperator, state: Descent, pair: Pair, Jq: Tensor) -> None:
    alpha = float(A.inner(pair.q, state.r)) / pair.curvature
    state.x = torch.add(state.x, pair.q, alpha=alpha)
    state.r = torch.sub(state.r, pair.Aq, alpha=alpha)
    state.cross = alpha * Jq if state.cross is None else torch.add(state.cross, Jq, alpha=alpha)
    state.norm = float(A.inner(state.r, state.r).sqrt())
    state.pairs.append(pair)
    state.steps += 1


def _fall_back(A: LinearOperator, state: Descent, q: Tensor, Aq: Tensor, Jq: Tensor) -> None:
    """x = q‖b‖/‖Aq‖, positive and no longer than the curvature along b would make it."""
    size = float(A.inner(Aq, Aq).sqrt())
    alpha = state.rhs_norm / size if size > 0 else state.rhs_norm
    sign = 1.0 if float(A.inner(q, state.r)) >= 0 else -1.0
    state.x, state.cross = sign * alpha * q, sign * alpha * Jq
    state.r = state.r - sign * alpha * Aq
    state.norm = float(A.inner(state.r, state.r).sqrt())
