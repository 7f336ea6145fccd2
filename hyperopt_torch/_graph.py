"""Walks over autograd graphs, and refusals in words that say what to do."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ._refusals import hides, hiding, operation_of_error_node, refusal, refused_operation


@contextmanager
def explained(*, freed: str, moved: str) -> Iterator[None]:
    """Autograd's words for a graph that was freed, or whose parameters have moved, as a remedy."""
    try:
        yield
    except RuntimeError as error:
        if "second time" in str(error):
            raise RuntimeError(freed) from error
        if "modified by an inplace operation" in str(error):
            raise RuntimeError(moved) from error
        if "donated buffers" in str(error):
            raise RuntimeError(
                "The graph of the validation loss went through torch.compile and serves one "
                "backward pass only, but a pure query keeps it: call outer_step, or compute the "
                "validation loss for hypergradient() with the module that is not compiled."
            ) from error
        raise


def graph_nodes(*roots: Tensor, past: Iterable[Any] = ()) -> list[Any]:
    """All nodes of the autograd graph below ``roots``, each once, but for those in ``past``."""
    seen = {None, *past}
    found: list[Any] = []
    for root in roots:
        if root.grad_fn not in seen:
            seen.add(root.grad_fn)
            found.append(root.grad_fn)
    return _below(found, seen)


def _below(found: list[Any], seen: set[Any]) -> list[Any]:
    for node in found:  # it grows on the way
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                found.append(parent)
    return found


def graph_leaves(nodes: Iterable[Any]) -> list[Tensor]:
    """The tensors at the ends of a graph."""
    return [node.variable for node in nodes if hasattr(node, "variable")]


def graph_dtypes(nodes: Iterable[Any]) -> set[torch.dtype]:
    """The dtypes that a graph computes in."""
    return {meta.dtype for node in nodes for meta in getattr(node, "_input_metadata", ())}


def graph_bytes(nodes: list[Any]) -> int:
    """About the memory of the tensors that one backward pass through ``nodes`` makes."""
    total = 0
    for node in nodes:
        for meta in getattr(node, "_input_metadata", ()):
            shape = tuple(meta.shape)
            if all(isinstance(size, int) for size in shape):
                total += torch.Size(shape).numel() * meta.dtype.itemsize
    return total


def check_differentiable(loss: Tensor, which: str = "validation") -> None:
    """RuntimeError for a loss whose parameters are hidden from ``torch.autograd.grad``.

    It would return None for them, and no error: a silent zero. A python Function is known by its
    code: one that leaves the backward pass to a helper is not found.
    """
    for node in _each_kind(graph_nodes(loss)):
        if hides(node):
            raise hiding(which, node.name())


def check_twice_differentiable(nodes: list[Any], towards: Sequence[Tensor] | None = None) -> None:
    """RuntimeError, with the remedy, for a graph through which no Hessian product can go.

    Args:
        nodes: of the training loss.
        towards: the tensors that matter; all if None. What leads to none of them, as an outer
            model does whose outputs are constants for θ, is differentiated only once.
    """
    for node in _each_kind(nodes):
        if hides(node):
            raise hiding("training", node.name())
        operation = refused_operation(node)
        if operation is not None and (towards is None or _leads_to(nodes, type(node), towards)):
            raise refusal(operation)


def check_gradient_graph(grads: Iterable[Tensor], nodes: list[Any]) -> None:
    """RuntimeError, with the remedy, where a part of ∇f is there only to refuse a derivative.

    Autograd looks for ways from ∇f to θ, and finds none through the places that
    ``once_differentiable`` leaves: with ``allow_unused=True`` their part would be zero in silence.

    Args:
        grads: ∇f, its graph alive.
        nodes: of f, which need no second look.
    """
    for node in _each_kind(graph_nodes(*grads, past=nodes)):
        operation = operation_of_error_node(node)
        if operation is not None:
            raise refusal(operation)


def _each_kind(nodes: Iterable[Any]) -> Iterable[Any]:
    """One node of each kind: a graph has a hundred nodes of twenty."""
    return {(type(node), node.name()): node for node in nodes}.values()


def _leads_to(nodes: list[Any], kind: type, towards: Sequence[Tensor]) -> bool:
    wanted = set(map(id, towards))
    found = [node for node in nodes if type(node) is kind]
    return any(id(leaf) in wanted for leaf in graph_leaves(_below(found, {None, *found})))


def short_way_is_safe(nodes: list[Any], inner: Sequence[Tensor], outer: Sequence[Tensor]) -> bool:
    """Whether ``loss.backward(inputs=inner)`` does to θ what the plain ``loss.backward()`` does.

    The short way runs the nodes that lead to θ, in the same order, and leaves out the rest. So it
    is the same unless what it leaves out does something besides filling ``.grad`` of φ:

    - a custom Function, in python or C++, may do anything: run a backward pass of its own, as a
      reentrant checkpoint does, whose parameters are not in this graph; reduce gradients (FSDP);
      count. A compiled one too. Modules with backward hooks have such nodes.
    - a leaf that is neither in θ nor in φ gets its ``.grad`` from the plain way alone.
    - hooks on φ are called by the plain way alone.

    Hooks on other tensors on the way to φ alone cannot be seen from here; they see nothing of θ.

    Cost: about 0.2 µs a node.
    """
    theta, phi = set(map(id, inner)), set(map(id, outer))
    for node in nodes:
        kind = _kind(type(node))  # type: ignore[arg-type]
        if kind == "opaque":
            return False
        if kind == "leaf":
            leaf = node.variable
            if id(leaf) not in theta and (id(leaf) not in phi or _hooks(leaf)):
                return False
    return True


@functools.lru_cache(maxsize=1024)
def _kind(node: type) -> str:
    """What is known about a node by its type: "leaf", "opaque" (it may do anything) or "plain"."""
    if node.__name__ == "AccumulateGrad":
        return "leaf"
    opaque = node.__name__ == "CppFunction" or issubclass(node, BackwardCFunction)
    return "opaque" if opaque else "plain"


def _hooks(tensor: Tensor) -> list[Any]:
    """The hooks of a tensor as the dictionaries that autograd itself holds; those there are."""
    both = (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
    return [hooks for hooks in both if hooks]


@contextmanager
def without_parameter_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, hooks on these leaves do not act: they are about the training step, such as clipping.

    Autograd holds the very dictionary that ``register_hook`` writes to, so it is emptied in place,
    and refilled in order at the end, whatever interrupts. Hooks that were registered or removed
    inside are as they were.
    """
    found = [(hooks, list(hooks.items())) for tensor in tensors for hooks in _hooks(tensor)]
    try:
        for hooks, _ in found:
            hooks.clear()
        yield
    finally:
        _refill(found)


def _refill(found: list[tuple[Any, list[Any]]]) -> None:
    """May be done twice without harm, so an interrupt does not cut it short: it is raised after."""
    interrupt: BaseException | None = None
    while found:
        try:
            while found:
                hooks, entries = found[-1]
                hooks.clear()
                hooks.update(entries)
                found.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
