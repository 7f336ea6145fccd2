"""A twin of the inner optimizer over other tensors, and parameters that lend their place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .facts import needs_closure

State = list[dict[str, Any]]  # of an optimizer, for each inner parameter


@contextmanager
def standing_in(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, each tensor holds the memory of its value; outside, its own again.

    The objects stay, so closures see the values, and no version counter moves: graphs that hold
    the tensors, such as that of the validation loss, stay good.
    """
    own = [t.data for t in tensors]
    try:
        for t, value in zip(tensors, values, strict=True):
            t.data = value.data
        yield
    finally:
        for t, value in zip(tensors, own, strict=True):
            t.data = value


@contextmanager
def own_grads(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens to ``.grad`` inside, outside it is the same object again."""
    own = [t.grad for t in tensors]
    try:
        for t in tensors:
            t.grad = None
        yield
    finally:
        for t, grad in zip(tensors, own, strict=True):
            t.grad = grad


def twin(optimizer: Optimizer, places: Mapping[int, Tensor], state: State) -> Optimizer:
    """A copy of ``optimizer`` over other tensors: ``places[id(p)]`` for p.

    Args:
        state: for each of ``places``, in order; becomes the twin's own.
    """

    def swapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return places.get(id(value), value)
        if isinstance(value, list):
            return [swapped(v) for v in value]
        return value

    copy: Optimizer = object.__new__(type(optimizer))
    # Not `step`: learning rate schedulers wrap it in the original's.
    copy.__dict__.update({k: swapped(v) for k, v in vars(optimizer).items() if k != "step"})
    copy.defaults = dict(optimizer.defaults)
    copy.param_groups = [
        {name: swapped(value) if name == "params" else value for name, value in group.items()}
        for group in optimizer.param_groups
    ]
    copy.state = defaultdict(dict)
    for place, entries in zip(places.values(), state, strict=True):
        if entries:
            copy.state[place] = entries
    return copy


def take_step(optimizer: Optimizer, gradients: Callable[[], Tensor]) -> None:
    """One step of a twin; ``gradients`` puts them in place."""
    step = type(optimizer).step
    if needs_closure(optimizer):
        step(optimizer, gradients)  # type: ignore[arg-type]
    else:
        gradients()
        with torch.no_grad():
            step(optimizer)


def step_hooks(optimizer: Optimizer) -> bool:
    """Whether anything is registered to run before or after the optimizer's step."""
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return any(getattr(optimizer, kind, None) for kind in kinds)
