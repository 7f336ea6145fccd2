"""Flat vectors: how parameter tensors lie in one vector, and in which precision to sum."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class FlatLayout:
    """The place of each tensor of a list in one flat vector of length ``n``.

    The vector has one dtype, the widest among the tensors and at least float32: a solver must not
    do its algebra in bfloat16 because one layer is stored in it. Entries lie in logical
    (row-major) order whatever the memory format of the tensors. Of sharded tensors it holds the
    part of this process.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        tensors = [here(t) for t in tensors]
        self.shapes = [t.shape for t in tensors]
        self.dtypes = [t.dtype for t in tensors]
        self.sizes = [t.numel() for t in tensors]
        self.n = sum(self.sizes)
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = torch.float32
        for dtype in self.dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)
        # One vector is its own flat form; small problems are all overhead, so it is worth a line.
        self._trivial = len(tensors) == 1 and tensors[0].ndim == 1 and self.dtypes == [self.dtype]

    def flatten(self, tensors: Sequence[Tensor | None], *, batched: bool = False) -> Tensor:
        """(n,) from one tensor each; with ``batched``, (k, n) from tensors of shape (k, *shape).

        ``None`` stands for zero, as autograd uses it for an unused input. Sparse ones are made
        dense.
        """
        if self._trivial and tensors[0] is not None:
            return self._as(tensors[0], self.dtype)
        k = next((len(t) for t in tensors if t is not None), 1) if batched else 1
        lead = (k,) if batched else ()
        parts = [
            torch.zeros(*lead, size, dtype=self.dtype, device=self.device)
            if t is None
            else self._as(t, self.dtype).reshape(*lead, size)
            for t, size in zip(tensors, self.sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Tensors of the layout's shapes from (n,), or of shape (k, *shape) from (k, n)."""
        if self._trivial:
            return [flat]
        lead = flat.shape[:-1]
        parts = (flat,) if len(self.sizes) == 1 else torch.split(flat, self.sizes, dim=-1)
        return [
            self._as(part, dtype).reshape(lead + shape)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]

    @staticmethod
    def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return dense(tensor) if tensor.dtype == dtype else dense(tensor).to(dtype)


def here(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor (DTensor) that this process holds, in its own memory."""
    if type(tensor) is Tensor or not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "placements")


def dense(tensor: Tensor) -> Tensor:
    """A sparse gradient, as of ``nn.Embedding(sparse=True)``, as a plain tensor; sharded ones
    as the part that is here.
    """
    tensor = here(tensor)
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def trainable(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that require a gradient, each once: frozen tensors are constants, tied ones are one."""
    return list({id(t): t for t in tensors if t.requires_grad}.values())


def is_wrapped(tensor: Tensor) -> bool:
    """Whether it is one of torch.func's, which have no entries of their own."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_at_hand(tensor: Tensor) -> bool:
    """Whether its entries can be read without waiting for a device."""
    return tensor.device.type == "cpu" and not is_wrapped(tensor)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to sum in: float64 wherever the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


# Entries converted at a time: the wide copy never matches x in memory. Of one vector on a CPU so
# few that the copy stays in its cache: ten times faster (measured) than to fetch new memory.
_BLOCK_ENTRIES, _CACHED_ENTRIES = 1 << 20, 1 << 16


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    """xᵀy summed in float64: (n,), (n,) -> (); (n, j), (n, k) -> (j, k)."""
    wide, entries = wide_dtype(x), _BLOCK_ENTRIES
    if not len(x):  # the part of a process that holds nothing
        return torch.zeros((*x.shape[1:], *y.shape[1:]), dtype=wide, device=x.device)
    if x.dtype == y.dtype == wide:
        return x.mT @ y if x.ndim == 2 else x @ y
    if x.ndim == y.ndim == 1:
        if x.device.type == "cpu":
            entries = _CACHED_ENTRIES
        if len(x) <= entries:  # at once: small problems are all overhead
            widened = x.to(wide)
            return widened @ (widened if y is x else y.to(wide))
    rows = max(1, entries // max(x[0].numel(), y[0].numel()))
    total: Tensor | None = None
    for xs, ys in zip(torch.split(x, rows), torch.split(y, rows), strict=True):
        widened = xs.to(wide)  # before the product: small entries must not underflow
        other = widened if y is x else ys.to(wide)
        block = widened.mT @ other if xs.ndim == 2 else widened @ other
        total = block if total is None else total + block
    assert total is not None
    return total


_BLOCK = 4096  # entries summed in their own dtype: a relative error of 1e-7 in float32


def inner_products(X: Tensor, Y: Tensor) -> Tensor:
    """(j, n), (k, n) -> (j, k), XYᵀ: blocks in the own dtype, summed in float64.

    Where X has many rows this is five times faster than :func:`inner_product`, and good to 1e-7 of
    ‖x‖‖y‖ in float32. Products of float32 entries below 1e-19 underflow.
    """
    wide = wide_dtype(X)
    if X.dtype == wide or X.shape[1] <= _BLOCK:
        return (X @ Y.mT).to(wide)
    end = X.shape[1] // _BLOCK * _BLOCK
    Xs, Ys = (Z[:, :end].view(len(Z), -1, _BLOCK).transpose(0, 1) for Z in (X, Y))
    total = torch.bmm(Ys, Xs.mT).sum(0, dtype=wide).mT  # this way round: X is read along its rows
    return total if end == X.shape[1] else total + X[:, end:] @ Y[:, end:].mT


def read(small: Tensor) -> Tensor:
    """A small tensor in float64 on the host, to compute with there: one sync."""
    return small.detach().to(device="cpu", dtype=torch.float64)


def seeded_rng(seed: int, count: int) -> random.Random:
    """Python's own generator for draw ``count`` of a strategy: the same indices on every device.

    Drawing from it neither touches torch's global stream nor waits for a device.
    """
    return random.Random(seed * 1_000_003 + count)


def seeded_generator(seed: int, device: torch.device) -> torch.Generator:
    """A torch generator on ``device`` that starts at ``seed``; on the CPU for the meta device."""
    where = torch.device("cpu") if device.type == "meta" else device
    return torch.Generator(where).manual_seed(seed % (1 << 63))


def draw_seed(generator: torch.Generator | None) -> int:
    """One seed: from ``generator`` if given, otherwise the one of ``torch.manual_seed``.

    Neither way moves torch's global random stream.

    Raises:
        TypeError: ``generator`` is no ``torch.Generator``.
    """
    if generator is None:
        return torch.initial_seed()
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, got {generator!r}; for a seed pass "
            "torch.Generator().manual_seed(seed)."
        )
    draw = torch.randint(1 << 62, (), generator=generator, device=generator.device)
    return int(draw)
