"""A recorded closure evaluated again, and whether it gave what it gave before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .closure import Evaluation, evaluate
from .step import RecordedStep
from .world import Buffers

_NOT_REPEATABLE = (
    "A training closure is not repeatable: called again with the same parameters and random "
    "streams, it returned another loss, or none. Does it draw its own batch, or read variables "
    "that the loop has changed since? Draw the batch before inner_step and let the closure hold "
    "it: inner_step(lambda x=x, y=y: train_loss(x, y))."
)


def again(step: RecordedStep) -> Evaluation:
    """The training loss of a step once more; whoever calls restores what it depends on."""
    try:
        return evaluate(step.closure)
    except StopIteration as error:
        raise RuntimeError(_NOT_REPEATABLE) from error


def earliest(steps: Sequence[RecordedStep]) -> Buffers:
    """The buffers of every module as they were before the first step that called it."""
    found: Buffers = {}
    for step in steps:
        for part, known in step.buffers.items():
            found.setdefault(part, known)
    return found


def same_loss(recorded: Tensor, again: Tensor) -> Tensor:
    """Whether two evaluations agree to rounding; a 0-d bool tensor."""
    tolerance = torch.finfo(recorded.dtype).eps ** 0.5
    both_nan = recorded.isnan() & again.isnan()
    agree: Tensor = (
        both_nan | ((recorded - again).abs() <= tolerance * recorded.abs()) | (recorded == again)
    )
    return agree


def check_repeatable(agree: Sequence[Tensor]) -> None:
    """RuntimeError unless every evaluation agreed with the recorded one: one sync."""
    if not bool(torch.stack(list(agree)).all()):
        raise RuntimeError(_NOT_REPEATABLE)
