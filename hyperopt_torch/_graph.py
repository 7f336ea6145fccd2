"""Walks over autograd graphs, and refusals in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


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
        raise


def graph_nodes(root: Tensor) -> list[Any]:
    """All nodes of the autograd graph below ``root``, each once."""
    found: list[Any] = []
    todo = [root.grad_fn]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.append(node)
        todo.extend(parent for parent, _ in node.next_functions)
    return found


def graph_leaves(nodes: list[Any]) -> list[Tensor]:
    """The tensors at the ends of a graph."""
    return [node.variable for node in nodes if hasattr(node, "variable")]


def graph_bytes(nodes: list[Any]) -> int:
    """About the memory of the tensors that one backward pass through ``nodes`` makes."""
    total = 0
    for node in nodes:
        for meta in getattr(node, "_input_metadata", ()):
            shape = tuple(meta.shape)
            if all(isinstance(size, int) for size in shape):
                total += torch.Size(shape).numel() * meta.dtype.itemsize
    return total


def check_twice_differentiable(nodes: list[Any]) -> None:
    """RuntimeError, with the remedy, for a graph through which no Hessian product can go."""
    for node in nodes:
        name = node.name()
        if "CompiledFunction" in name:
            raise RuntimeError(
                "The training loss went through torch.compile, whose graph has no second "
                "derivative (some versions return zeros in silence). Evaluate the uncompiled "
                "module in the training closure: it is `model._orig_mod`, or the module you passed "
                "to torch.compile; the validation loss may stay compiled."
            )
        if "ScaledDotProduct" in name and "Math" not in name:
            raise RuntimeError(
                f"The training loss went through fused attention ({name}), which has no second "
                "derivative. Choose the MATH backend in the training closure: `with "
                "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): ...`."
            )
