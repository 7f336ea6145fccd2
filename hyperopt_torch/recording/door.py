"""What enters the modules that a training closure calls: is it the same again?"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_SAMPLE = 256  # entries looked at of each tensor
_APART = 0.5  # of the spread: what enters may move with θ (an attack, say), but no further
_OTHER = 0.05  # of the entries that are whole numbers (tokens, labels)


class Entrant:
    """One tensor that entered a module: what it takes to know it again.

    It is not kept alive. Two batches are told apart by a sample of their entries.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.version = tensor._version
        self._tensor = weakref.ref(tensor)
        self.sample = _sample(tensor)

    def is_surely(self, other: Entrant) -> bool:
        """The same tensor, not written to since: nothing needs to be compared."""
        tensor = self._tensor()
        return tensor is not None and tensor is other._tensor() and self.version == other.version

    def differs(self, other: Entrant) -> Tensor | bool:
        """Whether this is another batch; a 0-d bool tensor on the device, or known at once."""
        if self.is_surely(other):
            return False
        if self.shape != other.shape or self.dtype != other.dtype:
            return True
        a, b = self.sample, other.sample
        if not a.is_floating_point() or not len(a):
            return (a != b).sum() > _OTHER * len(a)
        gap = (a - b).float()
        spread = (a - a.float().mean()).float() if len(a) > 1 else a.float()
        # NaN on both sides is the same; on one side it is not.
        gap = torch.where(a.isnan() & b.isnan(), 0.0, gap)
        apart: Tensor = ~(
            gap.norm() <= _APART * spread.nan_to_num(0.0).norm() + 1e-6 * a.float().norm()
        )
        return apart


def entrants(arguments: Any) -> Iterator[Entrant]:
    """Of the arguments of a module: tensors that θ and φ do not move.

    What requires a gradient was computed from parameters and moves with them.
    """
    for tensor in _tensors(arguments):
        if not tensor.requires_grad and tensor.layout is torch.strided and not _wrapped(tensor):
            yield Entrant(tensor)


def _wrapped(tensor: Tensor) -> bool:
    """Whether it is one of torch.func's, which have no entries of their own."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _each(value.values())
    elif isinstance(value, (tuple, list)):
        yield from _each(value)


def _each(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        yield from _tensors(value)


def _sample(tensor: Tensor) -> Tensor:
    """(≤ 256,) entries spread over the tensor, not all of one column."""
    flat = tensor.detach().reshape(-1)
    step = -(-len(flat) // _SAMPLE)
    while step > 1 and math.gcd(step, len(flat)) > 1 and step < len(flat):
        step += 1
    return flat[::step].clone()


def changed(recorded: list[Entrant], now: list[Entrant]) -> str | None:
    """What differs, in words; None where nothing does. At most one sync."""
    if len(recorded) != len(now):
        return f"{len(recorded)} tensor(s) entered the modules then, {len(now)} now"
    doubts: list[Tensor] = []
    for then, again in zip(recorded, now, strict=True):
        apart = then.differs(again)
        if apart is True:
            return (
                f"a tensor of shape {tuple(then.shape)} and {then.dtype} entered a module then, "
                f"one of shape {tuple(again.shape)} and {again.dtype} now"
            )
        if isinstance(apart, Tensor):
            doubts.append(apart)
    if doubts and bool(torch.stack([d.to(doubts[0].device) for d in doubts]).any()):
        return "a tensor that entered a module has other values now"
    return None
