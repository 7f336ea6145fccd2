"""A Fisher matrix that is fed rows as training goes on, and its damped inverse."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._tensors import wide_dtype
from ..operators import LinearOperator
from ._memory import InnerStep

_LARGEST_DENSE = 2048  # two float64 matrices of 32 MiB each
_LONGEST_RECURSION = 1000  # steps until rounding is swept out by a new factorization


@dataclass(frozen=True)
class Inverse:
    """r -> (F + κI + ρI)⁻¹ r, κ the curvature of the penalty."""

    apply: Callable[[Tensor], Tensor]
    damping: Tensor
    rank: Tensor | None = None


@dataclass(frozen=True)
class DampingRule:
    """ρ = max(relative · mean diagonal of F, least)."""

    relative: float
    least: float

    def shift(
        self,
        mean_diagonal: Tensor,
        seen: Tensor,
        kappa: Tensor | float = 0.0,
        least: float = 0.0,
    ) -> Tensor:
        """κ + ρ, what is added to F; 1 where nothing was seen, so that the inverse is I there."""
        rho = (self.relative * mean_diagonal).clamp(min=max(self.least, least))
        return torch.where(seen, kappa + rho, 1.0)


class Fisher(ABC):
    """One way to keep F; all that changes lies in the strategy's ``state``."""

    def __init__(self, rule: DampingRule, decay: float) -> None:
        self.rule, self.decay = rule, decay

    @abstractmethod
    def begin(self, X: Tensor, step: InnerStep) -> dict[str, Any]:
        """The memory before the first rows, for rows like X (r, n) of a step like this."""

    def fits(self, state: Mapping[str, Any], X: Tensor, step: InnerStep) -> bool:
        """Whether the memory is about parameters like those of the step."""
        return bool(state["n"] == X.shape[1])

    @abstractmethod
    def add(self, state: dict[str, Any], X: Tensor, scale: Tensor | float) -> None:
        """Takes the rows scale · X, (r, n), of one step; X is lent.

        The scale comes apart because this is what an inner step waits for: X is read once.
        """

    @abstractmethod
    def inverse(self, state: dict[str, Any], operator: LinearOperator, least: float) -> Inverse:
        """The inverse with ρ >= ``least`` and κ = ``state["penalty"]``."""

    def place(self, state: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        """Moves the memory to where the parameters are now, as after loading a checkpoint."""
        for name, value in state.items():
            if isinstance(value, Tensor):
                vectors = name in ("rows", "diagonal", "mean")
                state[name] = value.to(device, dtype if vectors else value.dtype)


class WindowFisher(Fisher):
    """F = GᵀDG with the last m rows G (m, n) in a ring and D their weights; Woodbury, m×m.

    A step only copies its rows into the ring. Their products GGᵀ are made up for at the next solve,
    where the operator's ``inner`` is at hand, and so is whether they are finite: norms show it.
    """

    def __init__(self, rule: DampingRule, decay: float, window: int) -> None:
        super().__init__(rule, decay)
        self.window = window

    def begin(self, X: Tensor, step: InnerStep) -> dict[str, Any]:
        m, wide = self.window, wide_dtype(X)
        return {
            "rows": torch.zeros(m, X.shape[1], dtype=X.dtype, device=X.device),
            "gram": torch.zeros(m, m, dtype=wide, device=X.device),  # GGᵀ, rows unweighted
            "usable": torch.zeros(m, dtype=torch.bool, device=X.device),
            "stamps": [-1] * m,  # the step of each row
            "next": 0,  # the slot that is written next
            "unseen": 0,  # newest rows that are not in ``gram`` yet
        }

    def add(self, state: dict[str, Any], X: Tensor, scale: Tensor | float) -> None:
        for x in X:
            slot = state["next"]
            torch.mul(x, scale, out=state["rows"][slot])
            state["stamps"][slot] = state["steps"]
            state["next"] = (slot + 1) % self.window
        state["unseen"] = min(state["unseen"] + len(X), self.window)

    def _catch_up(self, state: dict[str, Any], operator: LinearOperator) -> None:
        slots = [(state["next"] - 1 - i) % self.window for i in range(state["unseen"])]
        state["unseen"] = 0
        if not slots:
            return
        G, gram, usable = state["rows"], state["gram"], state["usable"]
        index = torch.tensor(slots, device=G.device)
        X = G.index_select(0, index)
        products = operator.inner(X.mT, G.mT)  # (r, m)
        finite = products.gather(1, index[:, None])[:, 0].isfinite()
        usable.index_copy_(0, index, finite)
        G.index_copy_(0, index, torch.where(finite[:, None], X, 0.0))
        products = torch.where(finite[:, None] & usable, products, 0.0)
        gram.index_copy_(0, index, products)
        gram.index_copy_(1, index, products.mT)

    def inverse(self, state: dict[str, Any], operator: LinearOperator, least: float) -> Inverse:
        self._catch_up(state, operator)
        G, gram = state["rows"], state["gram"]
        ages = [state["steps"] - 1 - stamp if stamp >= 0 else None for stamp in state["stamps"]]
        powers = [0.0 if age is None else self.decay**age for age in ages]
        weights = torch.tensor(powers, dtype=gram.dtype, device=gram.device) * state["usable"]
        total = weights.sum()
        root = (weights / torch.where(total > 0, total, 1.0)).sqrt()
        lam, U = torch.linalg.eigh(root[:, None] * gram * root)  # D^½ GGᵀ D^½
        lam = lam.clamp(min=0)
        kappa = state["penalty"]
        shift = self.rule.shift(lam.sum() / operator.shape[0], total > 0, kappa, least)
        W = root[:, None] * U  # F = GᵀW WᵀG, and WᵀGGᵀW = diag(lam)

        def woodbury(r: Tensor) -> Tensor:
            coefficients = W @ ((W.mT @ operator.inner(G.mT, r)) / (lam + shift))
            x: Tensor = (r - G.mT @ coefficients.to(G.dtype)) / shift
            return x

        rank = (lam > len(lam) * torch.finfo(G.dtype).eps * lam.amax()).sum()
        return Inverse(woodbury, shift - kappa, rank)


class DiagonalFisher(Fisher):
    """The diagonal of F, by a running mean."""

    def begin(self, X: Tensor, step: InnerStep) -> dict[str, Any]:
        zero = torch.zeros((), dtype=wide_dtype(X), device=X.device)
        return {"diagonal": torch.zeros_like(X[0]), "weight": zero}

    def add(self, state: dict[str, Any], X: Tensor, scale: Tensor | float) -> None:
        squares = X.square()
        squares = (squares[0] if len(X) == 1 else squares.mean(0)).mul_(scale * scale)
        finite = squares.sum().isfinite()
        weight = torch.where(finite, self.decay * state["weight"] + len(X), state["weight"])
        gain = torch.where(finite, len(X) / weight.clamp(min=1), 0.0)
        squares.nan_to_num_(0.0, 0.0, 0.0)  # with a gain of 0, but 0 · inf would be NaN
        state["diagonal"].lerp_(squares, gain.to(squares.dtype))
        state["weight"] = weight

    def inverse(self, state: dict[str, Any], operator: LinearOperator, least: float) -> Inverse:
        diagonal, kappa = state["diagonal"], state["penalty"]
        mean = operator.inner(diagonal, torch.ones_like(diagonal)) / operator.shape[0]
        shift = self.rule.shift(mean, state["weight"] > 0, kappa, least)
        return Inverse(lambda r: r / (diagonal + shift), shift - kappa)


class DenseFisher(Fisher):
    """S = Σ β^age s sᵀ of all rows, and the inverse of S + μI by rank-r updates; F = S / Σ β^age.

    The updates carry μ ← βμ along: without more, the inverse would grow as β^-t in directions that
    no row excites. So the shift μ / Σ β^age falls; it begins at twice what the rule says, and
    before it falls below that, S + μI is factorized anew.
    """

    def begin(self, X: Tensor, step: InnerStep) -> dict[str, Any]:
        n = X.shape[1]
        if n > _LARGEST_DENSE:
            raise ValueError(
                f'NHGD(structure="dense") keeps n×n matrices, and n = {n} > {_LARGEST_DENSE}: use '
                'structure="window", which keeps `window` rows.'
            )
        zero = torch.zeros((), dtype=wide_dtype(X), device=X.device)
        return {
            "sum": zero.new_zeros(n, n),
            "inverse": zero.new_zeros(n, n),
            "shift": zero,  # μ
            "weight": zero,  # Σ β^age
            "due": 0,  # the step of the next factorization
        }

    def add(self, state: dict[str, Any], X: Tensor, scale: Tensor | float) -> None:
        S, A = state["sum"], state["inverse"]
        X = X.to(S.dtype) * scale
        finite = X.square().sum().isfinite()
        X = torch.where(finite, X, 0.0)
        beta = torch.where(finite, self.decay, torch.ones_like(state["weight"]))
        S.mul_(beta).addmm_(X.mT, X)
        state["weight"] = beta * state["weight"] + len(X) * finite
        state["shift"] = beta * state["shift"]
        if state["steps"] >= state["due"]:
            self._factorize(state)
            return
        A.div_(beta)
        XA = X @ A  # (r, n)
        core = torch.eye(len(X), dtype=S.dtype, device=S.device) + XA @ X.mT
        U = torch.linalg.solve_triangular(_cholesky(core), XA, upper=False)
        A.addmm_(U.mT, U, alpha=-1)  # Sherman–Morrison–Woodbury; symmetric, as UᵀU is

    def _factorize(self, state: dict[str, Any]) -> None:
        S, weight = state["sum"], state["weight"]
        seen, norm = weight > 0, weight.clamp(min=1)
        shift = self.rule.shift(S.diagonal().mean() / norm, seen)
        state["shift"] = torch.where(seen, 2 * shift, shift) * norm
        state["inverse"] = _inverted(S, state["shift"])
        steps = state["steps"] + 1
        half_life = math.log(0.5) / math.log(self.decay) if self.decay < 1 else math.inf
        state["due"] = state["steps"] + int(max(1, min(steps, half_life, _LONGEST_RECURSION)))

    def inverse(self, state: dict[str, Any], operator: LinearOperator, least: float) -> Inverse:
        norm, kappa = state["weight"].clamp(min=1), state["penalty"]
        rho, A = state["shift"] / norm, state["inverse"]
        if least > 0 or isinstance(kappa, Tensor):  # the recursion knows neither
            rho = rho.clamp(min=least)
            A = _inverted(state["sum"], (kappa + rho) * norm)

        def product(r: Tensor) -> Tensor:
            x: Tensor = norm * (A @ r.to(A.dtype))
            return x.to(r.dtype)

        return Inverse(product, rho)


def _inverted(S: Tensor, shift: Tensor) -> Tensor:
    """(S + μI)⁻¹ for S ⪰ 0."""
    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    inverse: Tensor = torch.cholesky_inverse(_cholesky(S + shift * eye))
    return inverse


def _cholesky(matrix: Tensor) -> Tensor:
    L: Tensor = torch.linalg.cholesky_ex(matrix)[0]  # its other form waits for the device
    return L
