"""The truncated Neumann series."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import check_count, check_number
from ..operators import LinearOperator
from .base import IHVP, Solution

_LANCZOS_STEPS = 8
_REFRESH_EVERY = 20  # solves between two looks at the largest eigenvalue
_GROWTH = 1.05  # a term this much longer than the last one, twice in a row, is divergence


class Neumann(IHVP):
    """x = α Σ_{i=0..K} (I - αA)ⁱ b with A = H + ρI and K = ``num_terms`` products.

    On an eigenvalue a of A it gives (1 - (1 - αa)^(K+1)) / a: too short where αa is small, and
    divergent where αa > 2 or a < 0.

    Args:
        num_terms: K >= 1, the number of products.
        scale: α, which must lie below 2 / λ_max(A); "auto" takes 1 / λ̂, where λ̂ estimates λ_max,
            from above as a rule, by 8 Lanczos products, done at the first solve, every 20th, and
            after a divergence. The factor 2 is the margin.
        damping: ρ >= 0, or "auto": relative to ‖H‖.

    Raises:
        ValueError: ``num_terms`` < 1, ``scale`` neither "auto" nor > 0, ``damping`` < 0.

    Exact limit: num_terms → ∞, for positive definite A.

    Trouble: where terms grow twice in a row by more than 5%, the partial sum with the smallest
    residual is returned (a multiple of b, if the first term grew already) and the report says
    ``diverged``; ``negative_curvature`` is set where a term saw some.

    Cost: K products (8 more when α is looked for), 4 vectors of memory (31 then); with
    "auto" one sync.

    Example:
        >>> import torch
        >>> from hyperopt_torch.operators import Dense
        >>> H = Dense(torch.eye(2, dtype=torch.float64) * 2)
        >>> Neumann(1, scale=0.25).solve(H, torch.ones(2, dtype=torch.float64)).x
        tensor([0.3750, 0.3750], dtype=torch.float64)

    Reference: Lorraine, Vicol & Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation", AISTATS 2020.
    """

    def __init__(
        self, num_terms: int = 10, *, scale: str | float = "auto", damping: float | str = 0.0
    ) -> None:
        super().__init__()
        self.num_terms = check_count("num_terms", num_terms)
        if isinstance(scale, str) and scale != "auto":
            raise ValueError(f'Invalid scale: {scale!r}; expected "auto" or a number > 0.')
        self.scale = (
            scale if isinstance(scale, str) else check_number("scale", scale, positive=True)
        )
        self._set_damping(damping)

    @property
    def vectors(self) -> int:
        return 31 if self.scale == "auto" else 4

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        A = self.damped(operator, rhs)
        alpha = self._alpha(A, rhs)
        term = total = rhs
        best = torch.zeros_like(rhs)
        norm2 = shortest = A.inner(rhs, rhs)
        growths = torch.zeros_like(norm2)  # in a row
        diverged = negative = torch.zeros_like(norm2, dtype=torch.bool)
        for i in range(self.num_terms):
            product = A @ term
            curvature = A.inner(term, product)
            negative = negative | (~diverged & (curvature < 0))
            if i == 0:
                best = _best_multiple(A, rhs, product, curvature, norm2) / alpha
            term = term - alpha * product  # = b - A (α total): the residual of the sum so far
            previous, norm2 = norm2, A.inner(term, term)
            growths = torch.where(norm2 > _GROWTH**2 * previous, growths + 1, 0.0)
            diverged = diverged | (growths >= 2)
            # NaN compares false: it stays in `total`, which is returned unless growth was seen.
            shorter = ~diverged & (norm2 < shortest)
            shortest = torch.where(shorter, norm2, shortest)
            best = torch.where(shorter, total, best)
            total = total + term
        x = alpha * torch.where(diverged, best, total)
        if self.scale == "auto":
            self.state["diverged"] = diverged
        return Solution(x.to(rhs.dtype), negative_curvature=negative, diverged=diverged)

    def _alpha(self, A: LinearOperator, rhs: Tensor) -> Tensor | float:
        if not isinstance(self.scale, str):
            return self.scale
        age = self.state.get("age", _REFRESH_EVERY)
        if age >= _REFRESH_EVERY or bool(self.state["diverged"]):
            self.state["alpha"] = 1 / largest_eigenvalue_bound(A, rhs)
            age = 0
        self.state["age"] = age + 1
        alpha: Tensor = self.state["alpha"]
        return alpha.to(rhs.device)


def _best_multiple(
    A: LinearOperator, b: Tensor, Ab: Tensor, curvature: Tensor, bb: Tensor
) -> Tensor:
    """The multiple of b with the smallest residual; b·‖b‖/‖Ab‖ if that points backwards."""
    size = A.inner(Ab, Ab)
    safe = torch.where(size > 0, size, 1.0)
    return torch.where(curvature > 0, curvature / safe, (bb / safe).sqrt()) * b


def largest_eigenvalue_bound(A: LinearOperator, start: Tensor) -> Tensor:
    """An upper estimate of max |λ(A)| on the Krylov space of ``start``, by 8 Lanczos products.

    The largest Ritz value plus its residual bound β|s|: the Ritz value alone lies below λ_max.
    Full reorthogonalisation, so that short steps cost no accuracy. () on the device; 1 for b = 0.
    """
    steps = min(_LANCZOS_STEPS, A.shape[0])
    norm = A.inner(start, start).sqrt()
    q = start / torch.where(norm > 0, norm, 1)
    basis: list[Tensor] = []
    T = norm.new_zeros(steps, steps)
    beta = norm
    for j in range(steps):
        basis.append(q.to(start.dtype))
        Q = torch.stack(basis, dim=1)  # (n, j + 1)
        w = A @ basis[-1]
        coefficients = A.inner(Q, w)  # (j + 1,)
        row = torch.nn.functional.pad(coefficients, (0, steps - j - 1))
        T = torch.cat([T[:j], row[None], T[j + 1 :]])
        w = w - (Q @ coefficients.to(Q.dtype))
        w = w - (Q @ A.inner(Q, w).to(Q.dtype))
        beta = A.inner(w, w).sqrt()
        # After an invariant subspace is found, w is rounding: a zero vector adds zeros to T.
        alive = beta > 1e-6 * T.abs().amax()
        beta = torch.where(alive, beta, 0.0)
        q = torch.where(alive, w / torch.where(alive, beta, 1), 0.0)
    ritz, S = torch.linalg.eigh(torch.tril(T) + torch.tril(T, -1).mT)
    bound = (ritz.abs() + beta * S[-1].abs()).amax()
    return torch.where(bound > 0, bound, 1.0)
