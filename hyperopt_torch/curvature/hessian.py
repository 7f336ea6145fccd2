"""The exact Hessian, by double backward."""

from __future__ import annotations

from torch import Tensor

from ..errors import check_count
from ..inner_gradient import InnerGradient
from ..operators import LinearOperator
from .base import MEMORY as _MEMORY
from .base import BatchedOperator, Curvature, automatic_chunk


class Hessian(Curvature):
    """H = ∂²f/∂θ², its products by differentiating ⟨∇f, x⟩ once more.

    Args:
        chunk_size: columns of an (n, k) product in one batched backward pass; 1 loops over the
            columns. None chooses from the graph alone, so that the same program gives the same
            bits in every run: columns are looped on a CPU where the model is convolutional or
            has more than 131,072 parameters (batching is no faster there), and otherwise batched
            in chunks of about 256 MiB. Where an operation has no batching rule, columns are looped.

    Cost: about two gradients of f a product.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        self.chunk_size = chunk_size

    def operator(self, inner_gradient: InnerGradient) -> LinearOperator:
        return _HessianOperator(inner_gradient, self.chunk_size)


class _HessianOperator(BatchedOperator):
    def _product(self, x: Tensor) -> Tensor:
        return self.gradient.hessian_product(x)

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gradient.joint(x)

    def _batch(self, rows: Tensor) -> Tensor:
        return self.gradient.hessian_products(rows)

    def _automatic_chunk(self) -> int:
        return automatic_chunk(self.gradient, _MEMORY)
