"""The state of a run whose parameters are in parts over several processes.

torch.distributed.checkpoint takes plain tensors of one name for copies of each other, and fills
only what is there already, as the state of a new optimizer is not. So each process packs what it
holds into one object, under a name of its own.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._tensors import here, is_sharded

_PART = "part of a sharded tensor"


def packed(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The state of this process as one entry, named by its place among the others."""
    buffer = io.BytesIO()
    torch.save(_mapped(state, lambda t: {_PART: here(t)} if is_sharded(t) else t), buffer)
    return {_name(parameter): buffer.getvalue()}


def unpacked(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """What :func:`packed` was given, but for its sharded tensors: see :func:`joined`.

    Raises:
        ValueError: it is the state of another number of processes, or none.
    """
    name = _name(parameter)
    if name not in state:
        raise ValueError(
            f"The state has no {name!r}: parameters in parts need a state of as many processes. "
            f"It has {', '.join(map(repr, state))}."
        )
    found: dict[str, Any] = torch.load(io.BytesIO(state[name]), weights_only=True)
    return found


def joined(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state, parts of tensors as sharded tensors again, as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def whole(entry: Any, like: Any) -> Any:
        if not (isinstance(entry, dict) and _PART in entry):
            return entry
        kind: Any = type(like.data)
        return kind.from_local(
            entry[_PART].to(like.device),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    entries = {
        number: {name: whole(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": entries}


def _name(parameter: Any) -> str:
    mesh = parameter.device_mesh
    return f"process {mesh.get_local_rank()} of {mesh.size()}"


def _mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(value, change) for value in tree)
    return tree
