"""What the first program of the documentation buys, beside runs that need no bilevel optimisation.

    python -m benchmarks.first_loop

Each row is the text of examples/first_loop.py, or of the plain loop in benchmarks/lines, with the
lines replaced that the row names; seeds differ by the line that sets them. The figure is of seed 0.
One line a run goes to docs/results/first_loop.csv.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro
from tqdm import tqdm

from .lines import OURS, PLAIN

ON_VAL = {"TensorDataset(x[train], given)": "TensorDataset(x[val], y[val])"}
LONGER = {"range(60)": "range(300)"}  # 2 batches an epoch where the whole set has 10
ON_RIGHT = {"TensorDataset(x[train], given)": "TensorDataset(x[train][~wrong], given[~wrong])"}
ON_BOTH = {
    "TensorDataset(x[train], given)": (
        "TensorDataset(torch.cat([x[train], x[val]]), torch.cat([given, y[val]]))"
    )
}
IDENTITY = {
    "import BilevelOptimizer": "import BilevelOptimizer, Identity",
    "lr=0.1))": "lr=0.1), Identity())",
}
WATCHED = {
    "import BilevelOptimizer": "import BilevelOptimizer, HealthLog",
    "lr=0.1))": "lr=0.1)); log = HealthLog(optimizer)",
}
CLEAN: dict[int, dict[str, str]] = {
    100: {},
    200: {"[1200, 100, 497]": "[1200, 200, 397]"},
}  # the page's program has 100
ROWS: dict[str, tuple[Path, dict[str, str]]] = {
    "plain loop": (PLAIN, {}),
    "plain loop, clean images added": (PLAIN, ON_BOTH),
    "plain loop, clean images alone": (PLAIN, ON_VAL),
    "plain loop, clean images alone, as many steps": (PLAIN, {**ON_VAL, **LONGER}),
    "learned weights, Identity()": (OURS, IDENTITY),
    "learned weights, as on the page": (OURS, {}),
    "plain loop without the wrong labels": (PLAIN, ON_RIGHT),
}


@dataclass
class Settings:
    """Run the first program beside its baselines."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One run of each row for each."""
    out: Path = Path("docs/figures/first_loop.png")
    """Where the figure goes."""
    health: Path = Path("docs/figures/first_loop_health.png")
    """Where that of the health log goes."""
    table: Path = Path("docs/results/first_loop.csv")
    """Where the runs go."""


def run(source: Path, replaced: dict[str, str], seed: int, **known: Any) -> dict[str, Any]:
    """The variables that the program leaves behind; ``known`` are some that it finds."""
    text = source.read_text()
    for old, new in {**replaced, "manual_seed(0)": f"manual_seed({seed})"}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    names: dict[str, Any] = {"__name__": source.stem, **known}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(text, source, "exec"), names)
    return names


def accuracy(names: dict[str, Any]) -> float:
    """On the test images of the program."""
    model, x, y, test = (names[n] for n in ("model", "x", "y", "test"))
    return (model(x[test]).argmax(1) == y[test]).float().mean().item()


def draw(names: dict[str, Any], path: Path) -> None:
    weight, wrong = names["trust"].detach().sigmoid(), names["wrong"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=[1, 1.2])
    bins = torch.linspace(0, 1, 26).tolist()
    left.hist(
        [weight[~wrong].tolist(), weight[wrong].tolist()],
        bins,
        label=["label right", "label wrong"],
        color=["C0", "C3"],
    )
    left.set(xlabel="learned weight", ylabel="training images")
    left.legend(frameon=False, loc="upper center")
    right.set_title("trusted least: given label (true label)", fontsize=10)
    right.set_axis_off()
    x, y, train, given = (names[n] for n in ("x", "y", "train", "given"))
    for place, i in enumerate(weight.argsort()[:18].tolist()):
        row, column = divmod(place, 6)
        axis = right.inset_axes((column / 6, 0.68 - row / 3, 1 / 6, 0.22))
        axis.imshow(x[train[i]].reshape(8, 8), cmap="gray_r")
        color = "C3" if wrong[i] else "C0"
        axis.set_title(f"{given[i]} ({y[train[i]]})", fontsize=8, color=color, pad=2)
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"figure: {path}")


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    run(PLAIN, {}, seed=0)  # what is loaded once is not part of the seconds
    rows = []
    arms = list(itertools.product(CLEAN, ROWS, s.seeds))
    for clean, name, seed in tqdm(arms, unit="run"):
        source, replaced = ROWS[name]
        start = time.process_time()
        names = run(source, {**replaced, **CLEAN[clean]}, seed)
        seconds = time.process_time() - start
        rows.append([clean, name, seed, f"{accuracy(names):.6g}", f"{seconds:.3f}"])
        if not replaced and source == OURS and (clean, seed) == (100, s.seeds[0]):
            draw(names, s.out)
    run(OURS, WATCHED, s.seeds[0])["log"].plot(s.health)
    with open(s.table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clean", "method", "seed", "accuracy", "cpu_s"])
        writer.writerows(rows)
    for row in rows:
        print(*row, sep="  ")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
