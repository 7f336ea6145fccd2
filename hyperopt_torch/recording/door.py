"""What enters the modules that a training closure calls: is it the same again?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._tensors import is_wrapped

_SAMPLE = 1024  # entries looked at of each tensor
_APART = 0.5  # of the spread: what enters may move with θ (an attack, say), but no further
_OTHER = 0.05  # of the entries that are whole numbers (tokens, labels)


class Entrant:
    """One tensor that entered a module, and what tells whether it was written to since.

    Taking it down costs nothing: tensors are compared only where another one enters later.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    @property
    def written(self) -> bool:
        """Whether it no longer holds what entered then."""
        return self.tensor._version != self.version


def entrants(arguments: Any) -> Iterator[Entrant]:
    """Of the arguments of a module: tensors that θ and φ do not move.

    What requires a gradient was computed from parameters and moves with them.
    """
    for tensor in _tensors(arguments):
        if not tensor.requires_grad and tensor.layout is torch.strided and not is_wrapped(tensor):
            yield Entrant(tensor)


def changed(recorded: list[Entrant], before: list[int], now: list[Entrant]) -> str | None:
    """What differs, in words; None where nothing does. At most one sync.

    A tensor that was written to since is the same batch if the closure itself wrote it anew.

    Args:
        before: the versions of the recorded tensors when the closure was called again.
    """
    if len(recorded) != len(now):
        return f"{len(recorded)} tensor(s) entered the modules then, {len(now)} now"
    doubts: list[Tensor] = []
    for then, version, again in zip(recorded, before, now, strict=True):
        if then.tensor is again.tensor:
            if again.version == version != then.version:
                return f"the tensor of shape {tuple(then.tensor.shape)} was filled anew meanwhile"
            continue
        a, b = then.tensor, again.tensor
        if a.shape != b.shape or a.dtype != b.dtype:
            return (
                f"a tensor of shape {tuple(a.shape)} and {a.dtype} entered a module then, one of "
                f"shape {tuple(b.shape)} and {b.dtype} now"
            )
        if not then.written and not again.written and a.numel():
            doubts.append(_differ(_sample(a), _sample(b)))
    if doubts and bool(torch.stack([d.to(doubts[0].device) for d in doubts]).any()):
        return "a tensor that entered a module has other values now"
    return None


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Whether these are samples of two batches; a 0-d bool tensor."""
    if not a.is_floating_point():
        return (a != b).sum() > _OTHER * len(a)
    gap = (a - b).float()
    spread = (a - a.float().mean()).float() if len(a) > 1 else a.float()
    # NaN on both sides is the same; on one side it is not.
    gap = torch.where(a.isnan() & b.isnan(), 0.0, gap)
    limit = _APART * spread.nan_to_num(0.0).norm() + 1e-6 * a.float().norm()
    return torch.logical_not(gap.norm() <= limit)


def _sample(tensor: Tensor) -> Tensor:
    """(≤ 1024,) entries spread over the tensor, not all of one column."""
    flat = tensor.detach().reshape(-1)
    step = -(-len(flat) // _SAMPLE)
    while step > 1 and math.gcd(step, len(flat)) > 1 and step < len(flat):
        step += 1
    return flat[::step]


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
