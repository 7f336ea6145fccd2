"""The generalized Gauss-Newton matrix, by backward passes through the live graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .._refusals import explained_refusals
from ..errors import check_count
from ..inner_gradient import InnerGradient
from ..operators import LinearOperator
from .base import MEMORY, BatchedOperator, Curvature, automatic_chunk


class NoGaussNewton(RuntimeError):
    """There is no Gauss-Newton matrix of this loss and these outputs."""


class GaussNewton(Curvature):
    """G = J_oᵀ F_oo J_o + J_oᵀ F_oθ + F_θo J_o + F_θθ, for a loss f = F(o(θ, φ), θ, φ).

    The Hessian without Σ F_o ∂²o/∂θ², the curvature of the model. Positive semidefinite where F is
    convex in (o, θ), such as a cross-entropy or a square of the outputs, with weights >= 0, plus a
    convex penalty on θ: whatever reaches the loss past the outputs counts exactly. Equal to the
    Hessian for models linear in θ. The cross product Jᵀx stays that of f.

    The training closure returns ``(loss, outputs)``: o is the tensor that the loss was computed
    from, or a pytree of them.

    Args:
        chunk_size: columns of an (n, k) product in one batched backward pass, chosen as for
            :class:`Hessian` if None.

    Raises:
        ValueError: ``chunk_size`` < 1.
        RuntimeError: from :meth:`operator`, where the closure returned no outputs, or such that θ
            does not act on the loss through them, or acts only linearly.

    Cost: two backward passes a product, through the graph of ∇f and through that of f: 0.7 to 1.0
    times a Hessian product (measured), joint or not; no second evaluation of the model.

    Example:
        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> o = w**2
        >>> gradient = InnerGradient(((o - 5) ** 2 / 2).sum(), [w], [], o)
        >>> GaussNewton().operator(gradient).dense()  # o'² = 16; the Hessian is 16 + (o - 5) o''
        tensor([[16.]])

    Reference: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent,
    Neural Computation 2002.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        self.chunk_size = chunk_size

    def operator(self, inner_gradient: InnerGradient) -> LinearOperator:
        return _GaussNewtonOperator(inner_gradient, self.chunk_size)


class _GaussNewtonOperator(BatchedOperator):
    """Gx = d/dθ (⟨F_o, J_o x⟩ + ⟨F_θ, x⟩) with J_o x held constant.

    F_o and F_θ are partial derivatives, each with the other argument of F held; d/dθ is total, it
    goes through o as well. So one backward pass makes all four terms of G.
    """

    approximate = True

    def __init__(self, gradient: InnerGradient, chunk_size: int | None) -> None:
        super().__init__(gradient, chunk_size)
        carriers, direct = gradient.carriers, _direct_parameters(gradient)
        if not carriers:
            raise NoGaussNewton(_diagnosis(gradient))
        with _held(gradient.output_tensors), explained_refusals():
            partials = torch.autograd.grad(
                gradient.scaled_loss, [*carriers, *direct], create_graph=True, allow_unused=True
            )
        self._F_o = partials[: len(carriers)]
        if not _depend(self._F_o, carriers):
            raise NoGaussNewton(_diagnosis(gradient))
        known = dict(zip(map(id, direct), partials[len(carriers) :], strict=True))
        self._F_theta = [known.get(id(p)) for p in gradient.inner]  # None: only through o

    def _product(self, x: Tensor) -> Tensor:
        x, t = self.gradient.lift(x)
        return self.gradient.lower(self._pull(self.gradient.push(x), x), t)

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, t = self.gradient.lift(x)
        tangents, cross = self.gradient.push_and_cross(x)
        lower = self.gradient.lower
        return lower(self._pull(tangents, x), t), lower(cross, t)

    def _exact(self, x: Tensor) -> Tensor:
        return self.gradient.hessian_product(x)

    def _batch(self, rows: Tensor) -> Tensor:
        rows, t = self.gradient.lift(rows)
        tangents = self.gradient.push(rows, batched=True)
        return self.gradient.lower(self._pull(tangents, rows, batched=True), t)

    def _automatic_chunk(self) -> int:
        return automatic_chunk(self.gradient, MEMORY)

    def _pull(self, tangents: Sequence[Tensor | None], x: Tensor, batched: bool = False) -> Tensor:
        layout = self.gradient.layout
        directions = [*tangents, *layout.unflatten(x)]
        pairs = [
            (F, v)
            for F, v in zip([*self._F_o, *self._F_theta], directions, strict=True)
            if _has_graph(F) and v is not None
        ]
        with explained_refusals(sparse=not batched):
            products = torch.autograd.grad(
                [F for F, _ in pairs],
                self.gradient.inner,
                [v for _, v in pairs],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        return layout.flatten(products, batched=batched)


def _has_graph(F: Tensor | None) -> TypeGuard[Tensor]:
    """Whether there is anything to differentiate: a constant has no second derivative."""
    return F is not None and F.requires_grad


def _direct_parameters(gradient: InnerGradient) -> list[Tensor]:
    """The inner parameters that reach the loss past the outputs, as those in a penalty do."""
    outputs = gradient.output_tensors
    reached = _leaves([gradient.scaled_loss], past=outputs) - {id(o) for o in outputs}
    return [p for p in gradient.inner if id(p) in reached]


def _leaves(roots: Sequence[Tensor], past: Sequence[Tensor] = ()) -> set[int]:
    """The ids of the leaf tensors from which a way leads to ``roots`` past the given tensors."""
    closed = {(t.grad_fn, t.output_nr) for t in past}
    todo: list[tuple[Any, int]] = [(t.grad_fn, t.output_nr) for t in roots]
    seen: set[Any] = set()
    found = set()
    while todo:
        node, number = todo.pop()
        if node is None or node in seen or (node, number) in closed:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            found.add(id(node.variable))
        todo.extend(node.next_functions)
    return found


@contextmanager
def _held(outputs: Sequence[Tensor]) -> Iterator[None]:
    """Backward passes inside end at the outputs: what they give is a derivative with o held.

    The gradient that would enter the model becomes undefined, for which autograd's nodes do no
    work; a zero would cost a backward pass, and its graph as much again in each product. A
    gradient *at* an output is read before the hook.
    """
    numbers: dict[Any, set[int]] = {}
    for o in outputs:
        if o.grad_fn is not None:
            numbers.setdefault(o.grad_fn, set()).add(o.output_nr)

    def ending(at: set[int]) -> Callable[[tuple[Tensor, ...]], tuple[Tensor | None, ...]]:
        return lambda grads: tuple(None if i in at else g for i, g in enumerate(grads))

    handles = [node.register_prehook(ending(at)) for node, at in numbers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _depend(tensors: Sequence[Tensor | None], on: Sequence[Tensor]) -> bool:
    """Whether any of ``tensors`` depends on any of ``on``, as far as the graph tells."""
    live = [t for t in tensors if _has_graph(t)]
    if not live:
        return False
    products = torch.autograd.grad(live, on, live, retain_graph=True, allow_unused=True)
    return any(p is not None for p in products)


def _diagnosis(gradient: InnerGradient) -> str:
    """Why J_oᵀ F_oo J_o, the very point of the matrix, would be zero."""
    outputs, nodes = gradient.output_tensors, set(gradient.nodes)
    if not outputs:
        found = any(isinstance(t, Tensor) for t in tree_flatten(gradient.outputs)[0])
        return (
            "GaussNewton() needs the model's outputs: return (loss, outputs) from the training "
            "closure" + (", the outputs with their graph; these are detached." if found else ".")
        )
    if all(o.grad_fn not in nodes for o in outputs):
        return (
            "GaussNewton(): the training loss was not computed from the outputs that were returned "
            "with it. Return (loss, outputs) with the very tensor that went into the loss, not a "
            "copy, and not that of a second call of the model."
        )
    if not _leaves(outputs) & {id(p) for p in gradient.inner}:
        return (
            "GaussNewton(): the outputs that the training closure returned depend on none of the "
            "inner parameters. Return (loss, outputs) with what the model made of them."
        )
    return (
        "GaussNewton(): the training loss is linear in the outputs that were returned with it, so "
        "their Gauss-Newton matrix is zero. Return (loss, outputs) with what goes into the loss "
        "function (logits, predictions), not the losses; for a linear loss use Hessian()."
    )
