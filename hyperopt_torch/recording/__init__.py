"""The inner step on record: the closure, its world, and how to evaluate it again."""

from .again import again, check_repeatable, earliest, same_loss
from .closure import Evaluation, PerSample, TrainLoss, evaluate
from .step import RecordedStep, State, copied, frozen, settings_now
from .world import (
    BufferCopy,
    Buffers,
    RandomState,
    buffers_at,
    random_state,
    recorded_buffers,
    set_random_state,
    without_side_effects,
)

__all__ = [
    "BufferCopy",
    "Buffers",
    "Evaluation",
    "PerSample",
    "RandomState",
    "RecordedStep",
    "State",
    "TrainLoss",
    "again",
    "buffers_at",
    "check_repeatable",
    "copied",
    "earliest",
    "evaluate",
    "frozen",
    "random_state",
    "recorded_buffers",
    "same_loss",
    "set_random_state",
    "settings_now",
    "without_side_effects",
]
