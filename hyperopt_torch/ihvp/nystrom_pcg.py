"""A randomized Nyström sketch that preconditions, for many outer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._tensors import draw_seed, seeded_rng
from ..errors import check_count, check_number
from ..operators import LinearOperator
from ._descent import begin, descend, rescued
from .base import IHVP, Preconditioner, Solution

_CUT_INDEFINITE = 1e-2
_SLOW = 0.5  # residuals should fall at least by this factor a step,
_WORN = 1.5  # unless they did not do much better with the sketch fresh


class NystromSketch(Preconditioner):
    """P⁻¹ = (λ_k + ρ) U(Λ + ρ)⁻¹Uᵀ + (I - UUᵀ) from a randomized Nyström sketch UΛUᵀ of H.

    Half of the test vectors are the leading eigenvectors of the last sketch, so that each refresh
    is one step of subspace iteration and follows a drifting H; the others are Gaussian.

    Args:
        rank: k >= 1, clamped to n.
        generator: where to take the seed from; None: from ``torch.manual_seed``'s seed.

    Cost: k products a refresh; k vectors of memory; 4kn flops an application.

    Reference: Frangella, Tropp & Udell, "Randomized Nyström preconditioning", 2023.
    """

    def __init__(self, rank: int = 20, generator: torch.Generator | None = None) -> None:
        self._seed = draw_seed(generator)
        super().__init__()
        self.rank = check_count("rank", rank)

    def initial_state(self) -> dict[str, Any]:
        return {"seed": self._seed, "draws": 0}

    @property
    def vectors(self) -> int:
        return 4 * self.rank

    def refresh(self, operator: LinearOperator) -> bool:
        """Draws a new sketch; whether H showed negative eigenvalues, which are cut."""
        Omega = self._test_vectors(operator)  # (n, k), orthonormal
        Y = operator @ Omega
        D, V = torch.linalg.eigh(_symmetric(operator.inner(Omega, Y)))
        noise = 4 * len(D) * torch.finfo(Y.dtype).eps
        indefinite = D.amin() < -noise * D.abs().amax()
        keep = torch.where(indefinite, _CUT_INDEFINITE, noise) * D.abs().amax() < D
        F = V * torch.where(keep, torch.where(keep, D, 1).rsqrt(), 0.0)
        lam, W = torch.linalg.eigh(_symmetric(F.mT @ operator.inner(Y, Y) @ F))
        alive = lam > noise * lam.amax()
        weights = F @ W * torch.where(alive, torch.where(alive, lam, 1).rsqrt(), 0.0)
        self.state["U"] = Y @ weights.to(Y.dtype)  # cut directions are zero columns
        self.state["lam"] = torch.where(alive, lam, 0.0)
        return bool(indefinite)

    def _test_vectors(self, operator: LinearOperator) -> Tensor:
        rank = min(self.rank, operator.shape[0])
        rng = seeded_rng(self.state["seed"], self.state["draws"])
        self.state["draws"] += 1
        Omega = torch.stack([operator.normal(rng.getrandbits(62)) for _ in range(rank)]).mT
        U: Tensor | None = self.state.get("U")
        if U is not None and U.shape == Omega.shape:
            half = rank // 2
            Omega = torch.cat([U[:, rank - half :], Omega[:, : rank - half]], dim=1)
        for _ in range(2):  # orthonormal by its Gram matrix, twice: only `inner` reduces over n
            lam, V = torch.linalg.eigh(_symmetric(operator.inner(Omega, Omega)))
            keep = lam > 1e-12 * lam.amax()
            root = V * torch.where(keep, torch.where(keep, lam, 1).rsqrt(), 0.0)
            Omega = Omega @ root.to(Omega.dtype)
        return Omega

    def prepare(self, operator: LinearOperator, damping: float) -> Callable[[Tensor], Tensor]:
        U: Tensor | None = self.state.get("U")
        if U is None or len(U) != operator.length:
            self.refresh(operator)
            U = self.state["U"]
        lam: Tensor = self.state["lam"]
        positive = torch.where(lam > 0, lam, float("inf"))
        smallest = torch.where(positive.amin().isinf(), 0.0, positive.amin())
        weights = torch.where(lam > 0, (smallest + damping) / (lam + damping) - 1, 0.0)

        def apply(r: Tensor) -> Tensor:
            return r + U @ (weights * operator.inner(U, r)).to(r.dtype)

        return apply


class NystromPCG(IHVP):
    """Warm conjugate gradients, preconditioned by a Nyström sketch that lasts many outer steps.

    As a cached inverse a sketch is worthless as soon as H has moved; as a preconditioner it only
    loses speed. It is refreshed every ``refresh_every`` solves, and as soon as the residual falls
    by less than a half a step and clearly slower than with the sketch fresh.

    Args:
        rank: k >= 1, of the sketch; clamped to n.
        refresh_every: R >= 1, in solves.
        max_iter: steps a solve, >= 1.
        tol: stop at ‖r‖ <= tol·‖b‖, >= 0.
        damping: ρ >= 0, or "auto": relative to ‖H‖.
        generator: where to take the seed from; None: from ``torch.manual_seed``'s seed.

    Raises:
        ValueError: an argument is out of its range.

    Exact limit: rank = n, in one step; otherwise as conjugate gradients.

    Trouble: negative eigenvalues of the sketch are cut, and flagged; so is a direction of negative
    curvature, which ends the solve at the iterate before it, at the length that is best for the
    residual, and calls for a refresh. A solve is not judged by its residual, which may rise above
    ‖b‖: it begins at the best multiple of the last solution, and conjugate directions lower the
    energy ½xᵀAx - bᵀx from there.

    Cost: k/R + max_iter + 1 joint products a solve; 2k + 2·max_iter + 4 vectors, 4k at a
    refresh; syncs.

    Example:
        >>> import torch
        >>> from hyperopt_torch.operators import Dense
        >>> H = Dense(torch.diag(torch.tensor([1.0, 4.0])))
        >>> NystromPCG(2, max_iter=1, tol=0.0, damping=1.0).solve(H, torch.tensor([2.0, 5.0])).x
        tensor([1.0000, 1.0000])

    Reference: Frangella, Tropp & Udell, "Randomized Nyström preconditioning", SIAM J. Matrix
    Anal. Appl. 2023; its reuse over outer steps is this library's.
    """

    follows = True

    def __init__(
        self,
        rank: int = 20,
        *,
        refresh_every: int = 20,
        max_iter: int = 2,
        tol: float = 1e-2,
        damping: float | str = 0.01,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.refresh_every = check_count("refresh_every", refresh_every)
        self.max_iter = check_count("max_iter", max_iter)
        self.tol = check_number("tol", tol)
        self._set_damping(damping)
        self.sketch = NystromSketch(rank, generator)

    @property
    def vectors(self) -> int:
        return max(self.sketch.vectors, 2 * self.sketch.rank + 2 * self.max_iter + 4)

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        A = self.damped(operator, rhs)
        age = self.state.get("age", self.refresh_every)
        indefinite = age >= self.refresh_every and self.sketch.refresh(operator)
        age = 0 if age >= self.refresh_every else age
        found = begin(A, rhs, self.state.get("x"))
        before = found.norm
        precondition = self.sketch.prepare(operator, A.damping)
        found = descend(A, found, precondition, self.max_iter, self.tol)
        rate = (found.norm / before) ** (1 / found.steps) if found.steps else 0.0
        if age == 0:
            self.state["fresh_rate"] = rate  # what this spectrum allows with a sketch of this rank
        worn = rate > max(_SLOW, _WORN * self.state["fresh_rate"])
        self.state["age"] = self.refresh_every if worn or found.negative else age + 1
        found = rescued(A, rhs, found)
        self.state["x"] = found.x
        found.negative = found.negative or indefinite
        return found.solution(self.tol or None)


def _symmetric(M: Tensor) -> Tensor:
    return (M + M.mT) / 2
