"""Keeping a graph that computes in float16 within its range."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ._tensors import FlatLayout

_NARROW = 1e6  # a dtype that ends below this: float16, from 6e-8 to 65504
_START = 65536.0  # a GradScaler's own
_TARGET = 4.0  # largest entry of a scaled ∇f: room of 2^14 above and of 2^26 below
_TRIES, _FAR = 4, 2.0**12  # how often, and how far, to go from a scale that over- or underflows
_MOST = 60  # binades, so that the scale itself does not overflow
_STEP = 8.0  # a lifted vector is this many times shorter than θ
_LEAST_RMS = 1 / 64  # taken for θ where it is smaller, as where it starts at zero


class Range:
    """How to scale f and the vectors of its products, so that float16 neither under- nor overflows.

    Products are linear in f and in x, but float16 is not. Two kinds of numbers pass through the
    graph: the gradient of f times a scale s, and the change of the activations along tx. The
    product is of the size of both together, so that a scale which suits the gradient alone, as a
    GradScaler's does, overflows in it. Here

    - s brings the largest entry of s∇f to 4, measured by one gradient at the scale given;
    - t is such that tx is an eighth as long as θ, and no entry above 1: what a step along it does
      to the activations is of their own size, whatever the layers are.

    Both move by powers of two, so that nothing is rounded. A product that is not finite stays so.
    Where the graph has the range of float32, as with bfloat16, x is left alone, and s is the scale
    given.

    Cost: in float16 one gradient of f and one sync, once; two passes over x a product.

    Args:
        loss: f.
        inner: θ.
        layout: that of the vectors.
        dtypes: those that f computes in.
        scale: of f to start from.
    """

    def __init__(
        self,
        loss: Tensor,
        inner: Sequence[Tensor],
        layout: FlatLayout,
        dtypes: Iterable[torch.dtype],
        scale: Tensor | float,
    ) -> None:
        given = isinstance(scale, Tensor) or scale != 1
        self._scale: Tensor | float | None = scale if given else None
        self._size: Tensor | None = None
        if any(torch.finfo(dtype).max < _NARROW for dtype in dtypes):
            self._scale = _suited(loss, inner, layout, scale if given else _START)
            theta = layout.flatten([p.detach() for p in inner])
            self._size = theta.norm().clamp(min=_LEAST_RMS * layout.n**0.5)
        self.scaled_loss = loss if self._scale is None else loss * self._scale

    def lift(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(tx, t) for x of shape (n,), or (k, n) with a t for each row; t is None for 1."""
        if self._size is None:
            return x, None
        t = _power_of_two(1 / x.abs().amax(-1, keepdim=True))
        unit = x * t
        step = _power_of_two(self._size / (_STEP * unit.norm(dim=-1, keepdim=True))).clamp(max=1)
        return unit * step, t * step

    def lower(self, y: Tensor, t: Tensor | None) -> Tensor:
        """y / (st), s and t one after the other: their product might overflow."""
        if t is not None:
            y = y / t
        return y if self._scale is None else y / self._scale


def _suited(
    loss: Tensor, inner: Sequence[Tensor], layout: FlatLayout, scale: Tensor | float
) -> Tensor | float:
    """The scale of f that suits its products; 1 where ∇f is zero, or not finite, at any."""
    for _ in range(_TRIES):
        grads = torch.autograd.grad(loss * scale, inner, retain_graph=True, allow_unused=True)
        largest = float(layout.flatten(grads).abs().amax())
        if 0 < largest < math.inf:
            exponent = math.floor(math.log2(_TARGET / largest))
            return scale * 2.0 ** max(-_MOST, min(exponent, _MOST))
        scale = scale * (_FAR if largest == 0 else 1 / _FAR)
    return 1.0


def _power_of_two(x: Tensor) -> Tensor:
    """About x, as a power of two; 1 where x is zero, infinite or NaN."""
    power = torch.exp2(torch.floor(torch.log2(x)))
    return torch.where(power.isfinite() & (power > 0), power, 1.0)
