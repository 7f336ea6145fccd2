r"""Learn to weigh samples of a long-tailed set by their loss (Hataya & Yamada, AISTATS 2023).

    python examples/data_reweighting.py
    python examples/data_reweighting.py --data fashion --data-root PATH --seeds 0 1 2 \
        --strategies nystrom recycled-cg --weight-input loss+class --lr 0.02 --steps 400
    python examples/data_reweighting.py --robustness

Class c keeps n_max * imbalance^(-c / (C - 1)) training samples. A small network turns the loss of
a sample, detached, into its weight (with --weight-input loss+class, which is ours and not the
paper's, the loss and the class); its parameters follow the hypergradient of the loss on a small
balanced validation set, which is disjoint from training and test set. Published beside ours:
CIFAR-10 and a WideResNet-28-10, another data set and another model. The test set is looked at
once, at the end of a run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, get_args

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.checkpoint import Checkpoint, Stream
from _shared.data import Images, load_train_test
from _shared.output import print_table, save_figure, save_rows
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
    LancBiO,
    Neumann,
    Nystrom,
    NystromPCG,
    PerSample,
    RecycledCG,
)

# A strategy has a memory, so each run makes its own; None: no reweighting.
Method = tuple[Callable[[], IHVP], Callable[[], Curvature]] | None

STRATEGIES: dict[str, Method] = {
    "baseline": None,
    "cg": (lambda: ConjugateGradient(10, damping=0.1), GaussNewton),
    "neumann": (lambda: Neumann(10, damping=0.1), Hessian),
    "nystrom": (lambda: Nystrom(10, damping=0.1), Hessian),
    "lancbio": (lambda: LancBiO(damping=0.1), GaussNewton),
    "nhgd": (
        lambda: NHGD(128, rows="per_sample", samples=4, min_damping=0.1, rescale=True),
        Hessian,
    ),
    "nystrom-pcg": (lambda: NystromPCG(damping=0.1, max_iter=1), GaussNewton),
    "recycled-cg": (lambda: RecycledCG(damping=0.1), GaussNewton),
}

# Test accuracy on CIFAR-10 by imbalance, Hataya & Yamada 2023; table 6: .78 to .79 everywhere.
PUBLISHED = {
    "baseline": {200: 0.62, 100: 0.67, 50: 0.74},
    "cg": {200: 0.63, 100: 0.70, 50: 0.78},
    "neumann": {200: 0.60, 100: 0.73, 50: 0.79},
    "nystrom": {200: 0.66, 100: 0.73, 50: 0.79},
}

Name = Literal[
    "baseline", "cg", "neumann", "nystrom", "lancbio", "nhgd", "nystrom-pcg", "recycled-cg"
]


@dataclass
class Settings:
    """Learn to weigh samples of a long-tailed set by their loss."""

    data: Literal["digits", "mnist", "fashion", "cifar10"] = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of the other sets."""
    download: bool = False
    """Fetch the set if it is not in the folder."""
    imbalance: tuple[int, ...] = (200, 100, 50)
    """Size of the largest class over that of the smallest."""
    strategies: tuple[Name, ...] = get_args(Name)
    """Which methods; "baseline": no reweighting."""
    seeds: tuple[int, ...] = (0,)
    """One whole experiment for each."""
    robustness: bool = False
    """Table 6 instead: Nystrom with rank 5, 10, 20 and damping .01, .1, 1; last imbalance."""
    n_max: int = 5000
    """Samples of the largest class, at most."""
    val_per_class: int = 10
    """Validation samples of each class."""
    model: Literal["conv", "mlp"] = "conv"
    """Two convolutions and a linear layer, or one hidden layer."""
    steps: int = 600
    """Inner steps (paper: 15000)."""
    every: int = 10
    """Inner steps between two outer steps."""
    batch: int = 100
    """Training samples an inner step."""
    curvature_batch: int = 0
    """Training samples an outer step; 0: those of the last inner step."""
    lr: float = 0.1
    """Inner learning rate (SGD, momentum 0.9, weight decay 5e-4)."""
    outer_lr: float = 1e-2
    """Outer learning rate (Adam; paper: 1e-5). A first guess, not tuned."""
    weight_input: Literal["loss", "loss+class"] = "loss"
    """What the weight network sees: the loss of a sample (the paper), or also its class, one-hot
    (ours: it can tell a rare class from a hard sample). Fashion-MNIST, 400 steps, three seeds,
    RecycledCG at lr 0.02 against the baseline at 0.05, the better of each by validation loss:
    .768 and .734 at imbalance 200 (spread .026 and .038), .800 and .785 at 100, .794 and .796 at
    50."""
    normalise: bool = True
    """Divide the weights by their mean over the batch, so that reweighting does not slow down
    learning beside the baseline. Ours, not the paper's as far as we know. With the
    loss alone, lr 0.1 and outer lr 1e-2 it made things worse (Fashion-MNIST, imbalance 200, one
    seed, 600 steps)."""
    paper: bool = False
    """The published steps, learning rates and weights: by the loss alone, not normalised."""
    resume: bool = False
    """Go on where an interrupted run with the same options and --out stopped."""
    save_every: int = 200
    """Inner steps between two checkpoints."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of the figure, the table and the checkpoint."""


@dataclass(frozen=True)
class Split:
    """Images (n, channels, width, width) and labels; training set long-tailed."""

    x: Tensor
    y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(s: Settings) -> tuple[Images, Images]:
    if s.data != "cifar10":
        return load_train_test(s.data, s.data_root, s.download)
    if s.data_root is None:
        raise SystemExit("--data cifar10 needs --data-root PATH (and --download the first time).")
    from torchvision.datasets import CIFAR10

    def part(train: bool) -> Images:
        data = CIFAR10(str(s.data_root), train=train, download=s.download)
        x = torch.tensor(data.data).permute(0, 3, 1, 2).float().flatten(1) / 255
        return Images(x, torch.tensor(data.targets), 32, "CIFAR10, 32x32")

    return part(True), part(False)


def long_tailed(train: Images, test: Images, imbalance: int, s: Settings, seed: int) -> Split:
    """The validation images are set aside first; the tail is cut from what remains."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.y), generator=g)
    classes = int(train.y.max()) + 1
    members = [order[train.y[order] == c] for c in range(classes)]
    val = torch.cat([m[: s.val_per_class] for m in members])
    members = [m[s.val_per_class :] for m in members]
    n_max = min(s.n_max, *map(len, members))
    sizes = [max(1, round(n_max * imbalance ** (-c / (classes - 1)))) for c in range(classes)]
    chosen = torch.cat([m[:n] for m, n in zip(members, sizes, strict=True)])

    def images(x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, train.width, train.width)

    return Split(
        *(images(train.x[chosen]), train.y[chosen]),
        *(images(train.x[val]), train.y[val]),
        *(images(test.x), test.y),
    )


def network(s: Settings, split: Split) -> nn.Sequential:
    channels, width = split.x.shape[1:3]
    if s.model == "mlp":
        hidden = nn.Linear(channels * width**2, 64)
        return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (width // 4) ** 2, 10)),
    )


def run(
    split: Split,
    strategy: Method,
    s: Settings,
    resume: bool,
    log: dict[str, Any],
    bar: tqdm,
) -> dict[str, Any]:
    """One method on one long-tailed set."""
    model = network(s, split)
    inputs = 1 if s.weight_input == "loss" else 11
    weigh = nn.Sequential(nn.Linear(inputs, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    sgd = torch.optim.SGD(model.parameters(), lr=s.lr, momentum=0.9, weight_decay=5e-4)
    adam = torch.optim.Adam(weigh.parameters(), lr=s.outer_lr)
    # The bilevel lines: wrap both optimizers, then inner_step and outer_step.
    ihvp, curvature = (make() for make in strategy) if strategy else (None, None)
    optimizer = BilevelOptimizer(sgd, adam, ihvp=ihvp, curvature=curvature)
    batches = torch.Generator().manual_seed(torch.initial_seed())

    def weights_of(losses: Tensor, labels: Tensor) -> Tensor:
        seen = losses.detach()[:, None]
        if s.weight_input == "loss+class":
            seen = torch.cat([seen, F.one_hot(labels, 10)], 1)
        return weigh(seen)[:, 0]

    def draw(size: int) -> Callable[[], Any]:
        chosen = torch.randint(len(split.x), (size,), generator=batches)

        def train_loss() -> Any:
            outputs = model(split.x[chosen])
            losses = F.cross_entropy(outputs, split.y[chosen], reduction="none")
            if strategy is None:
                return losses
            # The mean of weights · losses; its parts serve NHGD, the outputs Gauss-Newton.
            weights = weights_of(losses, split.y[chosen])
            return PerSample(losses, weights / weights.mean() if s.normalise else weights), outputs

        return train_loss

    parts = {"model": model, "weigh": weigh, "optimizer": optimizer, "batches": Stream(batches)}
    checkpoint = Checkpoint(s.out / "data_reweighting.checkpoint", **parts)
    start, products, seconds = 0, 0, 0.0
    if resume:
        start, saved = checkpoint.load()
        products, seconds = saved["products"], saved["seconds"]
        bar.update(start)
    for step in range(start + 1, s.steps + 1):
        began = time.process_time()
        optimizer.inner_step(draw(s.batch))
        if strategy and step % s.every == 0:
            larger = draw(s.curvature_batch) if s.curvature_batch else None
            optimizer.outer_step(F.cross_entropy(model(split.val_x), split.val_y), larger)
            products += optimizer.report.matvecs
        seconds += time.process_time() - began
        if step % s.save_every == 0:
            checkpoint.save(step, **log, products=products, seconds=seconds)
        bar.update()
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) for x in split.test_x.split(1000)]) == split.test_y
        weights = torch.ones(len(split.y))
        if strategy:
            outputs = torch.cat([model(x) for x in split.x.split(1000)])
            weights = weights_of(F.cross_entropy(outputs, split.y, reduction="none"), split.y)
            weights = weights / weights.mean()
        classes = [right[split.test_y == c].float().mean().item() for c in range(10)]
        return {
            "accuracy": right.float().mean().item(),
            "classes": classes,
            "val loss": F.cross_entropy(model(split.val_x), split.val_y).item(),
            "weights": [weights[split.y == c].mean().item() for c in range(10)],
            "products": products,
            "seconds": seconds,
        }


def methods(s: Settings) -> dict[str, Method]:
    """What to run, by name."""
    if not s.robustness:
        return {name: STRATEGIES[name] for name in s.strategies}
    grid: dict[str, Method] = {
        f"nystrom k={k} rho={rho:g}": (partial(Nystrom, k, damping=rho), Hessian)
        for k in (5, 10, 20)
        for rho in (0.01, 0.1, 1.0)
    }
    return {"baseline": None} | grid


def experiments(s: Settings) -> dict[str, dict[str, Any]]:
    """Every imbalance, seed and method; what is finished goes into the checkpoint as a whole."""
    path = s.out / "data_reweighting.checkpoint"
    free = ("resume", "save_every", "threads", "out", "data_root", "download")
    options = {k: str(v) for k, v in dataclasses.asdict(s).items() if k not in free}
    log: dict[str, Any] = Checkpoint(path).load()[1] if s.resume else {}
    if log and log["options"] != options:
        raise SystemExit(f"{path} belongs to other options; leave out --resume.")
    done: dict[str, dict[str, Any]] = log.get("done", {})
    train, test = load(s)
    print(f"{train.name}, {s.model}, {s.steps} inner steps")
    with tqdm(
        total=len(methods(s)) * len(s.seeds) * len(s.imbalance) * s.steps, unit="step"
    ) as bar:
        for imbalance, seed in ((i, seed) for i in s.imbalance for seed in s.seeds):
            split = long_tailed(train, test, imbalance, s, seed)
            for name, method in methods(s).items():
                key = f"{imbalance} {name} {seed}"
                if key in done:
                    bar.update(s.steps)
                    continue
                torch.manual_seed(seed)  # networks and strategies take their seed from it
                bar.set_description(f"{imbalance}, {name}, seed {seed}")
                going = {"options": options, "done": done, "current": key}
                interrupted = log.get("current") == key
                done[key] = run(split, method, s, interrupted, going, bar)
                Checkpoint(path).save(0, options=options, done=done, current="")
    return done


def table(s: Settings, done: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Means over seeds, and the standard deviation where there are several."""

    def cell(values: list[float]) -> str:
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        return f"{mean(values):.3f}{spread}"

    header = ["imbalance, method", "test accuracy", "3 rarest", "their weight", "validation loss"]
    rows = []
    for imbalance in s.imbalance:
        for name in methods(s):
            runs = [done[f"{imbalance} {name} {seed}"] for seed in s.seeds]
            published = PUBLISHED.get(name, {}).get(imbalance, "")
            rows.append(
                [
                    f"{imbalance} {name}",
                    cell([r["accuracy"] for r in runs]),
                    cell([mean(r["classes"][-3:]) for r in runs]),
                    cell([mean(r["weights"][-3:]) for r in runs]),
                    cell([r["val loss"] for r in runs]),
                    f"{mean(r['products'] for r in runs):.0f}",
                    f"{mean(r['seconds'] for r in runs):.1f}",
                    str(published),
                ]
            )
    return [*header, "products", "CPU s", "published, CIFAR-10"], rows


def draw_figure(s: Settings, done: dict[str, dict[str, Any]]) -> None:
    """Accuracy of each method by imbalance, and the weights they gave to the classes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in methods(s):
        by_imbalance = [
            [done[f"{i} {name} {seed}"]["accuracy"] for seed in s.seeds] for i in s.imbalance
        ]
        style = "ks--" if name == "baseline" else "o-"
        left.plot([str(i) for i in s.imbalance], [mean(a) for a in by_imbalance], style, label=name)
        weights = [done[f"{s.imbalance[0]} {name} {seed}"]["weights"] for seed in s.seeds]
        right.semilogy([mean(w) for w in zip(*weights, strict=True)], style, label=name)
    left.set(xlabel="imbalance", ylabel="test accuracy")
    right.set(xlabel="class, the rarest last", ylabel="mean weight of its samples")
    right.set_title(f"Learned at imbalance {s.imbalance[0]}")
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, s.out / "data_reweighting.png")


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    if s.paper:
        s = dataclasses.replace(s, steps=15_000, lr=0.1, outer_lr=1e-5, normalise=False)
        s = dataclasses.replace(s, weight_input="loss")
    if s.robustness:
        s = dataclasses.replace(s, imbalance=s.imbalance[-1:])
    done = experiments(s)
    header, rows = table(s, done)
    print_table(header, rows)
    if s.robustness:
        print(
            "published (table 6, CIFAR-10, another data set): .78 to .79 everywhere, baseline .75"
        )
    save_rows(s.out / "data_reweighting.csv", header, rows)
    draw_figure(s, done)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
