"""LancBiO and SubBiO: a small subspace that is carried from one outer step to the next."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._tensors import wide_dtype
from ..errors import check_count, check_number
from ..operators import LinearOperator
from .base import IHVP, Solution

_CUT = 1e-8  # eigenvalues of the small matrix below this times the largest are rounding
_JUMP = 4.0  # a residual this many times the foretold and the last one ends the subspace
_WORSE = 0.99  # of what the multiple of b achieves; above it the difference is rounding
_ROUNDING = 64  # units in the last place
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
        s["Q"][0] = r / _nonzero(A.inner(r, r).sqrt())
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
        y, mu = _clipped_solve(T, A.inner(Q, r), s["noise"])
        foretold = r - Q @ (T @ y).to(b.dtype) - y[-1] * omega
        found = _Multiple(A, b, s["x"] + Q @ y.to(b.dtype))
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
        found: _Multiple,
        noise: float,
        lowest: float,  # and largest: eigenvalues of T
        largest: float,
        qAq: float,
        uu: float,
        left: float,  # ‖ω‖²
        foretold_rr: float,
    ) -> tuple[_Multiple, bool]:
        """What to return, and whether the subspace is good for another vector."""
        s = self.state
        flat = uu > 0 and qAq <= 4 * found.eps * math.sqrt(uu)
        if s["cold"]:
            s["rayleigh"] = 0.0 if flat else qAq  # q is b there
        # T shows nonpositive curvature where neither drift nor rounding explains it.
        zero = _CUT * largest
        shown = uu > 0 and lowest <= (zero if noise <= zero else -noise)
        # The evidence goes when the subspace starts anew; what it was about does not.
        negative = flat or found.flat or shown
        s["caution"] = self.subspace_dim if negative else max(s["caution"] - 1, 0)
        best = self._or_multiple_of_b(A, found)
        exhausted = math.sqrt(left) <= _ROUNDING * found.eps * largest
        jumped = self._jumped(found, largest, foretold_rr)
        return best, best is found and not exhausted and not jumped

    def _jumped(self, found: _Multiple, largest: float, foretold_rr: float) -> bool:
        """Whether the residual says that this is another system than that of the last solve."""
        s = self.state
        last, s["last"] = s["last"], found.rr / (found.bb or math.inf)
        # At the level of rounding a residual is no evidence.
        rounding = _ROUNDING * found.eps * (math.sqrt(found.bb) + largest * math.sqrt(found.xx))
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

    def _or_multiple_of_b(self, A: LinearOperator, found: _Multiple) -> _Multiple:
        """``found``, unless the best multiple of b seems to be better, and is."""
        s = self.state
        if s["caution"]:
            found.by_residual()
            expected = 0.01 * found.bb
        else:
            expected = _WORSE * found.bb / s["rayleigh"] if s["rayleigh"] > 0 else 0.0
        if found.bb == 0 or (found.gain > 0 and found.gain >= expected):
            return found
        other = _Multiple(A, found.b, found.b)
        other.read()
        s["rayleigh"] = 0.0 if other.flat else other.xAx / other.bb
        if s["caution"] or other.flat:
            found.by_residual()
            other.by_residual()
        if found.gain == 0 == other.gain:
            # Nothing better is known than b, at a length that fits ‖A‖.
            other.length = math.sqrt(other.bb / other.size) if other.size > 0 else 1.0
        return found if found.gain > other.gain else other


class _Multiple:
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
        y, mu = _clipped_solve(G, Vb, torch.zeros_like(Vb[0]))
        size = A.inner(AV, AV).diagonal()
        # Nothing better is known than b, at a length that fits ‖A‖.
        along = torch.where(torch.arange(len(basis), device=y.device) == 0, Vb, 0.0)
        y = torch.where((y == 0).all(), along / _nonzero(size[0].sqrt()), y)
        eps = torch.finfo(rhs.dtype).eps
        flat = ((size > 0) & (G.diagonal() <= 4 * eps * size.sqrt())).any()
        flat = flat | (mu[0] < -_CUT * mu[-1])
        weights = y.to(rhs.dtype)
        x, r = V @ weights, rhs - AV @ weights
        self.state["x"] = x
        residual = (A.inner(r, r) / _nonzero(A.inner(rhs, rhs))).sqrt()
        return Solution(x, JV @ weights, residual, negative_curvature=flat)

    def _basis(self, A: LinearOperator, b: Tensor) -> list[Tensor]:
        """b and (I - ηA)x, orthonormal; a zero vector stands for a direction that is not there."""
        v = b / _nonzero(A.inner(b, b).sqrt())
        x: Tensor | None = self.state.get("x")
        if x is None or (x.shape, x.dtype, x.device) != (b.shape, b.dtype, b.device):
            return [v]
        x = torch.where(A.inner(x, x).isfinite(), x, 0.0)
        z = x - self.step_size * (A @ x)
        length = A.inner(z, z).sqrt()
        for _ in range(2):  # once leaves rounding along b
            z = z - A.inner(v, z) * v
        rest = A.inner(z, z).sqrt()
        parallel = rest <= _ROUNDING * torch.finfo(b.dtype).eps * length
        return [v, torch.where(parallel, 0.0, z / _nonzero(rest))]


def _clipped_solve(T: Tensor, g: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """T⁻¹g, eigenvalues of T below ``noise`` raised to it; and these as they were."""
    sound = T.isfinite().all()  # eigh fails on NaN
    mu, S = torch.linalg.eigh(torch.where(sound, (T + T.mT) / 2, 0.0))
    keep = mu > _CUT * mu.abs().amax()
    inverse = torch.where(keep, 1 / torch.maximum(torch.where(keep, mu, 1.0), noise), 0.0)
    y = S @ (inverse * (S.mT @ g))
    return torch.where(sound, y, torch.nan), mu


def _nonzero(norm: Tensor) -> Tensor:
    """A divisor: ``norm``, or 1 where that is zero."""
    return torch.where(norm > 0, norm, 1.0)
