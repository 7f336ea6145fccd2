"""Results as they come: one row for each finished run, and the points of its curve."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .intervals import shown
from .output import print_table, save_figure

Row = dict[str, Any]


class RunLog:
    """Finished runs in ``<name>.csv``, and points of their curves in ``<name>_curves.csv``.

    A run is known by its factors (method, seed, size, ...). With ``resume`` those in the file are
    not done again, so a stopped command goes on, and a finished one only prints and draws.
    """

    def __init__(self, folder: Path, name: str, resume: bool) -> None:
        self.paths = (folder / f"{name}.csv", folder / f"{name}_curves.csv")
        self.runs, self.points = (_read(path) if resume else [] for path in self.paths)

    def has(self, factors: Row) -> bool:
        return any(_agree(run, factors) for run in self.runs)

    def add(self, factors: Row, results: Row, curve: Iterable[Row] = ()) -> None:
        """Keeps a finished run, and writes the files."""
        self.runs.append({k: _rounded(v) for k, v in (factors | results).items()})
        self.points += [{k: _rounded(v) for k, v in (factors | p).items()} for p in curve]
        for path, rows in zip(self.paths, (self.runs, self.points), strict=True):
            if rows:
                _write(path, rows)

    def select(self, **where: Any) -> list[Row]:
        """The runs with these values in these columns."""
        return [run for run in self.runs if _agree(run, where)]

    def curves(self, x: str, y: str, **where: Any) -> dict[str, list[tuple[float, float]]]:
        """method -> (x, y), means over the seeds at each point of the curve."""
        found: dict[str, dict[str, list[Row]]] = {}
        for point in self.points:
            if _agree(point, where) and point.get(y, "") != "":
                found.setdefault(point["method"], {}).setdefault(point["step"], []).append(point)
        return {
            method: [tuple(mean(float(p[c]) for p in same) for c in (x, y)) for same in at.values()]
            for method, at in found.items()
        }

    def draw(self, name: str, y: dict[str, str], title: str, **where: Any) -> None:
        """Two columns of y, with their labels, against products and CPU seconds; ``name.png``."""
        figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharey="row", layout="constrained")
        colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
        looks = dict.fromkeys(p["method"] for p in self.points if _agree(p, where))
        looks = {m: ("--" if i % 2 else "-", colours[i]) for i, m in enumerate(looks)}
        for row, (column, label) in enumerate(y.items()):
            for axis, x in zip(axes[row], ("products", "cpu_s"), strict=True):
                for method, points in self.curves(x, column, **where).items():
                    style, colour = looks[method]
                    axis.plot(*zip(*points, strict=True), style, color=colour, label=method)
                axis.set(yscale="log", xscale="log")
                axis.grid(alpha=0.3)
            axes[row, 0].set_ylabel(label)
        axes[1, 0].set_xlabel("products")
        axes[1, 1].set_xlabel("CPU seconds")
        handles, names = axes[1, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", frameon=False)
        figure.suptitle(f"{title}, mean of the seeds")
        save_figure(figure, self.paths[0].with_name(f"{name}.png"))

    def dots(self, axis: Axes, column: str, red: str = "learned") -> None:
        """A line a method: a point a run, a bar at the mean; red where its name begins so."""
        names = list(dict.fromkeys(run["method"] for run in self.runs))
        for place, name in enumerate(names):
            values = [float(run[column]) for run in self.select(method=name)]
            color = "C3" if name.startswith(red) else "C7"
            axis.plot(values, [place] * len(values), "o", color=color, alpha=0.4)
            axis.plot(mean(values), place, "|", color="black", markersize=14)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()

    def panels(self, columns: Sequence[str], factor: str, title: str) -> None:
        """A point a run over the methods, a panel for each value of ``factor``; ``<name>.png``."""
        values = list(dict.fromkeys(run[factor] for run in self.runs))
        size = (6 * len(values), 3.8)
        figure, axes = plt.subplots(1, len(values), figsize=size, squeeze=False, sharey=True)
        for axis, value in zip(axes[0], values, strict=True):
            runs = self.select(**{factor: value})
            for column, mark in zip(columns, "o^sv", strict=False):
                points = [float(run[column]) for run in runs]
                label = column.replace("_", " ")
                axis.plot([run["method"] for run in runs], points, mark, alpha=0.8, label=label)
            axis.set_title(f"{title}, {factor}: {value}", fontsize=10)
            axis.tick_params("x", rotation=40)
            axis.grid(alpha=0.3)
        axes[0][0].legend(frameon=False, fontsize=8)
        figure.tight_layout()
        save_figure(figure, self.paths[0].with_suffix(".png"))

    def show(self, by: Sequence[str], columns: dict[str, tuple[str, str]], **where: Any) -> None:
        """Prints mean ± 95% interval for each group of seeds; columns: title -> column, format."""
        groups: dict[tuple[str, ...], list[Row]] = {}
        for run in self.select(**where):
            groups.setdefault(tuple(str(run.get(c, "")) for c in by), []).append(run)
        rows = [
            [" ".join(group), *(_cell(runs, *column) for column in columns.values())]
            for group, runs in groups.items()
        ]
        print_table([", ".join(by), *columns], rows)


def _cell(runs: Sequence[Row], column: str, form: str) -> str:
    values = [float(run[column]) for run in runs if run.get(column, "") != ""]
    return shown(values, form) if values else ""


def _rounded(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _agree(row: Row, factors: Row) -> bool:
    return all(row.get(name) == _rounded(value) for name, value in factors.items())


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
