"""How old the nodes of an autograd graph are, and which parameters the old ones reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def _make_a_node() -> int:
    with torch.enable_grad():
        node: Any = torch.empty(0, requires_grad=True).view(0).grad_fn
    return int(node._sequence_nr()) + 1


_peek = getattr(getattr(torch._C, "_autograd", None), "_get_sequence_nr", _make_a_node)


def sequence_number() -> int:
    """Nodes that this thread makes from now on have this number at least."""
    return int(_peek())


def older(nodes: Sequence[Any], number: int) -> list[Any]:
    """Those that were made before: outside of a closure that was called then."""
    return [node for node in nodes if number > node._sequence_nr()]


def reaches(nodes: Iterable[Any], parameters: Sequence[Tensor]) -> bool:
    """Whether the graph below any of ``nodes`` ends in any of ``parameters``."""
    wanted = set(map(id, parameters))
    seen, todo = set[Any](), list(nodes)
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        todo.extend(parent for parent, _ in node.next_functions)
    return False
