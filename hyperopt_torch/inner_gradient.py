"""The graph of ∇f, differentiated once more for every product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ._graph import (
    check_gradient_graph,
    check_twice_differentiable,
    graph_bytes,
    graph_dtypes,
    graph_nodes,
)
from ._half import Range
from ._refusals import explained_refusals
from ._tensors import FlatLayout, trainable


class InnerGradient:
    """∇_θ f as a live graph: built once, it serves every product with H and with Jᵀ.

    Args:
        loss: the scalar inner objective f, its graph alive.
        inner: the inner parameters θ, n entries in all.
        outer: the outer parameters φ, h entries in all.
        outputs: the model's outputs o on the way to ``loss``, any pytree, for curvatures that need
            them.
        scale: what f is multiplied by before it is differentiated, such as a ``GradScaler``'s
            scale; divided out of everything again. Where f computes in float16, a better one is
            found from there.

    Attributes:
        output_tensors: the tensors among ``outputs`` that carry a graph, each once.
        scaled_loss: f times the scale that was chosen.
        gradient: (n,) ∇f, without its graph.
        used: for each inner parameter, whether f depends on it.
        carriers: those through which θ acts on f, the constant ∂f/∂o of a linear f apart.
        precision: machine epsilon of the coarsest dtype that f computes in; None where it is not
            coarser than that of the vectors.

    Raises:
        RuntimeError: f depends on no inner parameter, or its graph has no second derivative.

    Cost: one gradient of f, its graph kept for as long as the object lives; in float16 one gradient
    more, and a sync.
    """

    def __init__(
        self,
        loss: Tensor,
        inner: Sequence[Tensor],
        outer: Sequence[Tensor],
        outputs: Any = None,
        scale: Tensor | float = 1.0,
    ) -> None:
        self.outputs = outputs
        self.output_tensors = trainable(t for t in tree_flatten(outputs)[0] if _is_tensor(t))
        self.inner, self.outer = list(inner), list(outer)
        self.layout, self.outer_layout = FlatLayout(self.inner), FlatLayout(self.outer)
        self.nodes = graph_nodes(loss)
        check_twice_differentiable(self.nodes, self.inner)
        dtypes = graph_dtypes(self.nodes) | set(self.layout.dtypes)
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
        self.precision = coarsest if coarsest > torch.finfo(self.layout.dtype).eps else None
        self._range = Range(loss, self.inner, self.layout, dtypes, scale)
        self.scaled_loss = self._range.scaled_loss
        with _marked(self.output_tensors) as marks, explained_refusals():
            grads = torch.autograd.grad(
                self.scaled_loss, self.inner, create_graph=True, allow_unused=True
            )
        if all(g is None for g in grads):
            raise RuntimeError(
                "The training loss depends on none of the inner parameters: does the inner "
                "optimizer hold the parameters of the model that the closure calls?"
            )
        check_gradient_graph([g for g in grads if g is not None], self.nodes)
        self.gradient = self.lower(self.layout.flatten(grads).detach(), None)  # (n,)
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

    def lift(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(tx, t): the vector as it may enter the graph, for :meth:`push` and the like."""
        return self._range.lift(x)

    def lower(self, y: Tensor, t: Tensor | None) -> Tensor:
        """What the graph made of a lifted vector, for the vector itself and for f itself."""
        return self._range.lower(y, t)

    def _pull(self, x: Tensor, wrt: list[Tensor], batched: bool = False) -> Sequence[Tensor | None]:
        if not self._grads or not wrt:
            return [None] * len(wrt)
        parts = self.layout.unflatten(x)
        # Columns that cannot be batched, as those of a sparse gradient, are looped by the caller.
        with explained_refusals(sparse=not batched):
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
        x, t = self.lift(x)
        return self.lower(self.layout.flatten(self._pull(x, self.inner)), t)

    def hessian_products(self, rows: Tensor) -> Tensor:
        """(k, n) rows -> (k, n) rows of products, in one batched backward pass."""
        rows, t = self.lift(rows)
        products = self._pull(rows, self.inner, batched=True)
        if all(p is None for p in products):
            return torch.zeros_like(rows)
        return self.lower(self.layout.flatten(products, batched=True), t)

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(Hx, Jᵀx): (n,) -> (n,), (h,), from one backward pass."""
        x, t = self.lift(x)
        products = self._pull(x, self._both)
        split = len(self.inner)
        product = self.layout.flatten(products[:split])
        return self.lower(product, t), self.lower(self._flatten_cross(products[split:]), t)

    def cross(self, x: Tensor) -> Tensor:
        """Jᵀx: (n,) -> (h,)."""
        x, t = self.lift(x)
        return self.lower(self._flatten_cross(self._pull(x, self.outer)), t)

    def push(self, x: Tensor, batched: bool = False) -> Sequence[Tensor | None]:
        """J_o x of a lifted x, for each of :attr:`carriers`: (n,) -> its shape.

        With ``batched`` (k, n) rows -> (k, *shape).
        """
        return self._pull(x, self._marks, batched)  # ∇f = J_oᵀ mark + ..., and marks are free in it

    def push_and_cross(self, x: Tensor) -> tuple[Sequence[Tensor | None], Tensor]:
        """(J_o x, Jᵀx) of a lifted x, neither lowered: (n,) -> (as :meth:`push`, (h,))."""
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
