"""Which processes share an inner problem."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._tensors import is_sharded
from ..recording import Record
from .group import Group
from .shards import Shards, check_outer

_UNKNOWN = (
    "torch.distributed runs {world} processes, and it cannot be known whether they share this "
    "inner problem: its module is no DistributedDataParallel. Pass process_group="
    "torch.distributed.group.WORLD to BilevelOptimizer if they do (each process holds all "
    "parameters and its own batch, and gradients are averaged), or process_group=False if each "
    "solves its own problem."
)


def group_of(
    wanted: Any,
    modules: Iterable[nn.Module],
    inner: Sequence[Tensor],
    outer: Sequence[Tensor],
) -> Group | None:
    """The processes that share the inner problem; None for this one alone.

    Args:
        wanted: a process group; False for none; None to find out.
        modules: those that the training closure calls.
        inner, outer: θ and φ.

    Raises:
        RuntimeError: it cannot be known; or parameters are in parts in a way that is not supported.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        if wanted:
            raise RuntimeError(
                "process_group was given, but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group first."
            )
        return None
    found = list(modules)
    check_outer(outer)
    if any(map(is_sharded, inner)):
        return Shards(inner, found)
    if wanted is False:
        return None
    if wanted is not None:
        group = Group(wanted)
        return group if group.size > 1 else None
    world = distributed.get_world_size()
    if world == 1:
        return None
    for module in found:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            group = Group(module.process_group)
            return group if group.size > 1 else None
    raise RuntimeError(_UNKNOWN.format(world=world))


class Processes:
    """Those that share an inner problem; known once its modules have been called.

    Args:
        wanted: as for :func:`group_of`.
        averages: whether the estimator can average over a group.
        name: of the estimator, for the error.

    Attributes:
        group: as last found; None: this process alone.
    """

    def __init__(self, wanted: Any, averages: bool, name: str) -> None:
        self._wanted, self._averages, self._name = wanted, averages, name
        self.forget()

    def forget(self) -> None:
        """Looks anew next time."""
        self.group: Group | None = None
        self._seen: bool | None = None  # whether modules were known when it was found

    def of(
        self, records: Sequence[Record], inner: Sequence[Tensor], outer: Sequence[Tensor]
    ) -> Group | None:
        """Those that share the closures on record, with inner and outer parameters.

        Raises:
            RuntimeError: it cannot be known; the estimator does not average; or gradients would
                not be those of all.
        """
        modules = [module for record in records for module in record.modules]
        if self._seen != bool(modules):
            group = group_of(self._wanted, modules, inner, outer)
            if group is not None and not self._averages:
                raise RuntimeError(
                    f"{self._name} does not average over processes: each would get another "
                    "hypergradient. Use ImplicitDifferentiation(...), or one process."
                )
            self.group, self._seen = group, bool(modules)
        if self.group is not None:
            self.group.check()
        return self.group
