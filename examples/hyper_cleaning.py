"""Learn which training labels to trust, on digits of which 40% are labelled wrong.

    python examples/hyper_cleaning.py
    python examples/hyper_cleaning.py --seeds 0 1 2
    python examples/hyper_cleaning.py --data mnist --data-root PATH --download --train 5000

Every training sample has a weight σ(φ_i). The model is trained on the weighted loss; the weights
follow the hypergradient of the loss on a small clean set. Three baselines are trained the same
way: on all labels as they are, on the correctly labelled part alone (the oracle), and on the clean
set alone. The test set is looked at once, at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.data import Images, NoisySplit, Source, load_images, noisy_split
from _shared.output import print_table, save_figure
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import (
    IHVP,
    NHGD,
    BilevelOptimizer,
    ConjugateGradient,
    Curvature,
    GaussNewton,
    Hessian,
    Identity,
    LancBiO,
    Neumann,
    Nystrom,
    NystromPCG,
    PerSample,
    RecycledCG,
    SubBiO,
)

STRATEGIES: dict[str, tuple[Callable[[], IHVP | None], Callable[[], Curvature | None]]] = {
    "default": (lambda: None, lambda: None),  # what BilevelOptimizer takes by itself
    "nystrom": (lambda: Nystrom(rank=10, damping=0.1), Hessian),
    "cg": (lambda: ConjugateGradient(10, damping=0.03), Hessian),
    "cg-gn": (lambda: ConjugateGradient(10, damping=0.03), GaussNewton),
    "neumann": (lambda: Neumann(10, damping=0.03), Hessian),
    "recycled-cg": (lambda: RecycledCG(damping=0.03), GaussNewton),
    "nystrom-pcg": (lambda: NystromPCG(damping=0.03), GaussNewton),
    "lancbio": (lambda: LancBiO(damping=0.03), GaussNewton),
    "subbio": (lambda: SubBiO(1.0, damping=0.03), GaussNewton),
    "nhgd": (
        lambda: NHGD(512, rows="per_sample", samples=32, min_damping=0.03, rescale=True),
        Hessian,
    ),
    "identity": (Identity, Hessian),
}


@dataclass
class Settings:
    """Learn which training labels to trust."""

    data: Source = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of the other sets."""
    download: bool = False
    """Fetch the set if it is not in the folder."""
    strategy: Literal[
        "default",
        "nystrom",
        "cg",
        "cg-gn",
        "neumann",
        "recycled-cg",
        "nystrom-pcg",
        "lancbio",
        "subbio",
        "nhgd",
        "identity",
    ] = "default"
    """How the linear system is solved; default, nystrom, cg, neumann, nhgd and identity take the
    exact Hessian, the others the Gauss-Newton matrix."""
    seeds: tuple[int, ...] = (0,)
    """One whole experiment for each."""
    noise: float = 0.4
    """Part of the training labels that is replaced by another class."""
    train: int = 1200
    """Training samples."""
    clean_per_class: int = 5
    """Clean samples of each class."""
    test: int = 10_000
    """Test samples, at most."""
    steps: int = 1500
    """Inner steps, full batch, of every arm."""
    every: int = 10
    """Inner steps between two outer steps."""
    hidden: int = 64
    """Units of the tanh layer."""
    lr: float = 0.2
    """Inner learning rate (SGD, momentum 0.9, weight decay 5e-4)."""
    outer_lr: float = 0.1
    """Outer learning rate (Adam)."""
    threads: int = 1
    """CPU threads; matrices this small gain nothing from more."""
    out: Path = Path("results/hyper_cleaning.png")
    """Where the figure goes."""


@dataclass
class Result:
    accuracy: dict[str, float]  # on the test set, by arm
    weights: Tensor
    precision: float
    recall: float
    report: str

    @property
    def recovered(self) -> float:
        a = self.accuracy
        return (a["cleaning"] - a["no cleaning"]) / (a["oracle"] - a["no cleaning"])


def network(s: Settings, inputs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, s.hidden), nn.Tanh(), nn.Linear(s.hidden, 10))


def sgd(model: nn.Module, s: Settings) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=s.lr, momentum=0.9, weight_decay=5e-4)


def train_plainly(x: Tensor, y: Tensor, s: Settings, seed: int, bar: tqdm) -> nn.Module:
    model = network(s, x.shape[1], seed)
    optimizer = sgd(model, s)
    for _ in range(s.steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        bar.update()
    return model


def train_with_cleaning(
    split: NoisySplit, s: Settings, seed: int, bar: tqdm
) -> tuple[nn.Module, Tensor, BilevelOptimizer]:
    model = network(s, split.x.shape[1], seed)
    phi = nn.Parameter(torch.zeros(len(split.x)))

    def train_loss() -> tuple[PerSample, Tensor]:
        # The mean of weights · losses would do; its parts serve NHGD, the outputs Gauss-Newton.
        outputs = model(split.x)
        losses = F.cross_entropy(outputs, split.labels, reduction="none")
        return PerSample(losses, weights=phi.sigmoid()), outputs

    # The bilevel lines: wrap both optimizers, then inner_step and outer_step.
    ihvp, curvature = (make() for make in STRATEGIES[s.strategy])
    optimizer = BilevelOptimizer(
        sgd(model, s), torch.optim.Adam([phi], lr=s.outer_lr), ihvp=ihvp, curvature=curvature
    )
    for step in range(1, s.steps + 1):
        optimizer.inner_step(train_loss)
        if step % s.every == 0:
            optimizer.outer_step(F.cross_entropy(model(split.clean_x), split.clean_y))
        bar.update()
    return model, phi.detach().sigmoid(), optimizer


def accuracy(model: nn.Module, split: NoisySplit) -> float:
    with torch.no_grad():
        return (model(split.test_x).argmax(1) == split.test_y).float().mean().item()


def experiment(images: Images, s: Settings, seed: int) -> tuple[Result, NoisySplit]:
    split = noisy_split(
        images,
        seed,
        train=s.train,
        clean_per_class=s.clean_per_class,
        test=s.test,
        noise=s.noise,
    )
    right = ~split.wrong
    with tqdm(total=4 * s.steps, desc=f"seed {seed}", unit="step") as bar:
        model, weights, optimizer = train_with_cleaning(split, s, seed, bar)
        arms = {
            "no cleaning": (split.x, split.labels),
            "clean split alone": (split.clean_x, split.clean_y),
            "cleaning": None,
            "oracle": (split.x[right], split.labels[right]),
        }
        scores = {
            name: accuracy(train_plainly(*arm, s, seed, bar) if arm else model, split)
            for name, arm in arms.items()
        }
    distrusted = weights < 0.5
    hits = (distrusted & split.wrong).sum().item()
    return Result(
        scores,
        weights,
        precision=hits / max(1, distrusted.sum().item()),
        recall=hits / max(1, split.wrong.sum().item()),
        report=str(optimizer.report),
    ), split


def summary(results: list[Result]) -> dict[str, list[float]]:
    """One line of the table for each name, one number for each seed."""
    arms = {f"accuracy, {arm}": [r.accuracy[arm] for r in results] for arm in results[0].accuracy}
    return arms | {
        "recovered of what noise cost": [r.recovered for r in results],
        "wrong labels found: precision": [r.precision for r in results],
        "wrong labels found: recall": [r.recall for r in results],
    }


def draw(result: Result, split: NoisySplit, width: int, path: Path) -> None:
    figure = plt.figure(figsize=(11, 4.2))
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    axis = left.subplots()
    bins = [i / 25 for i in range(26)]
    for mask, label, color in (
        (~split.wrong, "label correct", "C0"),
        (split.wrong, "label wrong", "C3"),
    ):
        axis.hist(result.weights[mask].tolist(), bins, alpha=0.6, label=label, color=color)
    axis.set(xlabel="learned weight", ylabel="training samples", title="Weights")
    axis.legend(frameon=False, loc="upper center")
    worst = result.weights.argsort()[:24].tolist()
    right.suptitle("Trusted least: given label (true label)", fontsize=12)
    for axis, i in zip(right.subplots(3, 8).flat, worst, strict=True):
        axis.imshow(split.x[i].reshape(width, width), cmap="gray_r")
        color = "C3" if split.wrong[i] else "C0"
        axis.set_title(f"{split.labels[i]} ({split.truth[i]})", fontsize=9, color=color)
        axis.set_axis_off()
    save_figure(figure, path)


def main(s: Settings) -> None:
    start = time.perf_counter()
    torch.set_num_threads(s.threads)
    images = load_images(s.data, s.data_root, s.download)
    print(f"{images.name}: {s.train} training samples, {s.noise:.0%} of the labels wrong")
    results = []
    for seed in s.seeds:
        result, split = experiment(images, s, seed)
        results.append(result)
    print(f"\nlast solve\n{results[-1].report}\n")
    rows = [
        [name, *(f"{v:.3f}" for v in [*values, mean(values)])]
        for name, values in summary(results).items()
    ]
    print_table(["", *(f"seed {seed}" for seed in s.seeds), "mean"], rows)
    draw(results[-1], split, images.width, s.out)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
