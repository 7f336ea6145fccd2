"""Learn the learning rate and weight decay of each layer while the network trains.

    python examples/learn_learning_rate.py
    python examples/learn_learning_rate.py --seeds 0 1 2
    python examples/learn_learning_rate.py --data mnist --data-root PATH --download

A network on digits is trained by Adam, and every parameter group has a learning rate and a weight
decay of its own. All start at the same, badly chosen value; every few steps the validation loss
moves them, by its derivative through the last inner steps. A grid of fixed pairs is trained beside
it, the same number of steps each, and its best is chosen by the same validation set.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.data import Images, Source, load_train_test
from _shared.output import print_table, save_figure, save_rows
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import (
    PZOBO,
    BilevelOptimizer,
    HypergradientEstimator,
    Unrolled,
    learn_hyperparameter,
)


@dataclass
class Settings:
    """Learn the learning rate and weight decay of each layer while the network trains."""

    data: Source = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of the other sets."""
    download: bool = False
    """Fetch the set if it is not in the folder."""
    estimator: Literal["unrolled", "pzobo"] = "unrolled"
    """How the derivative through the inner steps is made."""
    seeds: tuple[int, ...] = (0,)
    """One whole experiment for each."""
    train: int = 700
    """Training samples."""
    validation: int = 700
    """Validation samples: they move the learned values, and choose among the grid."""
    steps: int = 600
    """Inner steps of every run."""
    every: int = 10
    """Inner steps between two outer steps, and the length of the unrolled window."""
    batch: int = 64
    """Training samples in a step."""
    hidden: int = 64
    """Units in each of two hidden layers."""
    lr: float = 1e-5
    """Where the learned learning rates start."""
    weight_decay: float = 1e-4
    """Where the learned weight decays start."""
    outer_lr: float = 0.2
    """Of Adam on the logarithms of the learned values."""
    grid_lr: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """Fixed learning rates to compare with."""
    grid_decay: tuple[float, ...] = (1e-6, 1e-4, 1e-2)
    """Fixed weight decays to compare with."""
    threads: int = 1
    """CPU threads; matrices this small gain nothing from more."""
    out: Path = Path("results/learn_learning_rate.png")
    """Where the figure goes; a table of the same name lies beside it."""


@dataclass
class Split:
    x: Tensor
    y: Tensor
    xv: Tensor
    yv: Tensor
    xt: Tensor
    yt: Tensor


@dataclass
class Run:
    val_loss: float
    accuracy: float  # on the test set
    history: list[list[float]] = field(default_factory=list)  # learned values at each outer step


def make_split(images: tuple[Images, Images], s: Settings, seed: int) -> Split:
    train, test = images
    order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(seed))
    a, b = order[: s.train], order[s.train : s.train + s.validation]
    return Split(train.x[a], train.y[a], train.x[b], train.y[b], test.x, test.y)


def network(s: Settings, inputs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, s.hidden),
        nn.GELU(),
        nn.Linear(s.hidden, s.hidden),
        nn.GELU(),
        nn.Linear(s.hidden, 10),
    )


def adam(model: nn.Sequential, lr: float, weight_decay: float) -> torch.optim.Adam:
    groups = [{"params": list(m.parameters())} for m in model if isinstance(m, nn.Linear)]
    return torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay)


def batches(split: Split, s: Settings, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(len(split.x), (s.batch,), generator=g) for _ in range(s.steps)]


def judged(model: nn.Module, split: Split) -> Run:
    with torch.no_grad():
        loss = F.cross_entropy(model(split.xv), split.yv).item()
        hits = (model(split.xt).argmax(1) == split.yt).float().mean().item()
    return Run(loss if loss == loss else float("inf"), hits)


def train_fixed(
    split: Split, s: Settings, seed: int, lr: float, decay: float, bar: tqdm[None]
) -> Run:
    model = network(s, split.x.shape[1], seed)
    optimizer = adam(model, lr, decay)
    for i in batches(split, s, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(split.x[i]), split.y[i]).backward()
        optimizer.step()
        bar.update()
    return judged(model, split)


def train_learning(split: Split, s: Settings, seed: int, bar: tqdm[None]) -> Run:
    model = network(s, split.x.shape[1], seed)
    inner = adam(model, s.lr, s.weight_decay)
    # The bilevel lines: values of the inner optimizer become outer parameters, one a group.
    learned = learn_hyperparameter(inner, "lr") + learn_hyperparameter(inner, "weight_decay")
    estimator: HypergradientEstimator = (
        Unrolled() if s.estimator == "unrolled" else PZOBO(4, antithetic=True)
    )
    outer = torch.optim.Adam(learned, lr=s.outer_lr)
    optimizer = BilevelOptimizer(inner, outer, estimator=estimator)
    history = []
    for step, i in enumerate(batches(split, s, seed), 1):
        optimizer.inner_step(lambda i=i: F.cross_entropy(model(split.x[i]), split.y[i]))
        if step % s.every == 0:
            optimizer.outer_step(F.cross_entropy(model(split.xv), split.yv))
            history.append([phi.exp().item() for phi in learned])
        bar.update()
    run = judged(model, split)
    run.history = history
    return run


def experiment(images: tuple[Images, Images], s: Settings, seed: int) -> dict[str, Run]:
    split = make_split(images, s, seed)
    pairs = list(itertools.product(s.grid_lr, s.grid_decay))
    with tqdm(total=(2 + len(pairs)) * s.steps, desc=f"seed {seed}", unit="step") as bar:
        learned = train_learning(split, s, seed, bar)
        start = train_fixed(split, s, seed, s.lr, s.weight_decay, bar)
        grid = {pair: train_fixed(split, s, seed, *pair, bar) for pair in pairs}
    ranked = sorted(grid.values(), key=lambda run: run.val_loss)
    return {
        "fixed at the start": start,
        "learned": learned,
        "grid, best": ranked[0],
        "grid, median": ranked[len(ranked) // 2],
    }


def draw(runs: dict[str, Run], s: Settings) -> None:
    history = torch.tensor(runs["learned"].history)
    steps = [s.every * (i + 1) for i in range(len(history))]
    groups = history.shape[1] // 2
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    parts = (("learning rate", history[:, :groups]), ("weight decay", history[:, groups:]))
    for axis, (name, values) in zip(axes, parts, strict=True):
        for layer in range(groups):
            axis.plot(steps, values[:, layer], label=f"layer {layer + 1}")
        axis.set(xlabel="inner step", ylabel=name, yscale="log", title=f"Learned {name}")
        axis.legend(frameon=False)
    figure.tight_layout()
    save_figure(figure, s.out)


def main(s: Settings) -> None:
    start = time.perf_counter()
    torch.set_num_threads(s.threads)
    images = load_train_test(s.data, s.data_root, s.download)
    print(f"{images[0].name}: {s.train} training, {s.validation} validation samples")
    results = [experiment(images, s, seed) for seed in s.seeds]
    rows = [
        [
            name,
            1 if name in ("learned", "fixed at the start") else len(s.grid_lr) * len(s.grid_decay),
            f"{mean(r[name].val_loss for r in results):.3f}",
            *(f"{r[name].accuracy:.3f}" for r in results),
            f"{mean(r[name].accuracy for r in results):.3f}",
        ]
        for name in results[0]
    ]
    header = ["", "runs", "val. loss", *(f"accuracy, seed {seed}" for seed in s.seeds), "mean"]
    print_table(header, rows)
    save_rows(s.out.with_suffix(".csv"), header, rows)
    draw(results[-1], s)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
