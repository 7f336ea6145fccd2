"""Symmetric matrices that are known by their products, and the graph of ∇f behind them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ._graph import check_twice_differentiable, graph_bytes, graph_nodes
from ._tensors import FlatLayout, inner_product, trainable


class LinearOperator(ABC):
    """A symmetric n×n matrix known by its products.

    A strategy touches vectors by ``@``, elementwise arithmetic and :meth:`inner`, nothing else:
    then it runs unchanged when vectors are sharded over processes, because only :meth:`inner`
    reduces over n.

    Attributes:
        shape, dtype, device: of the matrix.
        matvecs: products done so far; a product with k columns counts k, a joint product one.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (n, n)
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

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor: ...

    def _products(self, X: Tensor) -> Tensor:
        return torch.stack([self._product(x) for x in X.unbind(1)]).mT  # rows lie together

    @abstractmethod
    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """xᵀy in float64: (n,), (n,) -> (); (n, j), (n, k) -> (j, k). The only reduction over n."""
        return inner_product(x, y)

    def basis(self, index: Sequence[int]) -> Tensor:
        """(n, k) unit vectors E_K for the global indices K."""
        E = torch.zeros(len(index), self.shape[0], dtype=self.dtype, device=self.device)
        columns = torch.tensor(index, device=self.device)
        rows = torch.arange(len(index), device=self.device)
        return E.index_put_((rows, columns), E.new_ones(())).mT

    def take(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """Rows x[K] for the global indices K: (n,) -> (k,), (n, m) -> (k, m)."""
        return x.index_select(0, torch.tensor(index, device=x.device))

    def place(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """E_K y, the vector with y at the global indices K: (k,) -> (n,)."""
        x = torch.zeros(self.shape[0], dtype=y.dtype, device=self.device)
        return x.index_put((torch.tensor(index, device=self.device),), y)

    def dense(self) -> Tensor:
        """The (n, n) matrix, by n products: for tests and tiny problems."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)


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


class Damped(LinearOperator):
    """H + ρI; counts its products on H.

    >>> Damped(Dense(torch.eye(2)), 0.5) @ torch.tensor([2., 4.])
    tensor([3., 6.])
    """

    def __init__(self, operator: LinearOperator, damping: float) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self.operator = operator
        self.damping = damping

    def _product(self, x: Tensor) -> Tensor:
        return self._shift(self.operator @ x, x)

    def _products(self, X: Tensor) -> Tensor:
        return self._shift(self.operator @ X, X)

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product, cross = self.operator.joint(x)
        return self._shift(product, x), cross

    def _shift(self, product: Tensor, x: Tensor) -> Tensor:
        return torch.add(product, x, alpha=self.damping) if self.damping else product

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return self.operator.inner(x, y)


class Shifted(LinearOperator):
    """H + diag(d), for d of shape (n,), or () for dI; counts its products on H.

    >>> Shifted(Dense(torch.eye(2)), torch.tensor([1., 3.])) @ torch.tensor([2., 4.])
    tensor([ 4., 16.])
    """

    def __init__(self, operator: LinearOperator, shift: Tensor) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self.operator = operator
        self.shift = shift

    def _product(self, x: Tensor) -> Tensor:
        return self.operator @ x + self.shift * x

    def _products(self, X: Tensor) -> Tensor:
        return self.operator @ X + (self.shift[:, None] if self.shift.ndim else self.shift) * X

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product, cross = self.operator.joint(x)
        return product + self.shift * x, cross

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return self.operator.inner(x, y)


class InnerGradient:
    """∇_θ f as a live graph: built once, it serves every product with H and with Jᵀ.

    Args:
        loss: the scalar inner objective f, its graph alive.
        inner: the inner parameters θ, n entries in all.
        outer: the outer parameters φ, h entries in all.
        outputs: the model's outputs o on the way to ``loss``, any pytree, for curvatures that need
            them.

    Attributes:
        output_tensors: the tensors among ``outputs`` that carry a graph, each once.
        gradient: (n,) ∇f, without its graph.
        used: for each inner parameter, whether f depends on it.
        carriers: those through which θ acts on f, the constant ∂f/∂o of a linear f apart.

    Raises:
        RuntimeError: f depends on no inner parameter, or its graph has no second derivative.

    Cost: one gradient of f, its graph kept for as long as the object lives.
    """

    def __init__(
        self,
        loss: Tensor,
        inner: Sequence[Tensor],
        outer: Sequence[Tensor],
        outputs: Any = None,
    ) -> None:
        self.loss, self.outputs = loss, outputs
        self.precision: float | None = None
        self.output_tensors = trainable(t for t in tree_flatten(outputs)[0] if _is_tensor(t))
        self.inner, self.outer = list(inner), list(outer)
        self.layout, self.outer_layout = FlatLayout(self.inner), FlatLayout(self.outer)
        self.nodes = graph_nodes(loss)
        check_twice_differentiable(self.nodes)
        with _marked(self.output_tensors) as marks:
            grads = torch.autograd.grad(loss, self.inner, create_graph=True, allow_unused=True)
        if all(g is None for g in grads):
            raise RuntimeError(
                "The training loss depends on none of the inner parameters: does the inner "
                "optimizer hold the parameters of the model that the closure calls?"
            )
        self.gradient = self.layout.flatten(grads).detach()  # (n,)
        self.used = [g is not None for g in grads]
        # Where ∇f does not depend on anything (a linear loss), its derivatives are zero.
        self._live = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._grads = [grads[i] for i in self._live]
        self._both = self.inner + self.outer
        carried = [
            (o, mark)
            for o, mark in zip(self.output_tensors, marks, strict=True)
            if mark is not None and mark.requires_grad
        ]
        self.carriers, self._marks = [o for o, _ in carried], [mark for _, mark in carried]
        self._reached: list[bool] | None = None  # which outer parameters Jᵀ reaches

    @cached_property
    def bytes(self) -> int:
        """About the memory of one product: that of a backward pass through ∇f."""
        # ∇f holds the forward graph and its mirror image, and both are differentiated.
        return 3 * graph_bytes(self.nodes) + self.layout.n * self.layout.dtype.itemsize

    def _pull(self, x: Tensor, wrt: list[Tensor], batched: bool = False) -> Sequence[Tensor | None]:
        if not self._grads or not wrt:
            return [None] * len(wrt)
        parts = self.layout.unflatten(x)
        result: Sequence[Tensor | None] = torch.autograd.grad(
            self._grads,
            wrt,
            [parts[i] for i in self._live],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return result

    def hessian_product(self, x: Tensor) -> Tensor:
        """Hx: (n,) -> (n,)."""
        return self.layout.flatten(self._pull(x, self.inner))

    def hessian_products(self, rows: Tensor) -> Tensor:
        """(k, n) rows -> (k, n) rows of products, in one batched backward pass."""
        products = self._pull(rows, self.inner, batched=True)
        if all(p is None for p in products):
            return torch.zeros_like(rows)
        return self.layout.flatten(products, batched=True)

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(Hx, Jᵀx): (n,) -> (n,), (h,), from one backward pass."""
        products = self._pull(x, self._both)
        split = len(self.inner)
        return self.layout.flatten(products[:split]), self._flatten_cross(products[split:])

    def cross(self, x: Tensor) -> Tensor:
        """Jᵀx: (n,) -> (h,)."""
        return self._flatten_cross(self._pull(x, self.outer))

    def push(self, x: Tensor, batched: bool = False) -> Sequence[Tensor | None]:
        """J_o x, for each of :attr:`carriers`: (n,) -> its shape, (k, n) rows -> (k, *shape)."""
        return self._pull(x, self._marks, batched)  # ∇f = J_oᵀ mark + ..., and marks are free in it

    def push_and_cross(self, x: Tensor) -> tuple[Sequence[Tensor | None], Tensor]:
        """(J_o x, Jᵀx): (n,) -> (as :meth:`push`, (h,)), from one backward pass."""
        products = self._pull(x, self._marks + self.outer)
        split = len(self._marks)
        return products[:split], self._flatten_cross(products[split:])

    def _flatten_cross(self, products: Sequence[Tensor | None]) -> Tensor:
        if self._reached is None:
            self._reached = [p is not None for p in products]
        return self.outer_layout.flatten(products)

    @property
    def reached(self) -> list[bool]:
        """For each outer parameter, whether it reaches ∇f at all (known after a cross product)."""
        if self._reached is None:
            self.cross(torch.zeros_like(self.gradient))
        assert self._reached is not None
        return self._reached


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@contextmanager
def _marked(outputs: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
    """The gradient that a backward pass inside brings to each output, as a place in its graph.

    A view, because the gradient itself may be shared: that of an addition goes to both sides, and
    a derivative with respect to it would be one with respect to both.
    """
    marks: list[Tensor | None] = [None] * len(outputs)

    def marking(i: int) -> Callable[[Tensor | None], Tensor | None]:
        def mark(gradient: Tensor | None) -> Tensor | None:
            if gradient is not None:  # None: only a sibling, such as another chunk, is used
                marks[i] = gradient.view_as(gradient)
            return marks[i]

        return mark

    handles = [
        o.register_hook(marking(i))  # type: ignore[no-untyped-call]
        for i, o in enumerate(outputs)
    ]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


class Summed(LinearOperator):
    def __init__(self, makes):
        self._makes = list(makes)
        first = self._makes[0][1]()
        super().__init__(first.shape[0], first.dtype, first.device)

    def _product(self, x):
        return sum(w * (make() @ x) for w, make in self._makes)

    def _joint(self, x):
        parts = [(w, make().joint(x)) for w, make in self._makes]
        return sum(w * p[0] for w, p in parts), sum(w * p[1] for w, p in parts)
