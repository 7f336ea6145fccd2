"""How much memory this process holds."""

from __future__ import annotations

import resource
from pathlib import Path


def resident(field: str) -> float:
    """Bytes of this process: VmRSS now, VmHWM at most.

    Linux's ru_maxrss would start at the peak of the parent process: it survives exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return float(line.split()[1]) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS
