"""The lowest validation loss against full trainings, from the files of benchmarks.against_optuna.

python -m benchmarks.draw_against_optuna
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
COLORS = {"random search": "tab:orange", "TPE": "tab:blue"}


def read(name: str) -> list[dict[str, str]]:
    with open(DOCS / "results" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def lowest(losses: list[float]) -> list[float]:
    """The least so far."""
    return [min(losses[: i + 1]) for i in range(len(losses))]


def main() -> None:
    trials, runs = read("against_optuna_curves"), read("against_optuna")
    tasks = list(dict.fromkeys(trial["task"] for trial in trials))
    size = (5.5 * len(tasks) + 2, 3.8)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for method, color in COLORS.items():
            of_seed: dict[str, list[float]] = {}
            for trial in trials:
                if (trial["task"], trial["method"]) == (task, method):
                    of_seed.setdefault(trial["seed"], []).append(float(trial["val_loss"]))
            points = list(zip(*map(lowest, of_seed.values()), strict=True))
            at = range(1, len(points) + 1)
            axis.step(
                at, [sum(p) / len(p) for p in points], color=color, where="post", label=method
            )
            low, high = [min(p) for p in points], [max(p) for p in points]
            axis.fill_between(at, low, high, color=color, alpha=0.15, step="post", linewidth=0)
        found = [
            (float(run["trainings"]), float(run["val_loss"]))
            for run in runs
            if (run["task"], run["method"]) == (task, "bilevel, default") and run["seed"] in of_seed
        ]
        axis.plot(*zip(*found, strict=True), "o", color="tab:green", label="bilevel run, retrained")
        axis.set(
            title=f"{task} labels, {len(found)} seeds: mean, least and greatest",
            xlabel="full trainings (by CPU time)",
            ylabel="lowest validation loss so far",
            xscale="log",
        )
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    path = DOCS / "figures" / "against_optuna.png"
    figure.savefig(path, dpi=110)
    print(f"figure: {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
