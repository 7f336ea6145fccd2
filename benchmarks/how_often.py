"""How often an outer step, on which batch, with which damping and rate: the first program, varied.

    python -m benchmarks.how_often

Each row is the text of examples/first_loop.py with the lines replaced that the row names. The test
accuracy is that of its network; ``retrained`` that of one trained from scratch with the weights
that it ended with, held fixed; ``gain`` the test accuracy less that of the program as it stands, at
the same seed. One line a run goes to docs/results/how_often.csv.
"""

from __future__ import annotations

import csv
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from hyperopt_torch import HypergradientWarning

from .first_loop import accuracy, run
from .lines import OURS

WHEN, STEP = "if step % 5 == 4:", "optimizer.outer_step(F.cross_entropy(model(xv), yv))"
EPOCHS, OUTER, CLEAN = "for _ in range(60):", "lr=0.1))", "TensorDataset(x[val], y[val]), 100,"
NOW = "(10 * epoch + step)"
FIELDS = ["setting", "every", "rate", "value", "seed", "accuracy", "retrained", "gain"]
FIELDS += ["val_loss", "cpu_s"]
# Inner steps between two outer steps, and the outer rates that were tried with them.
RATES = {1: (0.03, 0.1), 5: (0.01, 0.03, 0.1, 0.3), 20: (0.03, 0.1, 0.3), 100: (0.1, 0.3)}
PAGE = ("interval and rate", 5, 0.1, "")


@dataclass
class Settings:
    """Vary the first program."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each row for each."""
    table: Path = Path("docs/results/how_often.csv")
    """Where the runs go; those in it are not done again."""


def when(every: int, rate: float, warm_up: int = 0) -> dict[str, str]:
    """The replaced lines of an interval, an outer rate, and inner steps before the first one."""
    return {
        EPOCHS: "for epoch in range(60):",
        WHEN: f"if {NOW} % {every} == {every - 1} and {NOW} >= {warm_up}:",
        OUTER: f"lr={rate}))",
    }


def closure(size: int) -> dict[str, str]:
    """An outer step whose curvature is that of ``size`` training samples, drawn anew."""
    return {
        STEP: (
            f"some = torch.randperm(1200)[:{size}]; optimizer.outer_step(F.cross_entropy(model(xv),"
            " yv), lambda: train_loss(x[train][some], given[some], some))"
        )
    }


def damped(damping: float) -> dict[str, str]:
    """The default strategy with a damping set by hand."""
    return {
        "import BilevelOptimizer": "import BilevelOptimizer, RecycledCG",
        OUTER: f"lr=0.1), RecycledCG(window=20, damping={damping}))",
    }


def arms() -> dict[tuple[str, int, float, str], dict[str, str]]:
    """(setting, inner steps, rate, value) -> what is replaced; nothing for the program as it is."""
    pairs = [(every, rate) for every, rates in RATES.items() for rate in rates]
    found = {("interval and rate", e, r, ""): when(e, r) for e, r in pairs}
    for size in (10, 25, 50):
        found["clean images a step", 5, 0.1, str(size)] = {CLEAN: CLEAN.replace("100", str(size))}
    for size in (30, 480, 1200):
        found["training samples a solve", 5, 0.1, str(size)] = closure(size)
    for damping in (0.01, 0.1, 1.0):
        found["damping", 5, 0.1, str(damping)] = damped(damping)
    for steps in (100, 300):
        found["warm-up", 5, 0.1, str(steps)] = when(5, 0.1, steps)
    usual = {"clean images a step": "100", "training samples a solve": "the batch of 120"}
    usual |= {"damping": "default", "warm-up": "0"}
    as_it_is = {(setting, 5, 0.1, value): {} for setting, value in usual.items()}
    return {**found, PAGE: {}, **as_it_is}


def one(replaced: dict[str, str], seed: int) -> dict[str, float]:
    """A run, and the training with what it found."""
    begin = time.process_time()
    names = run(OURS, replaced, seed)
    cpu = time.process_time() - begin
    fixed = {"torch.nn.Parameter(torch.zeros(1200))": "learned", WHEN: "if False:"}
    fixed["[trust]"] = "[torch.nn.Parameter(trust)]"
    again = run(OURS, fixed, seed, learned=names["trust"].detach())
    with torch.no_grad():
        loss = F.cross_entropy(names["model"](names["x"][names["val"]]), names["y"][names["val"]])
    found = {"accuracy": accuracy(names), "retrained": accuracy(again), "val_loss": float(loss)}
    return found | {"cpu_s": cpu}


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", HypergradientWarning)
    rows: list[dict[str, str]] = []
    if s.table.exists():
        with open(s.table, newline="") as file:
            rows = list(csv.DictReader(file))
    done = {tuple(row[f] for f in FIELDS[:5]) for row in rows}
    found, same = arms(), dict[tuple, dict[str, float]]()
    todo = [(key, seed) for seed in s.seeds for key in found]
    for key, seed in tqdm([t for t in todo if (*map(str, t[0]), str(t[1])) not in done]):
        factors = dict(zip(FIELDS, (*key, seed), strict=False))
        text = (seed, *found[key].items())
        if text not in same:
            same[text] = one(found[key], seed)
        results = {k: f"{v:.6g}" for k, v in same[text].items()}
        rows.append({k: str(v) for k, v in (factors | results).items()})
        write(rows, s.table)


def write(rows: list[dict[str, str]], path: Path) -> None:
    """The file, the gains over the page's program filled in."""
    base = {r["seed"]: float(r["accuracy"]) for r in rows if _key(r) == tuple(map(str, PAGE))}
    for row in rows:
        if row["seed"] in base:
            row["gain"] = f"{float(row['accuracy']) - base[row['seed']]:.6g}"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[field] for field in FIELDS[:4])


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
