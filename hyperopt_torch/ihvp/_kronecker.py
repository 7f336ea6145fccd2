"""A Fisher matrix of blocks L ⊗ R, one a layer, and its exact damped inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._tensors import wide_dtype
from ..operators import LinearOperator
from ._fisher import Fisher, Inverse
from ._memory import InnerStep

_LARGEST_SIDE = 2048  # a float64 matrix of 32 MiB


class Block(NamedTuple):
    """A layer as a matrix M: where its weight lies in θ, its (rows, columns), and its bias.

    Attributes:
        start, rows, columns: the weight, row-major; ``columns`` is all dimensions but the first.
        bias: where ``rows`` entries lie that are one more column of M; -1: there are none.
    """

    start: int
    rows: int
    columns: int
    bias: int

    def matrices(self, X: Tensor) -> Tensor:
        """(r, n) -> (r, rows, columns), or a column more."""
        o, i = self.rows, self.columns
        M = X[:, self.start : self.start + o * i].reshape(-1, o, i)
        if self.bias < 0:
            return M
        return torch.cat([M, X[:, self.bias : self.bias + o, None]], dim=2)

    def write(self, x: Tensor, M: Tensor) -> None:
        """M, (rows, columns), or a column more, to its place in x, (n,)."""
        o, i = self.rows, self.columns
        x[self.start : self.start + o * i] = M[:, :i].reshape(-1)
        if self.bias >= 0:
            x[self.bias : self.bias + o] = M[:, i]


def blocks_of(shapes: Sequence[Sequence[int]], biases: Mapping[int, int], n: int) -> list[Block]:
    """One a tensor, biases in the block of their weight; one for all of θ without shapes.

    Args:
        biases: number of a tensor -> number of the one that is its bias.
    """
    sizes = [list(shape) for shape in shapes] or [[n]]
    counts = [torch.Size(shape).numel() for shape in sizes]
    starts = [sum(counts[:k]) for k in range(len(counts))]
    taken = set(biases.values())
    found = []
    for k, (shape, start, count) in enumerate(zip(sizes, starts, counts, strict=True)):
        if k not in taken and count:
            o = shape[0] if shape else 1
            bias = starts[biases[k]] if k in biases else -1
            found.append(Block(start, o, count // o, bias))
    return found


class KroneckerFisher(Fisher):
    """F of one block L ⊗ R / tr L a layer, L = Σ ω M Mᵀ and R = Σ ω MᵀM over its gradients M.

    For M = δaᵀ, the gradient of a linear layer with input a and output gradient δ, these are
    L = Σ ω ‖a‖² δδᵀ and R = Σ ω ‖δ‖² aaᵀ: where a and δ are independent the block is
    E[δδᵀ] ⊗ E[aaᵀ], K-FAC's, and exact, as it is for a single row M = δaᵀ and for a vector, whose R
    is a number. Its trace is always that of F. No layer is asked for a or δ: rows are enough, those
    of convolutions too, which are sums of δaᵀ over positions.
    """

    def begin(self, X: Tensor, step: InnerStep) -> dict[str, Any]:
        n, wide, state = X.shape[1], wide_dtype(X), {}
        blocks = blocks_of(step.shapes, step.biases(), n)
        for k, block in enumerate(blocks):
            o, i = block.matrices(X[:1])[0].shape
            for name, side in ((f"left{k}", o), (f"right{k}", i)):
                shape = (side, side) if side <= _LARGEST_SIDE else (side,)  # or its diagonal
                state[name] = torch.zeros(shape, dtype=wide, device=X.device)
        return state | {
            "weight": torch.zeros((), dtype=wide, device=X.device),  # Σ β^age
            "shapes": [list(shape) for shape in step.shapes],
            "blocks": [list(block) for block in blocks],
        }

    def fits(self, state: Mapping[str, Any], X: Tensor, step: InnerStep) -> bool:
        # Not the biases: of a step that goes through some of the layers only, not all are known.
        shapes = [list(shape) for shape in step.shapes]
        return super().fits(state, X, step) and bool(state["shapes"] == shapes)

    def add(self, state: dict[str, Any], X: Tensor, scale: Tensor | float) -> None:
        finite = X.square().sum().isfinite()
        X = torch.where(finite, X, 0.0)
        beta = torch.where(finite, self.decay, torch.ones_like(state["weight"]))
        for k, block in enumerate(map(Block._make, state["blocks"])):
            M = block.matrices(X)
            for name, N in ((f"left{k}", M), (f"right{k}", M.mT)):
                S = state[name]
                S.mul_(beta).add_(_gram(N, diagonal=S.ndim == 1).to(S.dtype) * scale**2)
        state["weight"] = beta * state["weight"] + len(X) * finite

    def inverse(self, state: dict[str, Any], operator: LinearOperator, least: float) -> Inverse:
        blocks, weight, kappa = state["blocks"], state["weight"], state["penalty"]
        norm = weight.clamp(min=1)
        sides = [
            [_eigen(state[f"{side}{k}"] / norm) for side in ("left", "right")]
            for k in range(len(blocks))
        ]
        traces = [lam.sum() for (lam, _), _ in sides]
        mean = torch.stack(traces).sum() / operator.shape[0]
        shift = self.rule.shift(mean, weight > 0, kappa, least)

        def product(r: Tensor) -> Tensor:
            x = torch.empty_like(r)
            parts = zip(map(Block._make, blocks), sides, traces, strict=True)
            for block, ((lam, U), (mu, V)), trace in parts:
                B = block.matrices(r[None].to(lam.dtype))[0]
                D = lam[:, None] * mu / torch.where(trace > 0, trace, 1.0) + shift
                C = _into(V, _into(U, B).mT).mT / D  # (L ⊗ R / tr L + shift)⁻¹ in eigenvectors
                block.write(x, _out_of(U, _out_of(V, C.mT).mT))
            return x

        return Inverse(product, shift - kappa)


def _gram(N: Tensor, *, diagonal: bool) -> Tensor:
    """Σ N Nᵀ over the first dimension, (r, a, b) -> (a, a), or its diagonal (a,)."""
    if diagonal:
        return N.square().sum((0, 2))
    Y = N.transpose(0, 1).flatten(1)
    return Y @ Y.mT


def _eigen(S: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues >= 0 and eigenvectors; None where S is a diagonal."""
    if S.ndim == 1:
        return S, None
    lam, U = torch.linalg.eigh(S)
    return lam.clamp(min=0), U


def _into(U: Tensor | None, B: Tensor) -> Tensor:
    return B if U is None else U.mT @ B


def _out_of(U: Tensor | None, B: Tensor) -> Tensor:
    return B if U is None else U @ B
