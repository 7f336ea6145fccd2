"""A preconditioner made of what earlier outer steps have paid for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._tensors import wide_dtype
from ..errors import check_count
from ..operators import LinearOperator
from .base import Preconditioner


class RecycledPairs(Preconditioner):
    """A preconditioner made of past pairs (q, Hq): it costs no product.

    The last ``window`` pairs span a subspace on which H is known. There P⁻¹ inverts the Nyström
    copy UΛUᵀ of H; on the complement it is 1/(t + ρ) with t = min Λ. Around that stand the newest
    ``corrections`` pairs as L-BFGS updates, so that P⁻¹(H + ρI)q = q for the newest of them.

    Pairs hold H without ρ, so ρ may change. They come from different outer steps, hence from
    different H: good enough to precondition with, not to invert.

    Args:
        window: pairs kept, >= 1.
        corrections: of these, the newest ones used as L-BFGS updates.

    Raises:
        ValueError: an argument is out of its range.

    Cost: 2·window vectors of memory; O((window + corrections)·n) flops an application; syncs.
    """

    def __init__(self, window: int = 40, corrections: int = 10) -> None:
        super().__init__()
        self.window = check_count("window", window)
        self.corrections = check_count("corrections", corrections, minimum=0)

    def learn(self, operator: LinearOperator, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keeps the pairs, in place of the oldest ones where the window is full."""
        pairs = pairs[-self.window :]
        if not pairs:
            return
        s, w, n = self.state, self.window, len(pairs[0][0])
        q0 = pairs[0][0]
        if "pairs" not in s or s["pairs"].shape[1] != n or s["pairs"].device != q0.device:
            s["pairs"] = q0.new_zeros(2 * w, n)  # rows q_0..q_{w-1}, then Hq_0..Hq_{w-1}
            s["gram"] = torch.zeros(2 * w, 2 * w, dtype=wide_dtype(q0), device=q0.device)
            s["count"] = 0
        rows = [(s["count"] + i) % w for i in range(len(pairs))]
        both = rows + [w + i for i in rows]
        s["pairs"][both] = torch.stack([q for q, _ in pairs] + [Hq for _, Hq in pairs])
        columns = operator.inner(s["pairs"].mT, s["pairs"][both].mT)  # (2w, 2 new)
        s["gram"][:, both], s["gram"][both] = columns, columns.mT
        s["count"] += len(pairs)

    def largest(self) -> float | None:
        """The largest ‖Hq‖ of the pairs, a lower bound of ‖H‖; None without pairs. A sync."""
        k = min(self.state.get("count", 0), self.window)
        if not k:
            return None
        return float(self.state["gram"].diagonal()[self.window : self.window + k].amax().sqrt())

    def prepare(self, operator: LinearOperator, damping: float) -> Callable[[Tensor], Tensor]:
        if not self.state.get("count", 0) or self.state["pairs"].shape[1] != operator.shape[0]:
            return lambda r: r
        return self._corrected(operator, damping, self._nystrom(operator, damping))

    def _nystrom(self, operator: LinearOperator, rho: float) -> Callable[[Tensor], Tensor]:
        """r/(t + ρ) + Y K Yᵀr, which is U(Λ + ρ)⁻¹Uᵀr + (r - UUᵀr)/(t + ρ), U never formed."""
        w, k = self.window, min(self.state["count"], self.window)
        Y, G = self.state["pairs"][w : w + k], self.state["gram"]  # Y (k, n)
        factor = _factor(G[:k, :k], G[:k, w : w + k], G[w : w + k, w : w + k])
        if factor is None:
            return lambda r: r
        F, lam = factor
        t = float(lam.min())
        K = F * ((1 / (lam + rho) - 1 / (t + rho)) / lam) @ F.mT  # (k, k)

        def apply(r: Tensor) -> Tensor:
            d: Tensor = r / (t + rho) + Y.mT @ (K @ operator.inner(Y.mT, r)).to(r.dtype)
            return d

        return apply

    def _corrected(
        self, operator: LinearOperator, rho: float, base: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """The L-BFGS two-loop recursion over the newest pairs, around ``base``."""
        s, w = self.state, self.window
        newest = range(max(0, s["count"] - min(self.corrections, w)), s["count"])
        updates = []
        for i in (step % w for step in newest):  # oldest first
            q, y = s["pairs"][i], torch.add(s["pairs"][w + i], s["pairs"][i], alpha=rho)
            qy = float(s["gram"][i, w + i]) + rho * float(s["gram"][i, i])
            if qy > 1e-8 * float(operator.inner(y, y).sqrt()):
                updates.append((q, y, qy))

        def apply(r: Tensor) -> Tensor:
            alphas = []
            for q, y, qy in reversed(updates):
                alphas.append(float(operator.inner(q, r)) / qy)
                r = torch.sub(r, y, alpha=alphas[-1])
            d = base(r)
            for (q, y, qy), alpha in zip(updates, reversed(alphas), strict=True):
                d = torch.add(d, q, alpha=alpha - float(operator.inner(y, d)) / qy)
            return d

        return apply


def _factor(QQ: Tensor, QY: Tensor, YY: Tensor) -> tuple[Tensor, Tensor] | None:
    """F, Λ: U = YFΛ^(-1/2) is orthonormal and UΛUᵀ the positive Nyström copy of H on span Q."""
    lam, V = torch.linalg.eigh(QQ)
    keep = lam > 1e-4 * lam.amax()  # near-duplicate directions say nothing new
    C = V[:, keep] * lam[keep].rsqrt()
    # QᵀHQ is symmetric for one H only; these pairs come from several.
    lam, V = torch.linalg.eigh(C.mT @ (QY + QY.mT) @ C / 2)
    keep = lam > 1e-3 * lam.abs().amax()
    if not bool(keep.any()):
        return None
    E = C @ (V[:, keep] * lam[keep].rsqrt())
    lam, V = torch.linalg.eigh(E.mT @ YY @ E)
    keep = lam > 1e-10 * lam.amax()
    return E @ V[:, keep], lam[keep]
