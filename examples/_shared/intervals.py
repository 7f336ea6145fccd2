"""Means over seeds, with their 95% intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t as student


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% interval of the mean, by Student's t; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


def shown(values: Sequence[float], form: str = ".3f") -> str:
    """Such as 0.912 ± 0.004."""
    spread = f" ± {half_width(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"
