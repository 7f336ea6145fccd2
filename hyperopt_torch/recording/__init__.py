"""The inner step on record: the closure, its world, and how to evaluate it again."""

from .again import OUTSIDE, World, again, check_repeatable, same_loss
from .age import older, reaches, sequence_number
from .closure import Evaluation, PerSample, TrainLoss, evaluate
from .freeze import FrozenClosure
from .objective import InnerObjective, weights
from .restore import Restoring, settled
from .rows import sample_rows
from .step import Record, Recorder, State, copied, settings_now
from .streams import StreamReader, Streams, shared

__all__ = [
    "OUTSIDE",
    "Evaluation",
    "FrozenClosure",
    "InnerObjective",
    "PerSample",
    "Record",
    "Recorder",
    "Restoring",
    "State",
    "StreamReader",
    "Streams",
    "TrainLoss",
    "World",
    "again",
    "check_repeatable",
    "copied",
    "evaluate",
    "older",
    "reaches",
    "same_loss",
    "sample_rows",
    "sequence_number",
    "settings_now",
    "settled",
    "shared",
    "weights",
]
