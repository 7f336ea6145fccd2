"""Symmetric matrices that are known by their products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._tensors import inner_product, inner_products, seeded_generator
from .inner_gradient import InnerGradient

__all__ = ["Damped", "Dense", "InnerGradient", "LinearOperator", "Shifted", "Summed"]


class LinearOperator(ABC):
    """A symmetric n×n matrix known by its products.

    A strategy touches vectors by ``@``, elementwise arithmetic and the methods here, nothing else:
    then it runs unchanged when vectors are sharded over processes. Below, n as the length of a
    vector is that of the part that this process holds.

    Attributes:
        shape, dtype, device: of the matrix.
        length: entries of a vector that this process holds: n, or fewer where they are sharded.
        matvecs: products done so far; a product with k columns counts k, a joint product one.
        approximate: whether it stands for another matrix, as Gauss-Newton does for the Hessian.
    """

    approximate: bool = False

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (n, n)
        self.length = n
        self.dtype = dtype
        self.device = device
        self.matvecs = 0

    def __matmul__(self, x: Tensor) -> Tensor:
        """(n,) -> (n,); (n, k) -> (n, k), batched where that pays."""
        self.matvecs += 1 if x.ndim == 1 else x.shape[1]
        return self._product(x) if x.ndim == 1 else self._products(x)

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(Hx, Jᵀx): (n,) -> (n,), (h,), both from one backward pass where the curvature allows."""
        self.matvecs += 1
        return self._joint(x)

    def exact(self, x: Tensor) -> Tensor:
        """(n,) -> (n,), the product with the matrix that this one stands for."""
        self.matvecs += 1
        return self._exact(x)

    def _exact(self, x: Tensor) -> Tensor:
        return self._product(x)

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor: ...

    def _products(self, X: Tensor) -> Tensor:
        return torch.stack([self._product(x) for x in X.unbind(1)]).mT  # rows lie together

    @abstractmethod
    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """xᵀy in float64: (n,), (n,) -> (); (n, j), (n, k) -> (j, k)."""
        return inner_product(x, y)

    def inners(self, X: Tensor, Y: Tensor) -> Tensor:
        """XYᵀ for vectors that are rows: (j, n), (k, n) -> (j, k) in float64, by one pass over X.

        Faster than :meth:`inner`, and to 1e-7 of ‖x‖‖y‖ only in float32, where entries must lie
        well above 1e-19.
        """
        return inner_products(X, Y)

    def basis(self, index: Sequence[int]) -> Tensor:
        """(n, k) unit vectors E_K for the global indices K."""
        E = torch.zeros(len(index), self.length, dtype=self.dtype, device=self.device)
        columns = torch.tensor(index, device=self.device)
        rows = torch.arange(len(index), device=self.device)
        return E.index_put_((rows, columns), E.new_ones(())).mT

    def take(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """Rows x[K] for the global indices K: (n,) -> (k,), (n, m) -> (k, m)."""
        return x.index_select(0, torch.tensor(index, device=x.device))

    def place(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """E_K y, the vector with y at the global indices K: (k,) -> (n,)."""
        x = torch.zeros(self.length, dtype=y.dtype, device=self.device)
        return x.index_put((torch.tensor(index, device=self.device),), y)

    def normal(self, seed: int) -> Tensor:
        """(n,) with standard normal entries, a function of the seed."""
        generator = seeded_generator(seed, self.device)
        return torch.randn(self.length, dtype=self.dtype, device=self.device, generator=generator)

    def dense(self) -> Tensor:
        """The whole (n, n) matrix, by n products: for tests and tiny problems."""
        every = range(self.shape[0])
        return self.take(self @ self.basis(every), every)


class Dense(LinearOperator):
    """A given symmetric (n, n) matrix, and optionally a cross Jacobian J of shape (n, h).

    >>> Dense(torch.tensor([[2., 1.], [1., 3.]])) @ torch.tensor([1., 0.])
    tensor([2., 1.])
    """

    def __init__(self, matrix: Tensor, cross: Tensor | None = None) -> None:
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix
        self.cross = matrix.new_zeros(matrix.shape[0], 0) if cross is None else cross

    def _product(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def _products(self, X: Tensor) -> Tensor:
        return self.matrix @ X

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.matrix @ x, self.cross.mT @ x


class Wrapping(LinearOperator):
    """A matrix made from that of another operator, in the same places: only products change."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self.length = operator.length
        self.operator, self.approximate = operator, operator.approximate

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return self.operator.inner(x, y)

    def inners(self, X: Tensor, Y: Tensor) -> Tensor:
        return self.operator.inners(X, Y)

    def basis(self, index: Sequence[int]) -> Tensor:
        return self.operator.basis(index)

    def take(self, x: Tensor, index: Sequence[int]) -> Tensor:
        return self.operator.take(x, index)

    def place(self, y: Tensor, index: Sequence[int]) -> Tensor:
        return self.operator.place(y, index)

    def normal(self, seed: int) -> Tensor:
        return self.operator.normal(seed)


class Damped(Wrapping):
    """H + ρI; counts its products on H.

    >>> Damped(Dense(torch.eye(2)), 0.5) @ torch.tensor([2., 4.])
    tensor([3., 6.])
    """

    def __init__(self, operator: LinearOperator, damping: float) -> None:
        super().__init__(operator)
        self.damping = damping

    def _product(self, x: Tensor) -> Tensor:
        return self._shift(self.operator @ x, x)

    def _products(self, X: Tensor) -> Tensor:
        return self._shift(self.operator @ X, X)

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product, cross = self.operator.joint(x)
        return self._shift(product, x), cross

    def _exact(self, x: Tensor) -> Tensor:
        return self._shift(self.operator.exact(x), x)

    def _shift(self, product: Tensor, x: Tensor) -> Tensor:
        return torch.add(product, x, alpha=self.damping) if self.damping else product


class Shifted(Wrapping):
    """H + diag(d), for d of shape (n,), or () for dI; counts its products on H.

    >>> Shifted(Dense(torch.eye(2)), torch.tensor([1., 3.])) @ torch.tensor([2., 4.])
    tensor([ 4., 16.])
    """

    def __init__(self, operator: LinearOperator, shift: Tensor) -> None:
        super().__init__(operator)
        self.shift = shift

    def _product(self, x: Tensor) -> Tensor:
        return self.operator @ x + self.shift * x

    def _products(self, X: Tensor) -> Tensor:
        return self.operator @ X + (self.shift[:, None] if self.shift.ndim else self.shift) * X

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product, cross = self.operator.joint(x)
        return product + self.shift * x, cross

    def _exact(self, x: Tensor) -> Tensor:
        return self.operator.exact(x) + self.shift * x


class Summed(LinearOperator):
    """Σ w_i A_i, where each A_i is made anew for every product and dropped before the next one.

    For micro-batches, each with a graph of its own: one is alive at a time. A product of all terms
    counts as one.

    Args:
        makes: (w_i, function that makes A_i) for each term; at least one.

    >>> A, B = Dense(torch.eye(2)), Dense(torch.ones(2, 2))
    >>> Summed([(1.0, lambda: A), (0.5, lambda: B)]) @ torch.tensor([2., 4.])
    tensor([5., 7.])
    """

    def __init__(self, makes: Sequence[tuple[float, Callable[[], LinearOperator]]]) -> None:
        self._makes = list(makes)
        first = self._makes[0][1]()  # tells the shape, and waits for the first product
        super().__init__(first.shape[0], first.dtype, first.device)
        self._first: list[LinearOperator] = [first]
        self.approximate = first.approximate

    def _product(self, x: Tensor) -> Tensor:
        return self._sum(lambda A: (A @ x,))[0]

    def _products(self, X: Tensor) -> Tensor:
        return self._sum(lambda A: (A @ X,))[0]

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product, cross = self._sum(lambda A: A.joint(x))
        return product, cross

    def _exact(self, x: Tensor) -> Tensor:
        return self._sum(lambda A: (A.exact(x),))[0]

    def _sum(self, product: Callable[[LinearOperator], Sequence[Tensor]]) -> list[Tensor]:
        total: list[Tensor] = []
        for i, (weight, make) in enumerate(self._makes):
            # No name for the operator here: it would live on while the next one is made.
            parts = product(self._first.pop() if i == 0 and self._first else make())
            if weight != 1:
                parts = [weight * part for part in parts]
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else list(parts)
        return total
