"""The inner step on record: what it takes to take it again."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .world import Buffers, RandomState

State = list[dict[str, Any]]  # of an optimizer, for each inner parameter


@dataclass(frozen=True)
class RecordedStep:
    """What it takes to take an inner step again.

    Attributes:
        closure: the training closure, with the variables that it named at that time.
        loss: its value, detached.
        random, buffers: the random streams and the modules' buffers before it ran.
        settings: the parameter groups without their parameters.
        parameters: copies of the inner parameters before the step; None where nobody needs them.
        state: a copy of the inner optimizer's state before the step; None likewise.
    """

    closure: Callable[[], Any]
    loss: Tensor
    random: RandomState
    buffers: Buffers
    settings: list[dict[str, Any]]
    parameters: list[Tensor] | None
    state: State | None


def settings_now(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group; schedulers fill tensors in place, hence copies.

    Learned hyperparameters stay themselves: they are what a replay may vary.
    """
    return {
        name: value.clone() if isinstance(value, Tensor) and not value.requires_grad else value
        for name, value in group.items()
        if name != "params"
    }


def frozen(closure: Callable[[], Any]) -> Callable[[], Any]:
    """The closure with its variables as they are now.

    A loop that says ``inner_step(lambda: train_loss(x, y))`` changes x and y under the closures
    of earlier steps; each is to see its own batch again.
    """
    if not isinstance(closure, types.FunctionType):
        return closure
    scope = dict(closure.__globals__)  # whole: what is defined inside reads it too
    cells = tuple(types.CellType(*_content(cell)) for cell in closure.__closure__ or ())
    twin = types.FunctionType(
        closure.__code__, scope, closure.__name__, closure.__defaults__, cells
    )
    twin.__kwdefaults__ = closure.__kwdefaults__
    return twin


def _content(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not assigned yet
        return ()


def copied(value: Any) -> Any:
    """Containers rebuilt and tensors cloned; everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(v) for v in value)
    return value
