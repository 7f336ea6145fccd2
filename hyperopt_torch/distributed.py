"""Several processes, each with its own batch: the answer is that of the union."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .operators import LinearOperator, Wrapping

_UNKNOWN = (
    "torch.distributed runs {world} processes, and it cannot be known whether they share this "
    "inner problem: its module is no DistributedDataParallel. Pass process_group="
    "torch.distributed.group.WORLD to BilevelOptimizer if they do (each process holds all "
    "parameters and its own batch, and gradients are averaged), or process_group=False if each "
    "solves its own problem."
)
_SHARDED = (
    "The inner parameters are sharded over several processes (FSDP, DTensor), which the products "
    "do not know of yet: each process would get another hypergradient. Keep them whole in every "
    "process (DistributedDataParallel), or run the bilevel loop in one process."
)


class Group:
    """The processes that share an inner problem: all parameters in each, and a batch of its own.

    Attributes:
        size: their number.
        messages: all-reduces so far.
    """

    def __init__(self, process_group: Any) -> None:
        self._group = process_group
        self.size = int(torch.distributed.get_world_size(process_group))
        self.messages = 0

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over the processes, the same bits in all: one message."""
        dtype = tensors[0].dtype
        for t in tensors:
            dtype = torch.promote_types(dtype, t.dtype)
        flat = torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])
        self.messages += 1
        torch.distributed.all_reduce(flat, group=self._group)
        parts = torch.split(flat / self.size, [t.numel() for t in tensors])
        return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def mean_where(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same where some are None, the same ones in every process."""
        means = iter(self.mean([t for t in tensors if t is not None]))
        return [None if t is None else next(means) for t in tensors]

    def seed(self, own: int, device: torch.device) -> int:
        """The seed of the first process, in all of them."""
        source = 0 if self._group is None else torch.distributed.get_global_rank(self._group, 0)
        shared = torch.tensor([own], dtype=torch.int64, device=device)
        torch.distributed.broadcast(shared, source, group=self._group)
        return int(shared)


class Averaged(Wrapping):
    """The mean of one operator over the processes: a message a product, (n + h) numbers if joint.

    With equal batches H of the union is the mean of each process's H, and so is Jᵀ.
    """

    def __init__(self, operator: LinearOperator, group: Group) -> None:
        super().__init__(operator)
        self._group = group

    def _product(self, x: Tensor) -> Tensor:
        return self._group.mean([self.operator @ x])[0]

    def _products(self, X: Tensor) -> Tensor:
        return self._group.mean([(self.operator @ X).mT])[0].mT

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product, cross = self._group.mean(self.operator.joint(x))
        return product, cross

    def _exact(self, x: Tensor) -> Tensor:
        return self._group.mean([self.operator.exact(x)])[0]


def group_of(wanted: Any, modules: Iterable[nn.Module]) -> Group | None:
    """The processes that share the inner problem of these modules; None for this one alone.

    Args:
        wanted: a process group; False for none; None to find out.

    Raises:
        RuntimeError: it cannot be known; or the parameters are sharded.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        if wanted:
            raise RuntimeError(
                "process_group was given, but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group first."
            )
        return None
    if wanted is False:
        return None
    found = list(modules)
    if any(hasattr(p, "placements") for module in found for p in module.parameters()):
        raise RuntimeError(_SHARDED)
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
