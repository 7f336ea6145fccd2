"""A twin of the inner optimizer over other tensors, and parameters that lend their place."""

from __future__ import annotations

import weakref
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


def twin(optimizer: Optimizer, places: Mapping[int, Tensor], state: State) -> Optimizer:
    """A copy of ``optimizer`` over other tensors: ``places[id(p)]`` for p.

    Args:
        state: for each of ``places``, in order; becomes the twin's own, for its own parameters.
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
    own = {id(q) for group in copy.param_groups for q in group["params"]}
    for place, entries in zip(places.values(), state, strict=True):
        if entries and id(place) in own:
            copy.state[place] = entries
    return copy


def take_step(twins: Sequence[Optimizer], gradients: Callable[[], Tensor]) -> None:
    """One step of each twin; ``gradients`` puts them in place, for all of them at once."""
    closures = [optimizer for optimizer in twins if needs_closure(optimizer)]
    if closures:
        (optimizer,) = twins  # a line search over several optimizers means nothing
        _step(optimizer)(optimizer, gradients)
        return
    gradients()
    with torch.no_grad():
        for optimizer in twins:
            _step(optimizer)(optimizer)


def _step(optimizer: Optimizer) -> Callable[..., Any]:
    return type(optimizer).step


def step_hooks(optimizer: Optimizer) -> bool:
    """Whether a user's hooks run around the optimizer's step; the library's own do not count."""
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooks = [hook for kind in kinds for hook in getattr(optimizer, kind, {}).values()]
    return not all(isinstance(hook, StepHook) for hook in hooks)


class StepHook:
    """The library's own hook around the steps of one optimizer; twins of it do not count.

    Args:
        optimizer: whose steps; a twin shares its hooks.
        tell: called at each of them, with whether the step was given a closure.
    """

    def __init__(self, optimizer: Optimizer, tell: Callable[[Optimizer, bool], None]) -> None:
        self._optimizer, self._tell = weakref.ref(optimizer), tell

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self._optimizer():
            given = [*args, *kwargs.values()]  # the first of args is the optimizer
            self._tell(optimizer, any(callable(v) for v in given if v is not optimizer))
