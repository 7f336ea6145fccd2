"""Conjugate directions in coordinates: all that is small happens on the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._tensors import read
from ..operators import LinearOperator
from ._descent import FLAT, Descent
from ._recycling import RecycledPairs


class RecycledDescent:
    """One solve of (H + ρI) x = b, warm, along directions preconditioned by the ring of pairs.

    Every direction, and the residual, is a combination of the rows of the ring's R, the last of
    which is the residual itself. With the Gram matrix G = RRᵀ a direction is found, made
    conjugate and normalised in its coordinates c, before one pass q = Rᵀc forms it; one pass more
    takes the new row of G after its product. A sync a product.

    Solved is (H/u + ρ/u) y = b/‖b‖, with u the ring's unit, so that no dot product underflows;
    x = ‖b‖/u · y.

    Attributes:
        rhs_norm: ‖b‖.
        steps: without the warm start.
        negative: whether a curvature was not positive; the solve has ended there.
        start: yᵀAy of the warm start, 0 without one.
        curvature: yᵀAy; conjugate directions have lowered the energy to minus half of it.
    """

    def __init__(
        self, operator: LinearOperator, pairs: RecycledPairs, damping: float, rhs: Tensor
    ) -> None:
        self._operator, self._pairs, self._damping, self._rhs = operator, pairs, damping, rhs
        self._R, self._G = pairs.ring(rhs), pairs.gram
        self._last = len(self._R) - 1  # the row of the residual
        self._known = pairs.alive()  # the slots that precondition this solve
        self._preconditioner: tuple[float, Tensor] | None = None  # γ, M, once a step is due
        # Of this solve's pairs: slots, with curvatures qᵀAq and coefficients of y.
        self._own: list[tuple[int, float, float]] = []
        self._y = torch.zeros_like(rhs)
        self._cross: Tensor | None = None
        self._warm: tuple[float, int, Tensor] | None = None  # y, its slot, Jᵀy of the warm start
        self._resolution = torch.finfo(rhs.dtype).eps ** 0.5
        self.steps, self.negative, self.start, self.curvature = 0, False, 0.0, 0.0

    # Public ----------------------------------------------------------------------------------

    def begin(self, guess: Tensor | None) -> None:
        """y = 0, or the best multiple of ``guess``, of either sign: one product."""
        b, A, last = self._rhs, self._operator, self._last
        usable = guess is not None and guess.shape == b.shape
        g = guess.to(b) if guess is not None and usable else b
        bb, gg = read(torch.stack([A.inner(b, b), A.inner(g, g)])).tolist()
        self.rhs_norm = bb**0.5
        if not 0 < bb < math.inf:
            return
        slot = self._pairs.next_slot
        self._pairs.overwrite(slot, slot + 1, self._pairs.slots)  # see _enter for the second
        torch.mul(b, 1 / self.rhs_norm, out=self._R[last])
        if not (usable and 0 < gg < math.inf):
            self._measure_residual()
        else:
            torch.mul(g, gg**-0.5, out=self._R[2 * slot])
            self._measured = 1.0
            if self._enter(warm=True):
                self.start, self.steps = self.curvature, 0

    def descend(self, max_iter: int, tol: float) -> None:
        """Up to ``max_iter`` steps, until ‖r‖ <= tol·‖b‖; one joint product each."""
        floor = max(tol, torch.finfo(self._rhs.dtype).eps)
        for _ in range(max_iter):
            if not (self.residual > floor) or self.negative or not self._step():
                break

    @property
    def residual(self) -> float:
        """‖r‖/‖b‖; 0 for b = 0."""
        return max(self._rr, 0.0) ** 0.5 if self.rhs_norm > 0 else 0.0

    @property
    def start_rayleigh(self) -> float:
        """qᵀAq of the warm start's direction, ‖q‖ = 1; 0 without one."""
        a = self._warm[0] if self._warm else 0.0
        return self.start / (a * a) * self._pairs.unit if a else 0.0

    def average(self, weight: float) -> None:
        """y becomes the warm start + weight·(y - that), with all that belongs to it, at no product.

        Over many solves, each warm from the last one, this is their exponential average.
        """
        assert self._warm is not None
        assert self._cross is not None
        a, slot, cross = self._warm
        q, Hq, r = self._R[2 * slot], self._R[2 * slot + 1], self._R[self._last]
        rest = (1 - weight) * a
        self._y.mul_(weight).add_(q, alpha=rest)
        self._cross = torch.lerp(cross, self._cross, weight)
        r.mul_(weight).add_(self._rhs, alpha=(1 - weight) / self.rhs_norm)
        r.sub_(Hq, alpha=rest).sub_(q, alpha=rest * self._rho)
        self._measure_residual()
        self._own = [(i, k, weight * c + (rest if i == slot else 0.0)) for i, k, c in self._own]
        self.curvature = self.start + weight**2 * (self.curvature - self.start)

    def result(self) -> Descent:
        """x with all that is known about it, for b as it is. Ends the solve."""
        size = self.rhs_norm / self._pairs.unit
        cross = None if self._cross is None else size * self._cross
        return Descent(
            self._y.mul_(size),
            cross,
            self._R[self._last].mul_(self.rhs_norm) if self.rhs_norm > 0 else self._rhs,
            self.rhs_norm * self.residual,
            self.rhs_norm,
            curvature=size * self.rhs_norm * self.curvature,
            squared=self._squared(size),
            steps=self.steps,
            negative=self.negative,
        )

    def _squared(self, size: float) -> float | None:
        """‖x‖², in coordinates where no pair of this solve has left the ring."""
        if len(self._own) < self.steps + (self._warm is not None):
            return None
        q = 2 * torch.tensor([slot for slot, _, _ in self._own], device="cpu", dtype=torch.long)
        c = self._G.new_tensor([c for _, _, c in self._own])
        return size**2 * float(c @ self._G[q[:, None], q] @ c)

    # Steps -----------------------------------------------------------------------------------

    @property
    def _rr(self) -> float:
        return float(self._G[self._last, self._last])

    @property
    def _rho(self) -> float:
        return self._damping / self._pairs.unit

    def _step(self) -> bool:
        row = 2 * self._free_slot()
        c = self._direction()
        Gc = self._G @ c
        size, rounding = torch.stack([c @ Gc, c.abs() @ self._lengths()]).tolist()
        if not 0 < size < math.inf:
            return False
        size **= 0.5
        self._R[row] = torch.mv(self._R.mT, (c / size).to(self._R))
        # A combination of long rows to a short one is rounded: that row of G is measured, too.
        known = rounding / size < self._resolution ** (-2 / 3)
        if known:
            self._G[row] = Gc / size
            self._G[:, row] = self._G[row]
            self._G[row, row] = 1.0
        return self._enter(known=known)

    def _free_slot(self) -> int:
        """The slot to fill next, out of the way of all that uses its old pair."""
        slot = self._pairs.next_slot
        if slot in self._known:  # longer than the spare slots last: on without the preconditioner
            self._known, self._preconditioner = [], None
        self._own = [pair for pair in self._own if pair[0] != slot]
        self._pairs.overwrite(slot)
        return slot

    def _lengths(self) -> Tensor:
        return self._G.diagonal().clamp(min=0).sqrt()

    def _direction(self) -> Tensor:
        """Coordinates of P⁻¹r, made conjugate to this solve's directions."""
        G, last = self._G, self._last
        if self._preconditioner is None:
            self._preconditioner = self._pairs.coordinates(self._damping, self._known)
        gamma, M = self._preconditioner
        c = M @ G[last]
        c[last] += gamma
        if self._own:
            q = 2 * torch.tensor([slot for slot, _, _ in self._own], device="cpu")
            curvature = c.new_tensor([k for _, k, _ in self._own])
            scaled = torch.add(G[q + 1], G[q], alpha=self._rho) / curvature[:, None]
            for _ in range(2):  # once more, for what rounding left
                c.index_add_(0, q, scaled @ c, alpha=-1)
        return c

    def _enter(self, *, known: bool = False, warm: bool = False) -> bool:
        """The product of the direction that lies in the next slot, and the step along it."""
        pairs, R, G, last = self._pairs, self._R, self._G, self._last
        slot = pairs.next_slot
        row = 2 * slot
        Hq, Jq = self._operator.joint(R[row])
        torch.mul(Hq, 1 / pairs.choose_unit(self._operator, Hq), out=R[row + 1])
        if warm and row + 2 != last:
            R[row + 2] = R[last]  # the next slot is free: all three vectors in one pass
        pairs.measure(self._operator, slice(row + known, row + 2 + warm))
        if warm and row + 2 != last:
            G[last] = G[row + 2]
            G[:, last] = G[last]
            G[last, last] = G[row + 2, row + 2]

        rho = self._rho
        A = torch.add(G[row + 1], G[row], alpha=rho)  # RAq
        curvature, HqAq, rAq = A[[row, row + 1, last]].tolist()
        qq, qr, rr = G[[row, row, last], [row, last, last]].tolist()
        AA = HqAq + rho * curvature
        if not math.isfinite(AA):
            pairs.clear(slot)
            self._y = self._y + torch.nan  # NaN is another trouble, and shows itself
            G[last, last] = math.nan
            return False
        if not curvature > FLAT * (AA * qq) ** 0.5:
            self.negative = not warm  # a warm start may be of another problem
            return False

        a = qr / curvature
        self._y.add_(R[row], alpha=a)
        self._cross = a * Jq if self._cross is None else torch.add(self._cross, Jq, alpha=a)
        R[last].sub_(R[row + 1], alpha=a)
        if rho:
            R[last].sub_(R[row], alpha=a * rho)
        G[last].sub_(A, alpha=a)
        G[:, last] = G[last]
        G[last, last] = rr = rr - a * (2 * rAq - a * AA)
        self._own.append((slot, curvature, a))
        pairs.state["count"] += 1
        self.steps += 1
        self.curvature += a * a * curvature
        if warm:
            self._warm = (a, slot, self._cross)
        if rr < self._resolution * self._measured:  # only rounding is left of that row
            self._measure_residual()
        return True

    def _measure_residual(self) -> None:
        self._pairs.measure(self._operator, slice(self._last, self._last + 1))
        self._measured = self._rr
