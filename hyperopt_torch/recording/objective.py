"""The inner objective at the current parameters, whatever it was given as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .again import PlainWorld, World, again, again_in_the_present
from .closure import Evaluation, TrainLoss
from .step import Record


class InnerObjective:
    """f = Σ w_i f_i: the micro-batches of one inner step, or a single loss.

    Attributes:
        terms: (w_i, evaluation of f_i) for each; evaluated inside ``world``.
        world: the context around everything that evaluates or differentiates them.
        plain_world: the same where they are differentiated only once.
        repeatable: whether it can be evaluated more than once.
    """

    def __init__(
        self,
        terms: Sequence[tuple[float, Callable[..., Evaluation]]],
        world: World,
        repeatable: bool = True,
        plain_world: PlainWorld | None = None,
    ) -> None:
        self.terms, self.world, self.repeatable = list(terms), world, repeatable
        self.plain_world = plain_world or world

    @classmethod
    def on_record(cls, records: Sequence[Record], device: torch.device) -> InnerObjective:
        """The records of one inner step: the mean, or Σ w_i f_i where weights were given."""
        pairs = zip(weights(records), records, strict=True)
        terms = [(weight, partial(again, record)) for weight, record in pairs]
        return cls(terms, World(records, device), plain_world=PlainWorld(records))

    @classmethod
    def given(cls, train_loss: TrainLoss, device: torch.device) -> InnerObjective:
        """A closure, several whose mean is meant, or the loss itself, in the world as it is."""
        several = isinstance(train_loss, list)
        losses: list[Any] = train_loss if isinstance(train_loss, list) else [train_loss]
        if several and not (losses and all(map(callable, losses))):
            raise TypeError(
                "A list for the training loss must hold closures, one for each micro-batch."
            )
        terms = [(1 / len(losses), partial(again_in_the_present, loss)) for loss in losses]
        return cls(terms, World([], device), all(map(callable, losses)))


def weights(records: Sequence[Record]) -> list[float]:
    """The weights as given; 1/M each where none was.

    Raises:
        ValueError: some have a weight and some have none.
    """
    known = [record.weight for record in records if record.weight is not None]
    if not known:
        return [1 / len(records)] * len(records)
    if len(known) < len(records):
        raise ValueError(
            f"{len(known)} of {len(records)} micro-batches of an inner step were recorded with a "
            "weight: give all of them one, record(closure, weight), or none for their mean."
        )
    return known
