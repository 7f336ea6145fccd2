"""Whether the vectors of a solve will fit into memory, and what fits instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_BESIDE = 8  # vectors of n that every outer step holds: both gradients, a product, its graph
_SMALL = 1 << 20  # entries; fewer are no matter
_REMEDY = (
    "Fewer vectors: RecycledCG(window=5) holds about 19, CG(5) 5, Nystrom(chunk_size=1) 4, "
    "Identity() none. curvature=FiniteDifference() keeps no graph. With few of the parameters in "
    "the inner optimizer (adapters such as LoRA) n is theirs."
)


def shortage(vectors: int, n: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is missing for ``vectors`` of n entries beside the rest of a step; None where it fits.

    Free memory is what the device, or for the CPU the system, reports as available; where nothing
    is reported, or n is small, nothing is said.
    """
    if n < _SMALL:
        return None
    free = _free(device)
    need = (vectors + _BESIDE) * n * dtype.itemsize
    if free is None or need <= free:
        return None
    return (
        f"The strategy holds about {vectors} vectors of n = {n:.3g} entries, with the rest of the "
        f"step {need / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free. {_REMEDY}"
    )


def _free(device: torch.device) -> float | None:
    if device.type == "cuda":
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + own)
    if device.type != "cpu":
        return None
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    line = next((x for x in table.read_text().splitlines() if x.startswith("MemAvailable")), None)
    return None if line is None else float(line.split()[1]) * 1024


@contextmanager
def explained_shortage(vectors: int | None, n: int) -> Iterator[None]:
    """Around an outer step: out of memory in words that say what would fit."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        text = str(error)
        if "out of memory" not in text and "can't allocate memory" not in text:
            raise
        held = f"The strategy holds about {vectors} vectors of n = {n:.3g}." if vectors else ""
        raise type(error)(f"{text.splitlines()[0]} {held} {_REMEDY}") from error
