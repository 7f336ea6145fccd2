"""The Nyström method: a low-rank copy of H that is inverted in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._tensors import draw_seed, seeded_rng, wide_dtype
from ..errors import check_choice, check_count
from ..operators import LinearOperator
from ._damping import AUTO, check_damping
from .base import IHVP, Solution, rescaled

_CUT_INDEFINITE = 1e-2  # of the core's spectrum, where it has negative eigenvalues too
_RELATIVE = 1e-2  # "auto" damping
_CUT_PIVOT = 1e-10  # of the sketch's own Gram matrix


class Nystrom(IHVP):
    """x = (H_k + ρI)⁻¹ b, where H_k = C M† Cᵀ is a rank-k copy of H.

    With test vectors Ω (n, k): C = HΩ and M = ΩᵀHΩ. For Ω = E_K, k unit vectors, C is made of k
    columns of H. What the copy misses is multiplied by 1/ρ: the report's residual shows it.

    Args:
        rank: k >= 1; clamped to n, which the report says.
        damping: ρ > 0, or "auto": 0.01 times the largest singular value of C in the sketch's
            coordinates, a lower bound of ‖H‖ that is known anyway. Then the hypergradient does not
            depend on the scale of the loss.
        chunk_size: None keeps C (the time-efficient form). κ >= 1 never holds more than κ columns
            (the space-efficient form for κ = 1), at the price of k + 2 more products.
        sketch: "columns" draws K uniformly without replacement, anew at every solve;
            "gaussian" draws Ω, which is better where eigenvectors of H are localised.
        solver: "stable" cuts the eigenvalues of M that are rounding or negative, so that
            ‖x‖ <= ‖b‖/ρ always; "woodbury" is the paper's equation 6 to the letter, which is
            inf or NaN for a singular M + CᵀC/ρ (a dead unit, a constant pixel).
        rescale: replace x by its best multiple. A sketch that misses eigenvalues above ρ makes x
            too long; this mends the length, not the direction, and costs no further product.
            None: with "auto", and not with a number, which is the paper's method to the letter.
        generator: where to take the seed from, here and now; None: from ``torch.manual_seed``'s
            seed. torch's global random stream is not touched. Draws are a function of the seed and
            the number of the solve, both of which a checkpoint keeps.

    Raises:
        ValueError: an argument is out of its range.

    Exact limit: k = n.

    Cost: k products, k vectors kept and 4k at the peak of the batched product; or 2k + 2 products
    and κ vectors (4κ); one product more to rescale, which is the one that Jᵀx takes anyway; O(nk²)
    flops; k×k algebra in float64; no sync.

    Example:
        >>> import torch
        >>> from hyperopt_torch.operators import Dense
        >>> H = Dense(torch.diag(torch.tensor([4.0, 1.0])))
        >>> Nystrom(rank=2, damping=1.0).solve(H, torch.tensor([5.0, 4.0])).x
        tensor([1., 2.])

    Reference: Hataya & Yamada, "Nyström method for accurate and scalable implicit
    differentiation", AISTATS 2023; the matrix-free chunked form is this library's.
    """

    def __init__(
        self,
        rank: int = 10,
        damping: float | str = AUTO,
        *,
        chunk_size: int | None = None,
        sketch: str = "columns",
        solver: str = "stable",
        rescale: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._seed = draw_seed(generator)
        super().__init__()
        self.rank = check_count("rank", rank)
        self.damping = check_damping(damping, positive=True)
        self.chunk_size = None if chunk_size is None else check_count("chunk_size", chunk_size)
        self.sketch = check_choice("sketch", sketch, ("columns", "gaussian"))
        self.solver = check_choice("solver", solver, ("stable", "woodbury"))
        self.rescale = self.damping == AUTO if rescale is None else bool(rescale)

    @property
    def vectors(self) -> int:
        return 4 * self.rank + 2 if self.chunk_size is None else 4 * self.chunk_size - 2

    def initial_state(self) -> dict[str, Any]:
        return {"seed": self._seed, "draws": 0}

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        n = operator.shape[0]
        rank = min(self.rank, n)
        test = self._draw(operator, rank)
        if self.chunk_size is None:
            Omega = test.columns(0, rank)
            C = operator @ Omega  # (n, k)
            M, G, Cb = test.project(C), operator.inner(C, C), operator.inner(C, rhs)
        else:
            M, G = self._chunked_grams(operator, test, rank)
            Cb = test.project(operator @ rhs)  # Cᵀb = Ωᵀ(Hb)
        S = test.gram()
        auto = self.damping == AUTO
        rho = _RELATIVE * _largest(S, G).to(rhs.dtype) if auto else self.damping
        core = self._core(S, M, G, rho, torch.finfo(rhs.dtype).eps)
        if self.chunk_size is None:
            x = rhs / rho - C @ core.weights(Cb).to(rhs.dtype)
            if self.solver == "stable":
                # (b - ...)/ρ cancels where ρ is small; one refinement against the same H_k undoes
                # that. It needs C, not H.
                Hk_x = C @ core.low_rank(operator.inner(C, x)).to(rhs.dtype)
                r = rhs - rho * x - Hk_x
                x = x + (r / rho - C @ core.weights(operator.inner(C, r)).to(rhs.dtype))
        else:
            y = core.weights(Cb).to(rhs.dtype)
            x = rhs / rho - operator @ test.combine(y)  # C y = H(Ωy)
        clamped = () if rank == self.rank else (f"rank {self.rank} clamped to n = {n}",)
        found = Solution(
            x,
            rank=core.rank,
            negative_curvature=core.indefinite,
            notes=clamped,
            damping=rho if auto else None,
        )
        if not self.rescale:
            return found
        best = rescaled(operator, rho, rhs, x)
        flagged = best.negative_curvature
        if core.indefinite is not None and flagged is not None:
            flagged = core.indefinite | flagged
        return replace(
            found, x=best.x, cross=best.cross, residual=best.residual, negative_curvature=flagged
        )

    def _draw(self, operator: LinearOperator, rank: int) -> _TestVectors:
        rng = seeded_rng(self.state["seed"], self.state["draws"])
        self.state["draws"] += 1
        chunk = self.chunk_size or rank
        if self.sketch == "columns":
            return _Columns(operator, rng.sample(range(operator.shape[0]), rank), chunk)
        return _Gaussian(operator, [rng.getrandbits(62) for _ in range(rank)], chunk)

    def _chunked_grams(
        self, operator: LinearOperator, test: _TestVectors, rank: int
    ) -> tuple[Tensor, Tensor]:
        """M = ΩᵀHΩ and G = CᵀC = Ωᵀ(HC), κ columns of C at a time: 2k products."""
        M, G = [], []
        for start in range(0, rank, test.chunk):
            C = operator @ test.columns(start, min(start + test.chunk, rank))  # (n, κ)
            M.append(test.project(C))
            G.append(test.project(operator @ C))
        return torch.cat(M, dim=1), torch.cat(G, dim=1)

    def _core(
        self, S: Tensor | None, M: Tensor, G: Tensor, rho: Tensor | float, eps: float
    ) -> _Core:
        M, G = (M + M.mT) / 2, (G + G.mT) / 2
        if self.solver == "woodbury":
            return _Woodbury(M, G, rho)
        return _Stable(S, M, G, rho, eps)


class _Core:
    """The k×k part: (H_k + ρI)⁻¹ b = b/ρ - C·weights(Cᵀb), H_k x = C·low_rank(Cᵀx)."""

    rank: Tensor | int
    indefinite: Tensor | None = None

    def weights(self, Cb: Tensor) -> Tensor:
        raise NotImplementedError

    def low_rank(self, Cx: Tensor) -> Tensor:
        raise NotImplementedError


class _Woodbury(_Core):
    """Hataya & Yamada 2023, eq. 6: weights = (M + CᵀC/ρ)⁻¹ Cᵀb / ρ²."""

    def __init__(self, M: Tensor, G: Tensor, rho: Tensor | float) -> None:
        self.matrix, self.rho, self.rank = M + G / rho, rho, len(M)

    def weights(self, Cb: Tensor) -> Tensor:
        y: Tensor = torch.linalg.solve_ex(self.matrix, Cb)[0]
        return y / self.rho**2


class _Stable(_Core):
    """H_k = BBᵀ with B = CF, F from the eigenvalues of the core M that stand out above rounding.

    S = ΩᵀΩ: H_k depends on the span of the sketch only; an orthonormal basis of it makes the cut
    one in eigenvalues of H, not in the lengths of the test vectors. Cut directions become zero
    columns of F, so that no shape depends on data.
    """

    def __init__(
        self, S: Tensor | None, M: Tensor, G: Tensor, rho: Tensor | float, eps: float
    ) -> None:
        W = torch.eye(len(M), dtype=M.dtype, device=M.device) if S is None else _inverse_root(S)
        D, V = torch.linalg.eigh(W.mT @ M @ W)
        noise = 4 * len(M) * eps
        self.indefinite = D.amin() < -noise * D.abs().amax()
        cut = torch.where(self.indefinite, _CUT_INDEFINITE, noise) * D.abs().amax()
        keep = D > cut
        self.rank = keep.sum()
        self.F = W @ V * torch.where(keep, torch.where(keep, D, 1).rsqrt(), 0.0)
        lam, self.U = torch.linalg.eigh(self.F.mT @ G @ self.F)  # BᵀB: the eigenvalues of H_k
        self.inverse = 1 / (lam.clamp(min=0) + rho) / rho

    def weights(self, Cb: Tensor) -> Tensor:
        # b/ρ - B (BᵀB + ρI)⁻¹ Bᵀb / ρ
        y: Tensor = self.F @ (self.U @ (self.inverse * (self.U.mT @ (self.F.mT @ Cb))))
        return y

    def low_rank(self, Cx: Tensor) -> Tensor:
        y: Tensor = self.F @ (self.F.mT @ Cx)
        return y


def _largest(S: Tensor | None, G: Tensor) -> Tensor:
    """max ‖Hq‖ over unit vectors q of the sketch's span; 1 where H is zero on it."""
    W = None if S is None else _inverse_root(S)
    squares = torch.linalg.eigvalsh((G + G.mT) / 2 if W is None else W.mT @ G @ W)
    return torch.where(squares[-1] == 0, 1.0, squares[-1]).sqrt()


def _inverse_root(S: Tensor) -> Tensor:
    """W with WᵀSW = I on the numerical range of S, zero columns elsewhere."""
    lam, V = torch.linalg.eigh((S + S.mT) / 2)
    keep = lam > _CUT_PIVOT * lam.amax()
    W: Tensor = V * torch.where(keep, torch.where(keep, lam, 1).rsqrt(), 0.0)
    return W


class _TestVectors:
    """Ω (n, k), given out ``chunk`` columns at a time."""

    chunk: int

    def columns(self, start: int, stop: int) -> Tensor:
        """Ω[:, start:stop]."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """Ωᵀx in float64: (n,) -> (k,), (n, m) -> (k, m)."""
        raise NotImplementedError

    def combine(self, y: Tensor) -> Tensor:
        """Ωy: (k,) -> (n,)."""
        raise NotImplementedError

    def gram(self) -> Tensor | None:
        """ΩᵀΩ, or None for the identity."""
        raise NotImplementedError


class _Columns(_TestVectors):
    """Ω = E_K: a projection is a lookup."""

    def __init__(self, operator: LinearOperator, index: Sequence[int], chunk: int) -> None:
        self.operator, self.index, self.chunk = operator, index, chunk

    def columns(self, start: int, stop: int) -> Tensor:
        return self.operator.basis(self.index[start:stop])

    def project(self, x: Tensor) -> Tensor:
        return self.operator.take(x, self.index).to(wide_dtype(x))

    def combine(self, y: Tensor) -> Tensor:
        return self.operator.place(y, self.index)

    def gram(self) -> None:
        return None


class _Gaussian(_TestVectors):
    """Ω with normal entries; column j is regenerated from its own seed, so memory is one chunk."""

    def __init__(self, operator: LinearOperator, seeds: Sequence[int], chunk: int) -> None:
        self.operator, self.seeds, self.chunk = operator, seeds, chunk

    def columns(self, start: int, stop: int) -> Tensor:
        return torch.stack([self.operator.normal(s) for s in self.seeds[start:stop]], dim=1)

    def _chunks(self) -> list[tuple[int, int]]:
        k = len(self.seeds)
        return [(i, min(i + self.chunk, k)) for i in range(0, k, self.chunk)]

    def project(self, x: Tensor) -> Tensor:
        return torch.cat([self.operator.inner(self.columns(*c), x) for c in self._chunks()])

    def combine(self, y: Tensor) -> Tensor:
        total = torch.zeros(self.operator.length, dtype=y.dtype, device=y.device)
        for start, stop in self._chunks():
            total = total + self.columns(start, stop) @ y[start:stop]
        return total

    def gram(self) -> Tensor:
        return torch.cat([self.project(self.columns(*c)) for c in self._chunks()], dim=1)
