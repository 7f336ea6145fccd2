"""Which picture of the Fisher matrix gives the best hypergradient: NHGD's structures side by side.

    python -m benchmarks.fisher

Hyper-cleaning of scikit-learn's digits, 800 training samples, 40% of the labels wrong, a weight
σ(φ_i) each; batches of 128, ten inner steps between two of twelve outer ones. All strategies look
at the same inner steps, and the outer level follows the exact hypergradient, so they judge the same
points. Each one's hypergradient, b and J of all samples, is held against the exact one: relative
error, cosine, and the error of its best multiple (``rescale=True``); medians over the outer steps.
"softmax": 650 parameters, exact Hessian; "tanh": 760 parameters, ten hidden units, exact
Gauss-Newton matrix. One row a strategy, problem and seed goes to docs/results/fisher.csv.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from hyperopt_torch import (
    IHVP,
    NHGD,
    BilevelOptimizer,
    DenseSolve,
    GaussNewton,
    Identity,
    Solution,
)
from hyperopt_torch.operators import LinearOperator

from ._bilevel_runs import Cleaning, Setting

SOFTMAX = Setting("softmax, μ = 0.01", penalty=0.005, outer_lr=0.1, inner_lr=0.3, batch=128)
SETTINGS = [
    SOFTMAX,
    replace(SOFTMAX, name="softmax, μ = 0.001", penalty=0.0005),
    replace(SOFTMAX, name="tanh, μ = 0.01", hidden=10, curvature=GaussNewton),
]
NAMES = ("problem", "strategy", "seed", "error", "cosine", "rescaled_error")


def strategies() -> dict[str, IHVP]:
    rows = {"rows": "per_sample", "decay": 0.99}
    factors = {"structure": "kronecker", "decay": 0.99}
    return {
        "Identity(1.0)": Identity(1.0),
        "batch rows": NHGD(),
        "batch_centred rows": NHGD(rows="batch_centred"),
        "per_sample rows": NHGD(rows="per_sample"),
        "per_sample, window 512, samples 32": NHGD(512, rows="per_sample", samples=32),
        "per_sample, dense": NHGD(structure="dense", **rows),
        "per_sample, diagonal": NHGD(structure="diagonal", **rows),
        "batch, kronecker": NHGD(**factors),
        "batch_centred, kronecker": NHGD(**factors, rows="batch_centred"),
        "per_sample, kronecker": NHGD(**factors, rows="per_sample"),
        "per_sample, kronecker, samples 32": NHGD(**factors, rows="per_sample", samples=32),
    }


class Panel(IHVP):
    """The exact solution; its parts see the same steps, and their answers are held against it."""

    def __init__(self, parts: dict[str, IHVP]) -> None:
        super().__init__()
        vars(self).update(parts)
        self._names = list(parts)
        self._found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        exact = _vector(DenseSolve().solve(operator, rhs))
        _, target = operator.joint(exact)
        for name in self._names:
            x = _vector(getattr(self, name).solve(operator, rhs))
            Hx, cross = operator.joint(x)
            best = cross * (x @ rhs) / (x @ Hx)
            cosine = cross @ target / (cross.norm() * target.norm())
            errors = [(y - target).norm() / target.norm() for y in (cross, best)]
            self._found[name].append((float(errors[0]), float(cosine), float(errors[1])))
        return Solution(exact, cross=target)


def _vector(found: Tensor | Solution) -> Tensor:
    return found.x if isinstance(found, Solution) else found


def run(setting: Setting, seed: int, outer_steps: int) -> list[tuple[str | float, ...]]:
    torch.manual_seed(seed)
    task = Cleaning(setting, seed, torch.float64)
    panel = Panel(strategies())
    bilevel = BilevelOptimizer(
        torch.optim.SGD(task.model.parameters(), lr=setting.inner_lr, momentum=0.9),
        torch.optim.Adam([task.weights], lr=setting.outer_lr),
        panel,
        curvature=setting.curvature(),
    )
    for _ in tqdm(range(outer_steps), f"{setting.name}, seed {seed}", leave=False):
        for _ in range(10):
            chosen = torch.randint(len(task.x), (setting.batch,), generator=task.generator)
            bilevel.inner_step(lambda chosen=chosen: task.train_loss(chosen))
        bilevel.outer_step(task.val_loss(), task.train_loss)
    return [
        (setting.name, name, seed, *(median(column) for column in zip(*found, strict=True)))
        for name, found in panel._found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--outer-steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "fisher.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(NAMES)
        for setting in SETTINGS:
            for seed in args.seeds:
                for row in run(setting, seed, args.outer_steps):
                    told = [f"{v:.6g}" if isinstance(v, float) else v for v in row]
                    writer.writerow(told)
                    print(*told, sep="  ", flush=True)


if __name__ == "__main__":
    main()
