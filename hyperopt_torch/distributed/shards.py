"""Parameters in parts over several processes (FSDP2): so are vectors, and sums run over all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._tensors import here, inner_product, inner_products, is_sharded
from ..operators import LinearOperator, Wrapping
from .group import Group

_MESH = (
    "The inner parameters are DTensors that are not all sharded over one and the same "
    "one-dimensional mesh, as fully_shard(model) leaves them: tensor parallelism, replicas of "
    "shards and parameters that are whole in every process are not supported as inner parameters."
)
_OUTER = (
    "Outer parameters are sharded (DTensor): keep them whole in every process, outside of the "
    "modules that fully_shard was applied to."
)
_NO_SYNC = (
    "set_requires_gradient_sync(False) is on for a module: its gradients would not be those of all "
    "processes. Switch it on before outer_step: model.set_requires_gradient_sync(True)."
)
_NOT_KNOWN = (
    "The inner parameters are DTensors, and the training closure has called no module that "
    "fully_shard was applied to: call the model inside the closure. DTensors made in another way "
    "are not supported."
)


class Shards(Group):
    """The processes that hold parts of θ, each with a batch of its own, and all of φ.

    Args:
        parameters: θ.
        modules: those that the training closure calls.

    Raises:
        RuntimeError: θ is not as ``fully_shard`` leaves it, or its gradients are not averaged.
    """

    def __init__(self, parameters: Sequence[Tensor], modules: Iterable[nn.Module]) -> None:
        mesh: Any = getattr(parameters[0], "device_mesh", None)
        for p in parameters:
            placements: Any = getattr(p, "placements", ())
            whole = len(placements) != 1 or not placements[0].is_shard()
            if whole or p.device_mesh != mesh:  # type: ignore[attr-defined]
                raise RuntimeError(_MESH)
        super().__init__(mesh.get_group())
        self._modules: list[Any] = [module for module in modules if hasattr(module, "reshard")]
        if not self._modules:
            raise RuntimeError(_NOT_KNOWN)
        self._rank = int(torch.distributed.get_rank(self._group))
        self._numel = [here(p.detach()).numel() for p in parameters]
        self._parts = self._places(parameters[0].device)
        self.n = sum(stop - start for start, stop, _ in self._parts)

    def _places(self, device: torch.device) -> list[tuple[int, int, int | None]]:
        """(start, stop, offset in our part of a vector) of global entries, shard by shard."""
        own = torch.tensor(self._numel, device=device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(found, own, group=self._group)
        parts: list[tuple[int, int, int | None]] = []
        start = offset = 0
        for sizes in torch.stack(found, dim=1).tolist():  # of one parameter, in each process
            for rank, size in enumerate(sizes):
                ours = rank == self._rank
                parts.append((start, start + size, offset if ours else None))
                start += size
                offset += size if ours else 0
        return parts

    def check(self) -> None:
        """RuntimeError where gradients would not be averaged: the next pass would be half of one.

        torch tells it by no public name; where it is told by none, nothing is said.
        """
        for module in self._modules:
            state: Any = getattr(module, "_get_fsdp_state", lambda: None)()
            one = getattr(state, "_fsdp_param_group", None)
            for group in getattr(state, "_fsdp_param_groups", None) or ([one] if one else []):
                if not getattr(group, "reduce_grads", True):
                    raise RuntimeError(_NO_SYNC)

    def settle(self) -> None:
        """Called when shards were written to: whole parameters gathered before are dropped.

        Otherwise the next forward would take those, as after ``set_reshard_after_backward(False)``.
        """
        for module in self._modules:
            module.reshard()

    def total(self, part: Tensor) -> Tensor:
        """The sum of what each process found over its entries, the same bits in all: a message."""
        return self.sums([part])[0]

    def gradients(
        self, b: Sequence[Tensor | None], c: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Of θ they are averaged by FSDP; of φ they are not."""
        return list(b), self.mean_where(c)

    def operator(self, operator: LinearOperator) -> LinearOperator:
        return Sharded(operator, self)

    def own(self, index: Sequence[int]) -> tuple[list[int], list[int]]:
        """Which of these global entries we hold, and where."""
        which, where = [], []
        for i, k in enumerate(index):
            for start, stop, offset in self._parts:
                if offset is not None and start <= k < stop:
                    which.append(i)
                    where.append(offset + k - start)
        return which, where

    @property
    def rank(self) -> int:
        return self._rank


class Sharded(Wrapping):
    """An operator whose products are those of the whole, on vectors of which we hold a part.

    Sums over n are a message each; Jᵀx, whole in every process, is averaged.
    """

    def __init__(self, operator: LinearOperator, group: Shards) -> None:
        super().__init__(operator)
        self.shape = (group.n, group.n)
        self._group = group

    def _product(self, x: Tensor) -> Tensor:
        return self.operator @ x

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product, cross = self.operator.joint(x)
        return product, self._group.mean([cross])[0]

    def _exact(self, x: Tensor) -> Tensor:
        return self.operator.exact(x)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return self._group.total(inner_product(x, y))

    def inners(self, X: Tensor, Y: Tensor) -> Tensor:
        return self._group.total(inner_products(X, Y))

    def basis(self, index: Sequence[int]) -> Tensor:
        columns, rows = self._group.own(index)
        E = torch.zeros(len(index), self.length, dtype=self.dtype, device=self.device)
        if rows:
            E[columns, rows] = 1
        return E.mT

    def take(self, x: Tensor, index: Sequence[int]) -> Tensor:
        which, where = self._group.own(index)
        taken = x.new_zeros(len(index), *x.shape[1:])
        if which:
            taken[which] = x[where]
        return self._group.total(taken)

    def place(self, y: Tensor, index: Sequence[int]) -> Tensor:
        which, where = self._group.own(index)
        x = torch.zeros(self.length, dtype=y.dtype, device=self.device)
        if which:
            x[where] = y[which]
        return x

    def normal(self, seed: int) -> Tensor:
        return self.operator.normal(seed * self._group.size + self._group.rank)


def check_outer(parameters: Iterable[Tensor]) -> None:
    """RuntimeError where φ is in parts."""
    if any(map(is_sharded, parameters)):
        raise RuntimeError(_OUTER)
