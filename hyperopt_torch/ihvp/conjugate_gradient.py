"""Conjugate gradients, truncated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._tensors import is_at_hand, wide_dtype
from ..errors import check_count, check_number
from ..operators import LinearOperator
from ._descent import begin, descend, rescued
from .base import IHVP, Preconditioner, Solution

_RUNAWAY = 100.0  # a residual over ‖b‖ that ill-conditioning alone hardly explains
_ASTRAY = 10.0  # the same for a solution to begin the next solve with


class ConjugateGradient(IHVP):
    """Conjugate gradients on (H + ρI) x = b, stopped after ``max_iter`` steps or at ``tol``.

    Args:
        max_iter: steps, >= 1.
        tol: stop when ‖r‖ <= tol·‖b‖, >= 0. Looking costs two syncs a step; with 0 nothing waits
            for the device, which does all steps, and the strategy runs under ``torch.func.vmap``.
        damping: ρ >= 0, or "auto": relative to ‖H‖.
        preconditioner: P ≈ H + ρI, such as ``NystromSketch(20)``, ``RecycledPairs()`` or an
            ``NHGD(...)`` that watches the inner steps. Directions are then fully orthogonalised:
            2·max_iter more vectors of memory, and a sync a step whatever ``tol`` is.
        warm_start: begin at the last solution, if its energy ½xᵀAx - bᵀx is below zero and
            its residual not above 10·‖b‖. Costs one product more, and pays where the system
            changes slowly.

    Raises:
        ValueError: ``max_iter`` < 1, ``tol`` < 0 or ``damping`` < 0.

    Exact limit: as many steps as H has distinct eigenvalues, for positive definite H + ρI.

    Trouble: where pᵀAp is not positive, H + ρI is not positive definite: the solve stops there and
    flags ``negative_curvature``. Then, and where the last residual is above 100·‖b‖, the
    iterate with the smallest residual is returned; otherwise the last one, which in exact
    arithmetic is the closest to the solution in the 2-norm and in the A-norm, though the residual
    may rise on the way. Stopped in its very
    first step it returns b·‖b‖/‖Ab‖. The zero vector is returned for b = 0 only.

    Cost: ``max_iter`` joint products (Ap, Jᵀp), one more if warm; Jᵀx is summed along the way, so
    no separate cross product is needed. Five vectors of memory; two syncs a step if tol > 0.

    Example:
        >>> import torch
        >>> from hyperopt_torch.operators import Dense
        >>> H = Dense(torch.diag(torch.tensor([1.0, 4.0])))
        >>> ConjugateGradient(2).solve(H, torch.tensor([1.0, 1.0])).x
        tensor([1.0000, 0.2500])

    Reference: Hestenes & Stiefel, 1952; for hypergradients Pedregosa, ICML 2016.
    """

    def __init__(
        self,
        max_iter: int = 10,
        *,
        tol: float = 1e-6,
        damping: float | str = 0.0,
        warm_start: bool = False,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        super().__init__()
        self.max_iter = check_count("max_iter", max_iter)
        self.tol = check_number("tol", tol)
        self._set_damping(damping)
        self.warm_start = bool(warm_start)
        if preconditioner is not None and not isinstance(preconditioner, Preconditioner):
            raise TypeError(
                f"preconditioner must be an object such as NystromSketch(20); got "
                f"{preconditioner!r}."
            )
        self.preconditioner = preconditioner

    @property
    def vectors(self) -> int:
        return (
            5
            if self.preconditioner is None
            else self.preconditioner.vectors + 3 * self.max_iter + 8
        )

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        if self.preconditioner is not None:
            return self._preconditioned(operator, rhs, self.preconditioner)
        A = self.damped(operator, rhs)
        # With a tolerance every decision is read from the device anyway, and on the CPU reading is
        # free: then scalars are plain floats, and decisions `if`. Without one on an accelerator
        # they stay tensors, and `_select` is a mask. One algorithm.
        reads = self.tol > 0 or is_at_hand(rhs)
        read: Callable[[Tensor], Any] = float if reads else _keep
        eps = torch.finfo(rhs.dtype).eps
        bb = read(A.inner(rhs, rhs))
        stop = max(self.tol, eps) ** 2 * bb
        x, h, r, warm = self._start(A, rhs, read)
        rr = read(A.inner(r, r))
        # Best so far; a cold start from zero does not count, an answer of zero says nothing.
        best_x, best_h, best_rr = x, h, _select(warm, rr, float("inf"))
        p, pp, steepest = r, rr, 0.0
        active, negative = rr > stop, rr < 0
        for step in range(self.max_iter):
            if reads and not active:
                break
            Ap, Jp = A.joint(p)
            pAp = read(A.inner(p, Ap))
            if step == 0:
                size = read(A.inner(Ap, Ap))
                flat = active & (pAp <= 4 * eps * (pp * size) ** 0.5)
                # Nothing better is known than b, at a length that fits ‖A‖.
                safe = (pp / _select(size > 0, size, 1.0)) ** 0.5
                alpha = _select(flat, _select(warm, 0.0, safe), rr / _select(flat, 1.0, pAp))
            else:  # curvature is compared with the largest met so far
                flat = active & (pAp <= 4 * eps * steepest * pp)
                alpha = rr / _select(flat | (pAp == 0), 1.0, pAp) * _select(flat, 0.0, 1.0)
            negative = negative | flat
            alpha = _select(active, alpha, 0.0)
            active = active & (flat ^ True)
            curvature = pAp / _select(pp > 0, pp, 1.0)
            steepest = _select(curvature > steepest, curvature, steepest)
            x, r, h = _axpy(alpha, p, x), _axpy(-alpha, Ap, r), _axpy(alpha, Jp, h)
            previous, rr = rr, read(A.inner(r, r))
            better = rr < best_rr
            best_x, best_h = _select(better, x, best_x), _select(better, h, best_h)
            best_rr = _select(better, rr, best_rr)
            beta = _select(active, rr / _select(previous > 0, previous, 1.0), 0.0)
            p, pp = _axpy(beta, p, r), rr + beta * beta * pp
            active = active & (rr > stop)
        energy = A.inner(x, rhs - r)
        retreat = negative | (rr > _RUNAWAY**2 * bb)
        x, h = _select(retreat, best_x, x), _select(retreat, best_h, h)
        rr = _select(retreat, best_rr, rr)
        if self.warm_start:
            self.state["x"] = x
        residual = (rr / _select(bb > 0, bb, 1.0)) ** 0.5
        return Solution(
            x,
            cross=h if h.ndim else None,  # no product was needed for b = 0
            residual=torch.as_tensor(residual, dtype=wide_dtype(rhs), device=rhs.device),
            negative_curvature=negative,
            converged=rr <= stop if self.tol > 0 else None,
            curvature=torch.where(torch.as_tensor(retreat), torch.inf, energy),  # not of that x
        )

    def _preconditioned(
        self, operator: LinearOperator, rhs: Tensor, preconditioner: Preconditioner
    ) -> Solution:
        A = self.damped(operator, rhs)
        found = begin(A, rhs, self.state.get("x") if self.warm_start else None)
        precondition = preconditioner.prepare(operator, A.damping)
        found = descend(A, found, precondition, self.max_iter, self.tol)
        # The warm start is a pair like the others; only H, without ρ, is worth remembering.
        preconditioner.learn(operator, [(p.q, p.Aq - A.damping * p.q) for p in found.pairs])
        found = rescued(A, rhs, found)
        if self.warm_start:
            self.state["x"] = found.x
        return found.solution(self.tol or None)

    def _start(
        self, A: LinearOperator, rhs: Tensor, read: Callable[[Tensor], Any]
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """x, Jᵀx, b - Ax, and whether that x is the last solution."""
        zero, no_cross = torch.zeros_like(rhs), rhs.new_zeros(())
        last: Tensor | None = self.state.get("x")
        if not self.warm_start or last is None or last.shape != rhs.shape:
            return zero, no_cross, rhs, False
        last = last.to(rhs)
        Ax, h = A.joint(last)
        r = rhs - Ax
        # Worth keeping if its energy ½xᵀAx - bᵀx = -½xᵀ(b + r) is below that of zero, which CG
        # lowers at every step; a residual may rise on the way. NaN compares false.
        # On an indefinite A both go astray together, so the residual has a say, too.
        near = read(A.inner(r, r)) <= _ASTRAY**2 * read(A.inner(rhs, rhs))
        warm = (read(A.inner(last, rhs + r)) > 0) & near
        return _select(warm, last, zero), _select(warm, h, no_cross), _select(warm, r, rhs), warm


def _keep(scalar: Tensor) -> Tensor:
    return scalar


def _select(condition: Any, yes: Any, no: Any) -> Any:
    """``yes if condition else no``, as a mask where the condition is a tensor."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def _axpy(alpha: Any, x: Tensor, y: Tensor) -> Tensor:
    """αx + y."""
    if isinstance(alpha, Tensor):
        return y + alpha * x
    return torch.add(y, x, alpha=alpha)


CG = ConjugateGradient
