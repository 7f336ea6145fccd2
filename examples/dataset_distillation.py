"""Learn fifty images that train a network: Hataya & Yamada 2023, section 5.2, table 2.

    python examples/dataset_distillation.py
    python examples/dataset_distillation.py --strategies unrolled cg cg-betty --seeds 1 2
    python examples/dataset_distillation.py --data mnist --data-root PATH --download --paper

The outer parameters are the pixels of five images a class, drawn from N(0, 1). The inner problem
trains a network on them, always from the same initialisation; the outer loss is that of the trained
network on real training images. The test set is for the curves and the table and decides nothing.

Twenty steps from one initialisation are not the optimum that implicit differentiation speaks of.
"unrolled" differentiates the steps themselves, and so it can learn the rate of each tensor too.

Read the rest of the table with care. The outer loss sees the images through the trained network
alone, so the hypergradient is Jᵀx and nothing else, and the outer Adam divides its length away:
strategies differ by direction, not by length. Ten Neumann terms of step .01, and a Nyström sketch
of ten columns out of 61,706, leave most of b unturned; so x = b ("identity"), which uses no
curvature, is the baseline to beat. The published score of conjugate gradients is that of a
defective implementation, which is here as "cg-betty"; "cg" is the method itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import tyro
from _shared.betty import BettyCG
from _shared.data import Source
from _shared.distillation import (
    BASELINES,
    CLASSES,
    HEADER,
    LONG,
    Run,
    checkpoint_files,
    distil,
    draw_images,
    standardised,
    tuned_on_real,
)
from _shared.output import print_table, save_figure, save_rows
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import (
    CG,
    IHVP,
    Curvature,
    GaussNewton,
    Hessian,
    HypergradientEstimator,
    Identity,
    ImplicitDifferentiation,
    Neumann,
    Nystrom,
    NystromPCG,
    RecycledCG,
    Unrolled,
)


def implicit(ihvp: IHVP, curvature: Curvature | None = None) -> ImplicitDifferentiation:
    return ImplicitDifferentiation(ihvp, curvature or GaussNewton())


ESTIMATORS: dict[str, Callable[[], HypergradientEstimator | None]] = {
    "unrolled": Unrolled,
    "default": lambda: None,  # as shipped, nothing chosen
    "recycled-cg": lambda: implicit(RecycledCG(damping=0.01)),
    "cg": lambda: implicit(CG(10, damping=0.01)),
    "cg-warm": lambda: implicit(CG(10, damping=0.01, warm_start=True)),
    "nystrom-pcg": lambda: implicit(NystromPCG(rank=10, damping=0.01)),
    "nystrom": lambda: implicit(Nystrom(rank=10, damping=0.01), Hessian()),
    "neumann": lambda: implicit(Neumann(10, scale=0.01), Hessian()),
    "cg-betty": lambda: implicit(BettyCG(0.01, max_iter=10), Hessian()),
    "identity": lambda: implicit(Identity(), Hessian()),
}
TUNED = {"real, best rate": 1, "real, best rate, long": LONG}  # times the inner steps
PUBLISHED = {"cg-betty": ".17 ± .04", "neumann": ".47 ± .03", "nystrom": ".49 ± .04"}
Name = Literal["unrolled", "default", "recycled-cg", "cg", "cg-warm", "nystrom-pcg", "nystrom",
               "neumann", "cg-betty", "identity"]  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Learn fifty images that train a network. A quick look: --outer-steps 20."""

    data: Source = "digits"
    """Image set; "digits" needs no download and gets a small network, the others a LeNet."""
    data_root: Path | None = None
    """Folder of the other sets."""
    download: bool = False
    """Fetch the set if it is not in the folder."""
    paper: bool = False
    """The published settings, whatever else is given: 100 inner steps of .01, 5000 outer steps of
    .001, outer batches of 1024, all training images. Needs another set than "digits"."""
    strategies: tuple[Name, ...] = tuple(ESTIMATORS)  # type: ignore[assignment]
    """Ways to the hypergradient; one run for each, all from the same start."""
    seeds: tuple[int, ...] = (0,)
    """A run each: of the random images, the initial network, and the outer batches."""
    per_class: int = 5
    """Learned images of each class."""
    inner_steps: int = 20
    """Steps on all learned images, from the fixed initialisation, before each outer step."""
    inner_lr: float = 0.1
    """Inner learning rate (SGD); "unrolled" starts there."""
    outer_steps: int = 500
    """Steps of the learned images."""
    outer_lr: float = 0.03
    """Outer learning rate (Adam); it falls to zero along a cosine."""
    rate_lr: float = 0.02
    """The same, for the logarithms of the learned inner rates."""
    outer_batch: int = 256
    """Real training images in an outer step."""
    train: int = 60_000
    """Real training images, at most."""
    evaluations: int = 20
    """Points of a curve, which is also how often a checkpoint is written."""
    resume: bool = False
    """Go on with the checkpoints in the folder, to the same result."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of figure, table and checkpoints."""


PAPER: dict[str, Any] = {
    "per_class": 5,
    "inner_steps": 100,
    "inner_lr": 0.01,
    "outer_steps": 5000,
    "outer_lr": 1e-3,
    "outer_batch": 1024,
    "train": 60_000,
}


def network(width: int) -> nn.Sequential:
    """For 28 pixels LeNet with leaky ReLUs, 61,706 parameters; for 8 a small perceptron."""
    if width == 8:
        return nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, CLASSES))
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, 6, 5, padding=2), nn.LeakyReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.LeakyReLU(), nn.Linear(120, 84), nn.LeakyReLU()),
        nn.Linear(84, CLASSES),
    )


def draw(runs: dict[str, Run], name: str, images: Tensor, width: int, s: Settings) -> None:
    figure = plt.figure(figsize=(11, 3.8))
    left, right = figure.subfigures(1, 2, width_ratios=[1.3, 1])
    left.suptitle(f"Learned by {name}", fontsize=12)
    draw_images(list(left.subplots(s.per_class, CLASSES).flat), images, width)
    axis = right.subplots()
    lines = dict(zip((*BASELINES, *TUNED), (":", "--", "-.", "-"), strict=True))
    for label, run in runs.items():
        if label in lines:
            ls, text = lines[label], BASELINES.get(label, label)
            axis.axhline(run.accuracy[-1], color="black", lw=1, ls=ls, label=text)
        else:
            axis.plot(run.steps, run.accuracy, label=label)
    axis.set(xlabel="outer steps", ylabel="test accuracy")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, s.out / "dataset_distillation.png", dpi=85)  # noise does not compress


COLUMNS = ("method", "seed", "outer_loss", "accuracy", "cpu_s", "products", "outer_steps")


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    if s.paper and s.data == "digits":
        raise SystemExit("--paper needs --data mnist (or fashion) and --data-root PATH.")
    s = dataclasses.replace(s, **PAPER) if s.paper else s
    table, rows = [], []
    for seed in s.seeds:
        train, test = standardised(s, seed)
        print(f"{train.name}: {len(train.y)} training and {len(test.y)} test images, seed {seed}")
        runs, images = {}, {}
        prefix = f"dataset_distillation_{seed}"
        for name, file in checkpoint_files(prefix, (*BASELINES, *TUNED, *s.strategies), s).items():
            if name in TUNED:
                steps = TUNED[name] * s.inner_steps
                run = tuned_on_real(network, train, test, s, seed, steps)
            else:
                make = ESTIMATORS.get(name, ESTIMATORS["identity"])
                run, images[name] = distil(name, make, network, train, test, s, seed, file)
            runs[name] = run
            rows.append(run.row(BASELINES.get(name, name), PUBLISHED.get(name, "")))
            numbers = (run.loss[-1], run.accuracy[-1], run.seconds)
            table.append([name, seed, *(f"{x:.6g}" for x in numbers), run.products, run.steps[-1]])
            save_rows(s.out / "dataset_distillation.csv", COLUMNS, table)
            if run.rates:
                tqdm.write(f"inner rates: {', '.join(f'{rate:.3f}' for rate in run.rates)}")
    print()
    print_table(HEADER, rows)
    print('Published: MNIST, 5000 outer steps, mean of several runs; "CG" there is cg-betty.')
    best = min(s.strategies, key=lambda name: runs[name].loss[-1])
    draw(runs, best, images[best], train.width, s)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
