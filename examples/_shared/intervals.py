"""Rows of runs: their means over seeds with 95% intervals, paired differences, files."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from scipy.stats import t as student

from .output import save_rows

Rows = Sequence[dict[str, Any]]  # one a run, with "method" and "seed"


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% interval of the mean, by Student's t; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


def shown(values: Sequence[float], form: str = ".3f") -> str:
    """Such as 0.912 ± 0.004."""
    spread = f" ± {half_width(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def add_difference(rows: Rows, column: str, method: str, sign: int) -> None:
    """A column: the accuracy of the run less that of ``method`` at the same seed, times sign."""
    other = {row["seed"]: row["test_accuracy"] for row in rows if row["method"] == method}
    for row in rows:
        row[column] = sign * (row["test_accuracy"] - other[row["seed"]])


def by_method(rows: Rows, column: str) -> dict[str, list[float]]:
    """The values of each method, by seed; "" is no value."""
    found: dict[str, list[float]] = {row["method"]: [] for row in rows}
    for row in rows:
        if row[column] != "":
            found[row["method"]].append(row[column])
    return found


def summary(rows: Rows, columns: Sequence[str]) -> list[list[str]]:
    """A line a method: the columns with their intervals, then the mean products and CPU seconds."""
    values = {column: by_method(rows, column) for column in (*columns, "products", "cpu_s")}
    return [
        [
            name,
            *(shown(values[c][name]) if values[c][name] else "" for c in columns),
            f"{mean(values['products'][name]):.0f}",
            f"{mean(values['cpu_s'][name]):.1f}",
        ]
        for name in values["cpu_s"]
    ]


def save_runs(path: Path, rows: Rows) -> None:
    """A CSV file with a line a run, to six significant digits."""
    cells = [[f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    save_rows(path, list(rows[0]), cells)


def accuracy_figure(rows: Rows, columns: Sequence[str], learned: tuple[str, ...]) -> Figure:
    """A line a method and a panel a column; methods that begin with ``learned`` are red."""
    names = list(by_method(rows, columns[0]))
    colors = ["C3" if name.startswith(learned) else "C7" for name in names]
    size = (11, 0.36 * len(names) + 1)
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, layout="constrained")
    for axis, column in zip(axes, columns, strict=True):
        values = by_method(rows, column).values()
        means, errors = [mean(v) for v in values], [half_width(v) for v in values]
        axis.errorbar(means, range(len(names)), xerr=errors, fmt="none", ecolor="black", capsize=3)
        axis.scatter(means, range(len(names)), c=colors, zorder=3)
        axis.set_xlabel(f"{column.replace('_', ' ')} (learned: red)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure
