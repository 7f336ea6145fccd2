"""A preconditioner made of what earlier outer steps have paid for, in coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .._tensors import read, wide_dtype
from ..errors import check_count
from ..operators import LinearOperator
from .base import Preconditioner

_NO_CURVATURE = 1e-8  # qᵀ(H + ρI)q below this, relative to ‖(H + ρI)q‖, corrects nothing


class RecycledPairs(Preconditioner):
    """A preconditioner made of past pairs (q, Hq): it costs no product.

    The last ``window`` pairs span a subspace on which H is known. There P⁻¹ inverts the Nyström
    copy UΛUᵀ of H; on the complement it is 1/(t + ρ) with t = min Λ. Around that stand the newest
    ``corrections`` pairs as L-BFGS updates, so that P⁻¹(H + ρI)q = q for the newest of them.

    The pairs are the rows of one matrix R, and their Gram matrix G = RRᵀ is known. In coordinates
    on R all of this is one small symmetric matrix: P⁻¹ = γI + RᵀMR.

    Pairs hold H without ρ, so ρ may change. They come from different outer steps, hence from
    different H: good enough to precondition with, not to invert.

    Args:
        window: pairs kept, >= 1.
        corrections: of these, the newest ones used as L-BFGS updates.
        spare: room for that many pairs more, which a solve may fill while the window preconditions
            it, >= 0.

    Raises:
        ValueError: an argument is out of its range.

    Cost: 2·(window + spare) + 1 vectors of memory; O(window·n) flops an application.
    """

    state_of_its_own_size = ("gram",)

    def __init__(self, window: int = 40, corrections: int = 10, *, spare: int = 0) -> None:
        super().__init__()
        self.window = check_count("window", window)
        self.corrections = check_count("corrections", corrections, minimum=0)
        self.spare = check_count("spare", spare, minimum=0)

    @property
    def vectors(self) -> int:
        return 2 * self.slots + 1

    _lent: tuple[Tensor, dict[int, Tensor]] | None = None  # R, and its slots as they were

    @property
    def slots(self) -> int:
        """Pairs that there is room for."""
        return self.window + self.spare

    # The ring: rows q_i, Hq_i of slot i lie at 2i, 2i + 1; the last row is a solve's residual.

    def ring(self, like: Tensor) -> Tensor:
        """R, (2·slots + 1, n): what is there for vectors like ``like``, or zeros."""
        s, rows = self.state, 2 * self.slots + 1
        R: Tensor | None = s.get("rows")
        if R is None or (R.shape[1], R.dtype, R.device) != (len(like), like.dtype, like.device):
            R = like.new_zeros(rows, len(like))
            G = torch.zeros(rows, rows, dtype=torch.float64, device="cpu")
            s.update(rows=R, gram=G, count=0, unit=None)  # at once, whatever interrupts
        # A saved state may come back on another device: G is for the host.
        s["gram"] = s["gram"].to("cpu")
        return R

    @property
    def gram(self) -> Tensor:
        """G = RRᵀ, (2·slots + 1)², on the host, of rows in units: see :meth:`unit`."""
        G: Tensor = self.state["gram"]
        return G

    @property
    def next_slot(self) -> int:
        return int(self.state["count"]) % self.slots

    def alive(self) -> list[int]:
        """The slots of the window, oldest pair first."""
        count = int(self.state.get("count", 0))
        return [i % self.slots for i in range(max(0, count - self.window), count)]

    @property
    def unit(self) -> float:
        """The power of two that every Hq is stored divided by; 1 until :meth:`choose_unit`.

        Dot products of float32 rows would underflow on a loss that is very small.
        """
        return float(self.state.get("unit") or 1.0)

    def choose_unit(self, operator: LinearOperator, Hq: Tensor) -> float:
        """The unit, near ‖Hq‖ if there is none yet: a sync then."""
        if self.state["unit"] is None:
            norm = float(operator.inner(Hq, Hq).sqrt())
            known = 0 < norm < math.inf
            self.state["unit"] = 2.0 ** round(math.log2(norm)) if known else 1.0
        return self.unit

    def overwrite(self, *slots: int) -> None:
        """Called before these slots are written to; slot ``slots`` is the residual's row."""
        if self._lent is not None and self._lent[0] is self.state["rows"]:
            R, kept = self._lent
            for slot in slots:
                kept.setdefault(slot, R[2 * slot : 2 * slot + 2].clone())

    @contextmanager
    def on_loan(self) -> Iterator[None]:
        kept = self.state
        if "rows" in kept:  # of which only what is written to is copied
            self.state = {**kept, "gram": kept["gram"].clone()}
            self._lent = kept["rows"], {}
        else:
            self.state = dict(kept)
        try:
            yield
        finally:
            if self._lent is not None:
                R, old = self._lent
                for slot, rows in old.items():
                    R[2 * slot : 2 * slot + 2] = rows
            self.state, self._lent = kept, None

    def measure(self, operator: LinearOperator, rows: slice) -> None:
        """Takes these rows of G anew: by one pass over R, and one sync."""
        R, G = self.state["rows"], self.gram
        columns = read(operator.inners(R, R[rows]))
        G[:, rows], G[rows] = columns, columns.mT

    def clear(self, slot: int) -> None:
        """Zeroes a slot; a pair that is not finite must not meet the zeros of M."""
        both = slice(2 * slot, 2 * slot + 2)
        self.state["rows"][both] = 0
        self.gram[both], self.gram[:, both] = 0, 0

    def learn(self, operator: LinearOperator, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keeps the pairs, in place of the oldest ones where the window is full."""
        pairs = pairs[-self.slots :]
        if not pairs:
            return
        R = self.ring(pairs[0][0])
        unit = self.choose_unit(operator, pairs[0][1])
        touched = []
        for q, Hq in pairs:
            row = 2 * self.next_slot
            self.overwrite(self.next_slot)
            R[row] = q
            torch.mul(Hq, 1 / unit, out=R[row + 1])
            touched += [row, row + 1]
            self.state["count"] += 1
        columns = read(operator.inners(R, R[touched]))
        self.gram[:, touched], self.gram[touched] = columns, columns.mT

    def largest(self) -> float | None:
        """The largest ‖Hq‖/‖q‖ of the pairs, a lower bound of ‖H‖; None without pairs."""
        slots = self.alive()
        if not slots:
            return None
        sizes = self.gram.diagonal()
        q = 2 * torch.tensor(slots, device="cpu")
        return float((sizes[q + 1] / sizes[q]).amax().sqrt()) * self.unit

    def prepare(self, operator: LinearOperator, damping: float) -> Callable[[Tensor], Tensor]:
        if not self.alive() or self.state["rows"].shape[1] != operator.length:
            return lambda r: r
        R = self.ring(self.state["rows"][0])
        gamma, M = self.coordinates(damping, self.alive())
        gamma, M = gamma / self.unit, (M / self.unit).to(wide_dtype(R)).to(R.device)

        def apply(r: Tensor) -> Tensor:
            c = M @ operator.inners(R, r[None])[:, 0]
            d: Tensor = torch.addmv(r, R.mT, c.to(r.dtype), beta=gamma)
            return d

        return apply

    def coordinates(self, damping: float, slots: list[int]) -> tuple[float, Tensor]:
        """γ, M of P⁻¹ = γI + RᵀMR, in units: of H/unit and ρ/unit; from these slots.

        The compact form of L-BFGS (Byrd, Nocedal & Schnabel 1994) around the Nyström copy M₀.
        """
        M = torch.zeros_like(self.gram)
        if not slots:
            return 1.0, M
        rho, k = damping / self.unit, len(slots)
        q = 2 * torch.tensor(slots, device="cpu")
        both = torch.cat([q, q + 1])  # coordinates: k of q's, then k of Hq's, the newest last
        G = self.gram[both[:, None], both]
        gamma, K = _nystrom(G[:k, :k], G[:k, k:], G[k:, k:], rho)
        m = torch.zeros_like(G)
        m[k:, k:] = K

        new = min(self.corrections, k)
        GY = torch.add(G[:, 2 * k - new :], G[:, k - new : k], alpha=rho)  # Y: columns Hq + ρq
        SY, YY = GY[k - new : k].diagonal(), GY[2 * k - new :].diagonal()
        curved = _NO_CURVATURE**2 * (YY + rho * SY) < SY.clamp(min=0).square()
        if new and bool(curved.any()):
            S = torch.zeros(2 * k, new, dtype=G.dtype, device="cpu")  # columns q
            S[k - new : k].fill_diagonal_(1.0)
            Y = rho * S
            Y[2 * k - new :].fill_diagonal_(1.0)
            S, Y, GY = S[:, curved], Y[:, curved], GY[:, curved]
            SY = (S.mT @ GY).triu()
            S = torch.linalg.solve_triangular(SY.mT, S, upper=False, left=False)  # S·triu(SᵀY)⁻ᵀ
            Z = torch.add(m @ GY, Y, alpha=gamma)
            cross = S @ Z.mT
            m += S @ (SY.diagonal().diag() + GY.mT @ Z) @ S.mT - cross - cross.mT
        M[both[:, None], both] = m
        return gamma, M


def _nystrom(QQ: Tensor, QY: Tensor, YY: Tensor, rho: float) -> tuple[float, Tensor]:
    """γ, K: γr + YKYᵀr is U(Λ + ρ)⁻¹Uᵀr + (r - UUᵀr)/(t + ρ), U never formed."""
    factor = _factor(QQ, QY, YY)
    if factor is None:
        return 1.0, torch.zeros_like(QQ)
    F, lam = factor
    gamma = 1 / (float(lam[0]) + rho)
    return gamma, F * ((1 / (lam + rho) - gamma) / lam) @ F.mT


def _factor(QQ: Tensor, QY: Tensor, YY: Tensor) -> tuple[Tensor, Tensor] | None:
    """F, Λ: U = YFΛ^(-1/2) is orthonormal and UΛUᵀ the positive Nyström copy of H on span Q."""
    lam, V = _leading(QQ, 1e-4)  # near-duplicate directions say nothing new
    C = V * lam.rsqrt()
    # QᵀHQ is symmetric for one H only; these pairs come from several.
    lam, V = _leading(C.mT @ (QY + QY.mT) @ C / 2, 1e-3)
    if not len(lam):
        return None
    E = C @ (V * lam.rsqrt())
    lam, V = _leading(E.mT @ YY @ E, 1e-10)
    return E @ V, lam


def _leading(A: Tensor, cut: float) -> tuple[Tensor, Tensor]:
    """The eigenvalues above cut·‖A‖, ascending, and their eigenvectors."""
    lam, V = torch.linalg.eigh(A)
    values = lam.tolist()
    least = cut * max(-values[0], values[-1])
    first = sum(not value > least for value in values)
    return lam[first:], V[:, first:]
