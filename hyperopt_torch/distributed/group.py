"""Several processes, each with its own batch: the answer is that of the union."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import LinearOperator, Wrapping


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

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over the processes, the same bits in all: one message."""
        return self._reduced(tensors, 1)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over the processes, the same bits in all: one message."""
        return self._reduced(tensors, self.size)

    def _reduced(self, tensors: Sequence[Tensor], divisor: int) -> list[Tensor]:
        if not tensors:
            return []
        dtype = tensors[0].dtype
        for t in tensors:
            dtype = torch.promote_types(dtype, t.dtype)
        flat = torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])
        self.messages += 1
        torch.distributed.all_reduce(flat, group=self._group)
        flat = flat if divisor == 1 else flat / divisor
        parts = torch.split(flat, [t.numel() for t in tensors])
        return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def places(self, count: int, device: torch.device) -> tuple[int, int]:
        """(start, total): where our ``count`` entries lie among those of all, by rank."""
        counts = torch.zeros(self.size, dtype=torch.int64, device=device)
        rank = int(torch.distributed.get_rank(self._group))
        counts[rank] = count
        known = self.sums([counts])[0].tolist()
        return sum(known[:rank]), sum(known)

    def mean_where(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same where some are None, the same ones in every process."""
        means = iter(self.mean([t for t in tensors if t is not None]))
        return [None if t is None else next(means) for t in tensors]

    def check(self) -> None:
        """RuntimeError where gradients would not be those of all."""

    def settle(self) -> None:
        """Called when inner parameters were written to."""

    def total(self, part: Tensor) -> Tensor:
        """The sum over all entries of vectors from that over those of this process."""
        return part

    def gradients(
        self, b: Sequence[Tensor | None], c: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The gradients of the mean loss over θ and over φ from those of each process."""
        means = self.mean_where([*b, *c])
        return means[: len(b)], means[len(b) :]

    def operator(self, operator: LinearOperator) -> LinearOperator:
        """That of the mean loss from that of each process."""
        return Averaged(operator, self)

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
