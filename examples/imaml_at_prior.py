"""Is a task's network at its optimum after ten steps? The gradient of iMAML, before any training.

    python examples/imaml_at_prior.py
    python examples/imaml_at_prior.py --data omniglot --data-root PATH --seeds 0 1 2

iMAML (imaml.py) differentiates the optimum of loss + λ/2·‖θ - φ‖²; what it has is a few SGD steps
from the prior φ. Here the same few steps are also differentiated exactly, as MAML does, and the
cosine between the two gradients by φ is printed: 1 if the steps have arrived, near 0 if the other
speaks of a point that they have not seen. Nothing is trained; each seed is an untrained
network of its own, with its own tasks.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.fewshot import FewShotSource, Task, load_few_shot, network
from _shared.output import print_table, save_figure, save_rows
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import (
    BilevelOptimizer,
    ConjugateGradient,
    Hessian,
    HypergradientEstimator,
    Identity,
    ImplicitDifferentiation,
    Unrolled,
)

# λ is part of the Hessian. None: the default as shipped, on the Gauss-Newton matrix.
ESTIMATORS: dict[str, Callable[[float], HypergradientEstimator | None]] = {
    "hessian": lambda lam: ImplicitDifferentiation(ConjugateGradient(20), Hessian()),
    "default": lambda lam: None,
    "identity": lambda lam: ImplicitDifferentiation(Identity(1 / lam)),
}


@dataclass(frozen=True)
class Settings:
    """Compare two gradients of the prior. A quick look: the defaults."""

    data: FewShotSource = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of omniglot28.npz and omniglot_splits."""
    shots: tuple[int, ...] = (1, 5)
    """Images of each of the five classes that a task shows."""
    lams: tuple[float, ...] = (0.5, 2.0, 8.0)
    """λ of the proximal term."""
    inner_steps: tuple[int, ...] = (10, 30, 100)
    """SGD steps from the prior."""
    inner_lr: float = 0.1
    """Their rate; the published one."""
    queries: int = 5
    """Images of each class that a task asks for."""
    tasks: int = 2
    """Tasks of a seed, whose cosines are averaged."""
    seeds: tuple[int, ...] = (0,)
    """Of the network and of the tasks."""
    channels: int = 16
    """Of each of the four convolutions."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of the figure and the table."""


def gradient(
    prior: nn.Module, task: Task, lam: float, steps: int, lr: float,
    estimator: HypergradientEstimator | None,
) -> tuple[Tensor, int]:  # fmt: skip
    """d (loss of the queries) / d prior as one vector, and the products that it took."""
    model = copy.deepcopy(prior)
    # The bilevel lines: θ is the inner level, the prior φ the outer one.
    optimizer = BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr),
        torch.optim.SGD(prior.parameters(), lr=1.0),  # never steps
        estimator=estimator,
        on_trouble="ignore",  # the Hessian is indefinite here: that is part of the finding
    )

    def train_loss() -> tuple[Tensor, Tensor]:
        outputs = model(task.support_x)
        pairs = zip(model.parameters(), prior.parameters(), strict=True)
        pull = sum((p - q).square().sum() for p, q in pairs)
        return F.cross_entropy(outputs, task.support_y) + lam / 2 * pull, outputs

    optimizer.start_from(prior.parameters())
    for _ in range(steps):
        optimizer.inner_step(train_loss)
    parts = optimizer.hypergradient(F.cross_entropy(model(task.query_x), task.query_y))
    found = [torch.zeros_like(p) if g is None else g
             for p, g in zip(prior.parameters(), parts, strict=True)]  # fmt: skip
    return torch.cat([g.flatten() for g in found]), optimizer.report.matvecs


HEADER = ("method", "shots", "lam", "inner_steps", "seed", "cosine", "norm_ratio", "cpu_s",
          "products")  # fmt: skip


def compare(s: Settings) -> list[list[str | float]]:
    """One row, as in HEADER, for each setting, seed and way to the implicit gradient."""
    data = load_few_shot(s.data, s.data_root)
    rows: list[list[str | float]] = []
    settings = [(seed, k, lam, steps) for seed in s.seeds for k in s.shots for lam in s.lams
                for steps in s.inner_steps]  # fmt: skip
    for seed, shots, lam, steps in tqdm(settings):
        torch.manual_seed(seed)
        prior = network(5, s.channels, data.width)
        g = torch.Generator().manual_seed(seed)
        tasks = [data.train.task(5, shots, s.queries, g) for _ in range(s.tasks)]
        exact = [gradient(prior, task, lam, steps, s.inner_lr, Unrolled())[0] for task in tasks]
        for name, make in ESTIMATORS.items():
            start = time.process_time()
            found, products = zip(
                *(gradient(prior, task, lam, steps, s.inner_lr, make(lam)) for task in tasks),
                strict=True,
            )
            seconds = time.process_time() - start
            pairs = list(zip(found, exact, strict=True))
            cosine = mean(F.cosine_similarity(a, e, dim=0).item() for a, e in pairs)
            ratio = mean((a.norm() / e.norm()).item() for a, e in pairs)
            rows.append([name, shots, lam, steps, seed, cosine, ratio, seconds, sum(products)])
    return rows


def draw(rows: list[list[str | float]], s: Settings) -> None:
    """A point a seed, a panel for each λ and number of shots."""
    figure, axes = plt.subplots(
        *(len(s.shots), len(s.lams)), figsize=(3.8 * len(s.lams), 2.6 * len(s.shots)),
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for line, shots in zip(axes, s.shots, strict=True):
        for axis, lam in zip(line, s.lams, strict=True):
            for i, (name, mark) in enumerate(zip(ESTIMATORS, "os^", strict=True)):
                of = [r for r in rows if r[:3] == [name, shots, lam]]
                at = [s.inner_steps.index(r[3]) + 0.2 * (i - 1) for r in of]  # type: ignore
                axis.plot(at, [float(r[5]) for r in of], mark, ms=5, label=name)
            axis.axhline(0, color="black", lw=0.6)
            axis.set(title=f"{shots}-shot, λ = {lam:g}", ylim=(-1.05, 1.05))
            axis.set_xticks(range(len(s.inner_steps)), [str(k) for k in s.inner_steps])
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("inner steps")
    axes[0][0].set_ylabel("cosine with the\nexact derivative")
    axes[0][0].legend(frameon=False, fontsize=8, loc="lower left", ncols=3)
    figure.tight_layout()
    save_figure(figure, s.out / "imaml_at_prior.png")


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    rows = compare(s)
    table = [[f"{r[1]}-shot, λ = {r[2]:g}, {r[3]} steps", r[4], r[0], f"{r[5]:.3f}", f"{r[6]:.3g}",
              f"{r[8]}"] for r in rows]  # fmt: skip
    print_table(["", "seed", "method", "cosine", "|implicit| / |exact|", "products"], table)
    cells = [[f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows]
    save_rows(s.out / "imaml_at_prior.csv", HEADER, cells)
    draw(rows, s)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
