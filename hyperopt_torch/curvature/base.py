"""Which matrix stands for the inner Hessian H."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .._refusals import NoSecondDerivative
from ..inner_gradient import InnerGradient
from ..operators import LinearOperator
from ..plain_gradient import PlainGradient

MEMORY = 256 << 20  # bytes that the automatic chunk of a batched product may take
LARGE = 1 << 17  # from this many parameters on, a CPU gains nothing from batching (measured)


class Curvature(ABC):
    """A choice of the matrix that an :class:`~hyperopt_torch.ihvp.IHVP` inverts.

    Law: the operator is symmetric, and its cross product Jᵀx is the exact ∂²f/∂φ∂θ x, whatever
    stands for H.
    """

    @abstractmethod
    def operator(self, gradient: Any) -> LinearOperator:
        """The n×n operator at the point where ``gradient`` was taken.

        Args:
            gradient: an :class:`~hyperopt_torch.operators.InnerGradient`, ∇f with its graph; a
                :class:`~hyperopt_torch.plain_gradient.PlainGradient` for those that say so.
        """

    def __repr__(self) -> str:
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return f"{type(self).__name__}({told})"


class FirstOrderCurvature(Curvature):
    """A choice that needs first gradients alone, taken at θ and beside it."""

    step: float | None = None

    @abstractmethod
    def operator(self, gradient: PlainGradient) -> LinearOperator:
        """The n×n operator at the point where ``gradient`` was taken."""


class BatchedOperator(LinearOperator):
    """Products by backward passes through the graph of ∇f, batched over columns where that pays.

    Args:
        gradient: ∇f, its graph alive.
        chunk_size: columns in one batched backward pass; 1 loops over the columns, None asks
            :meth:`_automatic_chunk`. Where an operation has no batching rule, columns are looped.
    """

    def __init__(self, gradient: InnerGradient, chunk_size: int | None) -> None:
        super().__init__(gradient.layout.n, gradient.layout.dtype, gradient.layout.device)
        self.gradient = gradient
        self._chunk = chunk_size

    @abstractmethod
    def _batch(self, rows: Tensor) -> Tensor:
        """(k, n) rows -> (k, n) rows of products, in batched backward passes."""

    @abstractmethod
    def _automatic_chunk(self) -> int: ...

    def _products(self, X: Tensor) -> Tensor:
        if self._chunk is None:
            self._chunk = self._automatic_chunk()
        if self._chunk > 1:
            try:
                return torch.cat([self._batch(rows) for rows in torch.split(X.mT, self._chunk)]).mT
            except NoSecondDerivative:
                raise  # one column at a time would be refused as well
            except RuntimeError:  # an operation without a batching rule, or out of memory
                self._chunk = 1
        return super()._products(X)


def automatic_chunk(gradient: InnerGradient, memory: int) -> int:
    """Columns of a batched product in about ``memory`` bytes; 1 where batching is no faster.

    From the graph alone: the same program gives the same bits in every run.
    """
    if gradient.layout.device.type == "cpu":
        convolutional = any("Convolution" in node.name() for node in gradient.nodes)
        if convolutional or gradient.layout.n > LARGE:
            return 1
    return max(1, memory // max(1, gradient.bytes))
