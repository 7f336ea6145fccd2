"""LancBiO: a Lanczos subspace that grows by a vector in each outer step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._tensors import wide_dtype
from ..errors import check_count
from ..operators import LinearOperator
from ._multiple import Multiple
from ._projected import CUT, ROUNDING, clipped_solve, nonzero
from .base import IHVP, Solution

_JUMP = 4.0  # a residual this many times the foretold and the last one ends the subspace
_WORSE = 0.99  # of what the multiple of b achieves; above it the difference is rounding
_RETURNED = "the subspace was of no use in this step: the best multiple of b is returned"


class LancBiO(IHVP):
    """x ← x + Q T⁻¹ Qᵀ(b - w) with w ≈ Ax, where Q gains one Lanczos vector per outer step.

    A = H + ρI is that of the current outer step. The subspace starts at q₁ ∝ b - Ax; each solve
    multiplies the newest vector, u = Aq, appends Qᵀu to T and the rest of u to Q, and corrects x.
    After ``subspace_dim`` solves the subspace starts anew. So one product per outer step does what
    a Krylov solver does with ``subspace_dim`` of them, as long as A moves slowly.

    Args:
        subspace_dim: m >= 1, the outer steps from one start to the next.
        damping: ρ >= 0, or "auto": relative to ‖H‖.
        safeguard: False is the published method to the letter: the correction is to the x and w of
            the start, T is tridiagonal, from the short recurrence, and nothing is tested. T mixes
            products of m different A; under fast drift the answer can be wrong by any factor.

    Raises:
        ValueError: ``subspace_dim`` < 1 or ``damping`` < 0.

    Safeguards: the product Ax of an answer, which brings Jᵀx along, gives its best length and is
    the w of the next solve. T gets the whole new column Qᵀu, and Q is orthogonalised in full. In a
    fixed system T would be tridiagonal: what is elsewhere is drift, and the eigenvalues of T below
    its size are raised to it. Those that are negative, or below 1e-8 of the largest, are left out,
    and flagged where drift does not explain them. The subspace starts anew at once where it is
    exhausted, and where the true residual jumps: to more than 4 times both the foretold one and
    that of the last solve, as when parameters are replaced.

    Exact limit: a fixed positive definite system, after as many outer steps as it has distinct
    eigenvalues if these are at most m; otherwise the error falls from start to start.

    Trouble: the error in the A-norm is never above that of x = 0. Nor is it, by more than 1%,
    above that of the best multiple of b, as far as bᵀAb is known: from the last time it was looked
    at. Where it seems to be, Ab is computed; if b is better indeed, its best multiple is returned
    with ``converged=False`` and a note, and the subspace starts anew. A residual above 1 remains
    possible, as with conjugate gradients. Nonpositive curvature is flagged in the solve that meets
    it and in the m - 1 that follow; in these the length of x goes by the residual, since A defines
    no norm, and b·‖b‖/‖Ab‖ is returned where neither x nor b leads anywhere. NaN is returned as it
    comes, and then forgotten.

    Cost: 2 products per outer step, Jᵀx included, one more at a start and one more for Ab; m + 2
    vectors are kept, 2.7m live at the peak; O(nm) flops; one sync, one more for Ab. Without
    safeguards one product, one more at a start, and the closing one for Jᵀx; m + 3 vectors; no
    sync.

    Example:
        >>> import torch
        >>> from hyperopt_torch.operators import Dense
        >>> H, b = torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 1.0])
        >>> solver = LancBiO(subspace_dim=2)
        >>> for outer_step in range(2):
        ...     x = solver.solve(Dense(H), b).x
        >>> x
        tensor([1.0000, 0.2500])

    Reference: Yang, Gao & Yuan, "LancBiO: dynamic Lanczos-aided bilevel optimization via Krylov
    subspace", ICLR 2025; the safeguards are this library's.
    """

    def __init__(
        self, subspace_dim: int = 10, *, damping: float | str = 0.0, safeguard: bool = True
    ) -> None:
        super().__init__()
        self.subspace_dim = check_count("subspace_dim", subspace_dim)
        self._set_damping(damping)
        self.safeguard = bool(safeguard)

    @property
    def vectors(self) -> int:
        return 2 * self.subspace_dim + 8

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Tensor | Solution:
        A = self.damped(operator, rhs)
        if not self._fits(rhs):
            self.state = self._blank(rhs)
        if self.state["step"] == self.subspace_dim:
            self._start(A, rhs)
        return self._safeguarded(A, rhs) if self.safeguard else self._published(A, rhs)

    def _fits(self, b: Tensor) -> bool:
        """Whether the memory is of this kind and size: parameters may have been unfrozen."""
        Q: Tensor | None = self.state.get("Q")
        if Q is None or ("origin" in self.state) == self.safeguard:
            return False
        shape = (self.subspace_dim, *b.shape)
        return (Q.shape, Q.dtype, Q.device) == (shape, b.dtype, b.device)

    def _blank(self, b: Tensor) -> dict[str, Any]:
        """The memory before the first solve, in its full size: x = 0, and a start is due."""
        m, wide = self.subspace_dim, wide_dtype(b)
        state: dict[str, Any] = {
            "x": torch.zeros_like(b),
            "w": torch.zeros_like(b),
            "Q": b.new_zeros((m, *b.shape)),  # in rows; filled as far as row `step`
            "T": b.new_zeros((m, m), dtype=wide),
            "beta": b.new_zeros((), dtype=wide),  # what the newest row was divided by
            "step": m,  # solves since the last start
            "cold": True,  # x = 0 needs no product
        }
        if self.safeguard:
            state["noise"] = b.new_zeros((), dtype=wide)  # what drift has put into T
            state["last"] = math.inf  # ‖b - Ax‖² / ‖b‖² of the last solve
            state["caution"] = 0  # solves in which A is still taken for indefinite
            state["rayleigh"] = 0.0  # bᵀAb / bᵀb when last looked at; 0 where it was not positive
        else:
            state["origin"] = torch.zeros_like(b)  # the x of the start
        return state

    def _start(self, A: LinearOperator, b: Tensor) -> None:
        """w = Ax, q₁ = (b - w) / ‖b - w‖."""
        s = self.state
        if not s["cold"]:
            s["x"] = torch.where(A.inner(s["x"], s["x"]).isfinite(), s["x"], 0.0)
            s["w"] = A @ s["x"]
        r = b - s["w"]
        s["Q"][0] = r / nonzero(A.inner(r, r).sqrt())
        for name in {"T", "beta", "noise"} & s.keys():
            s[name] = torch.zeros_like(s[name])
        if not self.safeguard:
            s["origin"] = s["x"]
        s["step"] = 0

    def _published(self, A: LinearOperator, b: Tensor) -> Tensor:
        s = self.state
        j: int = s["step"]
        Q, T = s["Q"][: j + 1].mT, s["T"][: j + 1, : j + 1]
        q = Q[:, j]
        u = A @ q
        if j > 0:
            u = u - s["beta"] * Q[:, j - 1]
            T[j, j - 1] = T[j - 1, j] = s["beta"]
        alpha = T[j, j] = A.inner(q, u)
        omega = u - alpha * q
        s["beta"] = A.inner(omega, omega).sqrt()
        y = torch.linalg.solve_ex(T, A.inner(Q, b - s["w"]))[0]
        x: Tensor = s["origin"] + Q @ y.to(b.dtype)
        if j + 1 < self.subspace_dim:
            s["Q"][j + 1] = omega / s["beta"]
        s.update(x=x, step=j + 1, cold=False)
        return x

    def _safeguarded(self, A: LinearOperator, b: Tensor) -> Solution:
        s = self.state
        j: int = s["step"]
        Q, T, u, omega = self._extend(A, j)
        r = b - s["w"]
        y, mu = clipped_solve(T, A.inner(Q, r), s["noise"])
        foretold = r - Q @ (T @ y).to(b.dtype) - y[-1] * omega
        found = Multiple(A, b, s["x"] + Q @ y.to(b.dtype))
        small = torch.stack([s["noise"], mu[0], mu.abs().amax(), T[-1, -1]])
        norms2 = torch.stack([A.inner(v, v) for v in (u, omega, foretold)])
        values = found.read(small, norms2)
        if not found.finite:
            self.reset()
            return found.solution(A, converged=False)
        best, goes_on = self._judge(A, found, *values)
        if goes_on and j + 1 < self.subspace_dim:
            s["beta"] = norms2[1].sqrt()
            s["Q"][j + 1] = omega / s["beta"]
        s["step"] = j + 1 if goes_on else self.subspace_dim
        s.update(x=best.x, w=best.Ax, cold=found.bb == 0)
        return best.solution(
            A,
            negative_curvature=s["caution"] > 0 or best.flat,
            converged=None if best is found else False,
            notes=() if best is found else (_RETURNED,),
        )

    def _judge(
        self,
        A: LinearOperator,
        found: Multiple,
        noise: float,
        lowest: float,  # and largest: eigenvalues of T
        largest: float,
        qAq: float,
        uu: float,
        left: float,  # ‖ω‖²
        foretold_rr: float,
    ) -> tuple[Multiple, bool]:
        """What to return, and whether the subspace is good for another vector."""
        s = self.state
        flat = uu > 0 and qAq <= 4 * found.eps * math.sqrt(uu)
        if s["cold"]:
            s["rayleigh"] = 0.0 if flat else qAq  # q is b there
        # T shows nonpositive curvature where neither drift nor rounding explains it.
        zero = CUT * largest
        shown = uu > 0 and lowest <= (zero if noise <= zero else -noise)
        # The evidence goes when the subspace starts anew; what it was about does not.
        negative = flat or found.flat or shown
        s["caution"] = self.subspace_dim if negative else max(s["caution"] - 1, 0)
        best = self._or_multiple_of_b(A, found)
        exhausted = math.sqrt(left) <= ROUNDING * found.eps * largest
        jumped = self._jumped(found, largest, foretold_rr)
        return best, best is found and not exhausted and not jumped

    def _jumped(self, found: Multiple, largest: float, foretold_rr: float) -> bool:
        """Whether the residual says that this is another system than that of the last solve."""
        s = self.state
        last, s["last"] = s["last"], found.rr / (found.bb or math.inf)
        # At the level of rounding a residual is no evidence.
        rounding = ROUNDING * found.eps * (math.sqrt(found.bb) + largest * math.sqrt(found.xx))
        known = _JUMP**2 * max(foretold_rr, last * found.bb) if found.bb > 0 else 0.0
        return found.rr > max(known, rounding**2) or found.bb == 0

    def _extend(self, A: LinearOperator, j: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q, T with the column of its newest vector q, u = Aq, and what of u is outside Q."""
        s = self.state
        Q, T = s["Q"][: j + 1].mT, s["T"][: j + 1, : j + 1]  # (n, j + 1), (j + 1, j + 1)
        u = A @ Q[:, j]
        h = A.inner(Q, u)
        T[:, j] = T[j] = h
        if j > 0:  # h = (0, ..., 0, β, α) in a fixed system
            drift = torch.cat([h[: j - 1], h[j - 1 : j] - s["beta"]])
            s["noise"] = torch.maximum(s["noise"], torch.linalg.vector_norm(drift))
        omega = u - Q @ h.to(u.dtype)
        omega = omega - Q @ A.inner(Q, omega).to(u.dtype)  # once leaves rounding along Q
        return Q, T, u, omega

    def _or_multiple_of_b(self, A: LinearOperator, found: Multiple) -> Multiple:
        """``found``, unless the best multiple of b seems to be better, and is."""
        s = self.state
        if s["caution"]:
            found.by_residual()
            expected = 0.01 * found.bb
        else:
            expected = _WORSE * found.bb / s["rayleigh"] if s["rayleigh"] > 0 else 0.0
        if found.bb == 0 or (found.gain > 0 and found.gain >= expected):
            return found
        other = Multiple(A, found.b, found.b)
        other.read()
        s["rayleigh"] = 0.0 if other.flat else other.xAx / other.bb
        if s["caution"] or other.flat:
            found.by_residual()
            other.by_residual()
        if found.gain == 0 == other.gain:
            # Nothing better is known than b, at a length that fits ‖A‖.
            other.length = math.sqrt(other.bb / other.size) if other.size > 0 else 1.0
        return found if found.gain > other.gain else other
