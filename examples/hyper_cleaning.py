"""Learn which training labels to trust, on digits of which half carry the next digit's name.

    python examples/hyper_cleaning.py
    python examples/hyper_cleaning.py --kind any --noise 0.4 --clean-per-class 5 --seeds 0 1 2
    python examples/hyper_cleaning.py --data mnist --data-root PATH --download --train 5000

Every training sample has a weight σ(φ_i). The model is trained on the weighted loss; the weights
follow the hypergradient of the loss on a small clean set. Beside it stand the plain uses of the
same clean images, the plain remedies for wrong labels, and the oracle, which knows the wrong ones.
There is no direct term: weights do not enter the clean loss, so it would change nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared import noise_remedies as remedies
from _shared.cleaning_strategies import STRATEGIES, Name
from _shared.data import NoisySplit, Source, load_images, noisy_split
from _shared.intervals import add_difference, by_method, half_width, save_runs, summary
from _shared.output import print_table, save_figure
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import BilevelOptimizer, PerSample


@dataclass
class Settings:
    """Learn which training labels to trust."""

    data: Source = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of the other sets."""
    download: bool = False
    """Fetch the set if it is not in the folder."""
    strategies: tuple[Name, ...] = ("cleaning", "default", "identity", "warm-cg")
    """How the linear system is solved; the first one is drawn and compared with the others."""
    damping: float = 0.1
    """Of every strategy but the default, which chooses its own, and identity, which has none."""
    plain: bool = True
    """Run the plain remedies, too."""
    seeds: tuple[int, ...] = (0,)
    """One whole experiment for each."""
    kind: remedies.NoiseKind = "next"
    """A wrong label is the next class, a mistake made again and again, or any other class."""
    noise: float = 0.5
    """Part of the training labels that is wrong."""
    train: int = 1200
    """Training samples."""
    clean_per_class: int = 3
    """Clean samples of each class."""
    test: int = 10_000
    """Test samples, at most; looked at once, at the end of a run."""
    steps: int = 800
    """Inner steps, full batch, of every run."""
    every: int = 10
    """Inner steps between two outer steps, and between two looks of early stopping."""
    hidden: int = 64
    """Units of the tanh layer."""
    lr: float = 0.2
    """Inner learning rate (SGD, momentum 0.9, weight decay 5e-4)."""
    outer_lr: float = 0.1
    """Outer learning rate (Adam)."""
    threads: int = 1
    """CPU threads; matrices this small gain nothing from more."""
    out: Path = Path("results/hyper_cleaning.png")
    """Where the figure goes; the rows go beside it."""


def new_model(s: Settings, split: NoisySplit, seed: int) -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(seed)
    inputs = split.x.shape[1]
    model = nn.Sequential(nn.Linear(inputs, s.hidden), nn.Tanh(), nn.Linear(s.hidden, 10))
    return model, torch.optim.SGD(model.parameters(), lr=s.lr, momentum=0.9, weight_decay=5e-4)


def cleaned(
    split: NoisySplit, s: Settings, seed: int, name: str, bar: tqdm
) -> tuple[nn.Module, Tensor, int]:
    """The model, the weights of the samples, and the products that it took."""
    model, sgd = new_model(s, split, seed)
    phi = nn.Parameter(torch.zeros(len(split.x)))

    def train_loss() -> tuple[PerSample, Tensor]:
        # The mean of weights · losses would do; its parts serve NHGD, the outputs Gauss-Newton.
        outputs = model(split.x)
        losses = F.cross_entropy(outputs, split.labels, reduction="none")
        return PerSample(losses, weights=phi.sigmoid()), outputs

    # The bilevel lines: wrap both optimizers, then inner_step and outer_step.
    adam = torch.optim.Adam([phi], lr=s.outer_lr)
    optimizer = BilevelOptimizer(sgd, adam, **STRATEGIES[name](s.damping))
    products = 0
    for step in range(1, s.steps + 1):
        optimizer.inner_step(train_loss)
        if step % s.every == 0:
            optimizer.outer_step(F.cross_entropy(model(split.clean_x), split.clean_y))
            products += optimizer.report.matvecs
        bar.update()
    return model, phi.detach().sigmoid(), products


def experiment(split: NoisySplit, s: Settings, seed: int) -> tuple[list[dict[str, Any]], Tensor]:
    """A row for each method, and the weights that the first strategy gave."""
    rows: list[dict[str, Any]] = []
    found: list[Tensor] = []

    def note(method: str, make: Callable[[], Any]) -> None:
        began = time.process_time()
        made = make()
        model, weights, products = made if isinstance(made, tuple) else (made, None, 0)
        row = {"kind": s.kind, "method": method, "seed": seed, "products": products}
        row["cpu_s"] = time.process_time() - began
        with torch.no_grad():
            hit = (model(split.test_x).argmax(1) == split.test_y).float().mean().item()
        row |= {"test_accuracy": hit, "precision": "", "recall": ""}
        if weights is not None:
            found.append(weights)
            both = ((weights < 0.5) & split.wrong).sum().item()
            row["precision"] = both / max(1, (weights < 0.5).sum().item())
            row["recall"] = both / max(1, split.wrong.sum().item())
        rows.append(row)

    with tqdm(desc=f"seed {seed}", unit="step") as bar:
        make = partial(new_model, s, split, seed)
        plain = remedies.plain_runs(split, make, s.steps, s.every, bar.update) if s.plain else {}
        bar.total = round(s.steps * (len(s.strategies) + 1 + remedies.RUNS * s.plain))
        for name in s.strategies:
            note(name, partial(cleaned, split, s, seed, name, bar))
        trusted = remedies.kept_and_clean(split, found[0] > 0.5)
        again = partial(remedies.fit, trusted, make, s.steps, bar.update)
        note(f"{s.strategies[0]}, trusted and clean anew", again)
        for name, fit in plain.items():
            note(name, fit)
    return rows, found[0]


def draw(rows: list[dict[str, Any]], weights: Tensor, split: NoisySplit, s: Settings) -> None:
    figure = plt.figure(figsize=(14, 4.6))
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.5, 1, 1.3])
    axis = left.subplots(gridspec_kw={"left": 0.44, "bottom": 0.13})
    by = by_method(rows, "test_accuracy")
    order = sorted(by, key=lambda name: mean(by[name]))
    colors = [
        "C2" if n == "oracle" else "C3" if n.startswith(get_args(Name)) else "C7" for n in order
    ]
    errors = [half_width(by[n]) for n in order]
    axis.barh(order, [mean(by[n]) for n in order], xerr=errors, color=colors)
    axis.set(xlabel="test accuracy", title="Learned weights (red), plain, oracle (green)")
    axis = middle.subplots(gridspec_kw={"bottom": 0.13})
    bins = [i / 25 for i in range(26)]
    axis.hist(weights[~split.wrong].tolist(), bins, histtype="step", lw=2, label="label correct")
    axis.hist(weights[split.wrong].tolist(), bins, histtype="step", lw=2, label="label wrong")
    axis.set(
        xlabel="learned weight", ylabel="training samples", title=f"{s.strategies[0]}: weights"
    )
    axis.legend(frameon=False, loc="upper center")
    worst = weights.argsort()[:24].tolist()
    right.suptitle("Trusted least: given label (true label)", fontsize=12)
    width = round(split.x.shape[1] ** 0.5)
    for axis, i in zip(right.subplots(4, 6).flat, worst, strict=True):
        axis.imshow(split.x[i].reshape(width, width), cmap="gray_r")
        color = "C3" if split.wrong[i] else "C0"
        axis.set_title(f"{split.labels[i]} ({split.truth[i]})", fontsize=9, color=color)
        axis.set_axis_off()
    save_figure(figure, s.out)


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    images = load_images(s.data, s.data_root, s.download)
    print(f"{images.name}: {s.train} samples, {s.noise:.0%} of them labelled wrong ({s.kind})")
    sizes = {k: getattr(s, k) for k in ("train", "clean_per_class", "test", "noise")}
    rows: list[dict[str, Any]] = []
    first = noisy_split(images, 0, **sizes)  # torch loads a part of itself with its first product
    cleaned(first, dataclasses.replace(s, steps=s.every), 0, "cleaning", tqdm(disable=True))
    for seed in s.seeds:
        split = remedies.mislabel(noisy_split(images, seed, **sizes), s.kind)
        more, weights = experiment(split, s, seed)
        rows += more
    add_difference(rows, "gain_of_first", s.strategies[0], -1)
    columns = ["test_accuracy", "gain_of_first", "precision", "recall"]
    print_table(["", *columns, "products", "cpu_s"], summary(rows, columns))
    save_runs(s.out.with_suffix(".csv"), rows)
    draw(rows, weights, split, s)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
