"""Learn fifty images that train a network: Hataya & Yamada 2023, section 5.2, table 2.

    python examples/dataset_distillation.py
    python examples/dataset_distillation.py --strategies nystrom cg cg-betty --seed 1
    python examples/dataset_distillation.py --data mnist --data-root PATH --download --paper

The outer parameters are the pixels of five images a class, drawn from N(0, 1). The inner problem
trains a network on them, always from the same initialisation; the outer loss is that of the trained
network on real training images. The test set is for the curves and the table and decides nothing.

Read the table with care. The outer loss sees the images through the trained network alone, so the
hypergradient is Jᵀx and nothing else, and the outer Adam divides its length away: strategies differ
by direction, not by length. Ten Neumann terms of step .01, and a Nyström sketch of ten columns out
of 61,706, leave most of b unturned; so x = b ("identity"), which uses no curvature, is the baseline
to beat. And the published score of conjugate gradients is that of a defective implementation, which
is here as "cg-betty"; "cg" is the method itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.checkpoint import Checkpoint, Stream
from _shared.data import Images, Source, load_train_test
from _shared.output import print_table, save_figure, save_rows
from matplotlib.axes import Axes
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import (
    CG,
    IHVP,
    BilevelOptimizer,
    Curvature,
    GaussNewton,
    Hessian,
    Identity,
    Neumann,
    Nystrom,
    NystromPCG,
    RecycledCG,
)
from hyperopt_torch.operators import LinearOperator

CLASSES = 10


class BettyCG(IHVP):
    """A faithful defect: "conjugate gradients" as betty 0.1.1 had them. Do not use it.

    The published .17 of table 2 was obtained with this. Conjugate gradients make the new direction
    from the new residual, and take the same step in x and in the residual. Here the direction is
    made from the OLD residual, and the residual lacks the factor ``scale`` that x has: with .01 it
    moves a hundred times too far. Both are kept as they were; NaN stays NaN.
    """

    def __init__(self, max_iter: int = 10, *, scale: float = 0.01) -> None:
        super().__init__()
        self.max_iter, self.scale = max_iter, scale

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Tensor:
        x, r, p = torch.zeros_like(rhs), rhs, rhs
        for _ in range(self.max_iter):
            Hp, rr = operator @ p, operator.inner(r, r)
            step = rr / (self.scale * operator.inner(p, Hp))
            x = x + step * p
            new_r = r - step * Hp  # defect: self.scale * step * Hp would be right
            p = r + operator.inner(new_r, new_r) / rr * p  # defect: new_r + ... would be right
            r = new_r
        return self.scale * x


Strategy = tuple[Callable[[], IHVP], Callable[[], Curvature]]
STRATEGIES: dict[str, Strategy] = {
    "nystrom": (lambda: Nystrom(rank=10, damping=0.01), Hessian),
    "neumann": (lambda: Neumann(10, scale=0.01), Hessian),
    "cg-betty": (lambda: BettyCG(10, scale=0.01), Hessian),
    "cg": (lambda: CG(10, damping=0.01), GaussNewton),
    "nystrom-pcg": (lambda: NystromPCG(rank=10, damping=0.01), GaussNewton),
    "recycled-cg": (lambda: RecycledCG(damping=0.01), GaussNewton),
    "identity": (Identity, Hessian),
}
BASELINES = {"none": "random images, not trained", "real": "real images, not trained"}
PUBLISHED = {"cg-betty": ".17 ± .04", "neumann": ".47 ± .03", "nystrom": ".49 ± .04"}
Name = Literal["nystrom", "neumann", "cg-betty", "cg", "nystrom-pcg", "recycled-cg", "identity"]


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
    strategies: tuple[Name, ...] = tuple(STRATEGIES)  # type: ignore[assignment]
    """How the linear system is solved; one run for each, all from the same start."""
    seed: int = 0
    """For the random images, the initialisation of the network, and the outer batches."""
    per_class: int = 5
    """Learned images of each class."""
    inner_steps: int = 20
    """Steps on all learned images, from the fixed initialisation, before each outer step."""
    inner_lr: float = 0.1
    """Inner learning rate (SGD)."""
    outer_steps: int = 500
    """Steps of the learned images."""
    outer_lr: float = 0.03
    """Outer learning rate (Adam)."""
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


@dataclass
class Run:
    """What a run has measured so far: plain values, which go into its checkpoint."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # outer
    accuracy: list[float] = field(default_factory=list)  # test
    seconds: float = 0.0
    products: int = 0

    def row(self, name: str, published: str) -> list[str]:
        products = self.products / max(1, self.steps[-1])
        numbers = [f"{self.loss[-1]:.4f}", f"{self.accuracy[-1]:.4f}", f"{products:.1f}"]
        return [name, *numbers, f"{self.seconds:.0f}", published]


HEADER = ["", "outer loss", "test accuracy", "products a step", "seconds", "published"]


class Distilled(nn.Module):
    """The learned images, five (or ``per_class``) rows of ten classes."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = nn.Parameter(images)


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


def standardised(s: Settings) -> tuple[Images, Images]:
    """Training and test images less the training mean, over the training deviation."""
    train, test = load_train_test(s.data, s.data_root, s.download)
    mean, deviation = train.x.mean(), train.x.std()
    order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(s.seed))[: s.train]
    return (
        dataclasses.replace(train, x=(train.x[order] - mean) / deviation, y=train.y[order]),
        dataclasses.replace(test, x=(test.x - mean) / deviation),
    )


@torch.no_grad()
def measure(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy, in pieces that fit the processor's cache."""
    outputs = torch.cat([model(piece) for piece in x.split(500)])
    return F.cross_entropy(outputs, y).item(), (outputs.argmax(1) == y).float().mean().item()


def start_images(name: str, train: Images, s: Settings) -> Tensor:
    if name != "real":
        return torch.randn(s.per_class * CLASSES, train.x.shape[1])
    of_class = [train.x[train.y == c][: s.per_class] for c in range(CLASSES)]
    return torch.stack(of_class, dim=1).flatten(0, 1)


def distil(
    name: str,
    strategy: Strategy,
    make_model: Callable[[int], nn.Module],
    train: Images,
    test: Images,
    s: Settings,
    file: Path,
) -> tuple[Run, Tensor]:
    """One run; "none" and "real" make no outer step. Returns what it measured, and the images."""
    torch.manual_seed(s.seed)  # a strategy takes its seed from here when it is made
    model = make_model(train.width)
    start = [p.detach().clone() for p in model.parameters()]
    distilled = Distilled(start_images(name, train, s))
    labels = torch.arange(CLASSES).repeat(s.per_class)
    batches = torch.Generator().manual_seed(s.seed)

    def train_loss() -> tuple[Tensor, Tensor]:
        # The mean of the losses is meant. One by one they serve NHGD, the outputs Gauss-Newton.
        outputs = model(distilled.images)
        return F.cross_entropy(outputs, labels, reduction="none"), outputs

    # The bilevel lines: wrap both optimizers, then inner_step and outer_step.
    inner = torch.optim.SGD(model.parameters(), lr=s.inner_lr)
    outer = torch.optim.Adam(distilled.parameters(), lr=s.outer_lr)
    ihvp, curvature = (make() for make in strategy)
    optimizer = BilevelOptimizer(inner, outer, ihvp=ihvp, curvature=curvature)

    checkpoint = Checkpoint(file, images=distilled, optimizer=optimizer, batches=Stream(batches))
    last = 0 if name in BASELINES else s.outer_steps
    run, done = resumed(checkpoint, s) if last else (Run(), 0)
    every = max(1, last // s.evaluations)
    clock = time.perf_counter() - run.seconds
    for step in tqdm(range(done, last + 1), desc=name, initial=done, total=last + 1):
        # No optimizer.reset(): the path θ(φ) starts anew, but its end, where the systems are
        # solved, moves as slowly as the images do, and there a strategy's memory helps.
        with torch.no_grad():
            for p, value in zip(model.parameters(), start, strict=True):
                p.copy_(value)
        for _ in range(s.inner_steps):
            optimizer.inner_step(train_loss)
        if step % every == 0 or step == last:
            run.steps.append(step)
            run.loss.append(measure(model, train.x[:2000], train.y[:2000])[0])
            run.accuracy.append(measure(model, test.x, test.y)[1])
        if step == last:
            break
        batch = torch.randint(len(train.y), (s.outer_batch,), generator=batches)
        optimizer.outer_step(F.cross_entropy(model(train.x[batch]), train.y[batch]))
        run.products += optimizer.report.matvecs
        run.seconds = time.perf_counter() - clock
        if (step + 1) % every == 0 or step + 1 == last:
            checkpoint.save(step + 1, run=dataclasses.asdict(run), settings=signature(s))
    run.seconds = time.perf_counter() - clock
    return run, distilled.images.detach()


def signature(s: Any) -> str:
    """The settings that a result depends on."""
    free = {"strategies", "methods", "resume", "threads", "out", "data_root", "download"}
    return str({k: str(v) for k, v in dataclasses.asdict(s).items() if k not in free})


def checkpoint_files(prefix: str, names: Sequence[str], s: Any) -> dict[str, Path]:
    """One file for each run. Unless s.resume those of former runs go."""
    files = {name: s.out / f"{prefix}_{name}.pt" for name in names}
    for file in files.values():
        if not s.resume:
            file.unlink(missing_ok=True)
    return files


def resumed(checkpoint: Checkpoint, s: Any) -> tuple[Run, int]:
    """What the checkpoint holds, and the steps done; nothing and 0 unless s.resume."""
    done, log = checkpoint.load() if s.resume else (0, {})
    if log and log["settings"] != signature(s):
        raise SystemExit(f"{checkpoint.path} is of other settings: {log['settings']}")
    return (Run(**log["run"]) if log else Run()), done


def draw_images(grid: Sequence[Axes], images: Tensor, width: int) -> None:
    """Row by row, all on one grey scale."""
    low, high = images.quantile(torch.tensor([0.02, 0.98])).tolist()
    for axis, image in zip(grid, images, strict=True):
        axis.imshow(image.reshape(width, width), cmap="gray", vmin=low, vmax=high)
        axis.set_axis_off()


def draw(runs: dict[str, Run], name: str, images: Tensor, width: int, s: Settings) -> None:
    figure = plt.figure(figsize=(11, 3.8))
    left, right = figure.subfigures(1, 2, width_ratios=[1.3, 1])
    left.suptitle(f"Learned by {name}", fontsize=12)
    draw_images(list(left.subplots(s.per_class, CLASSES).flat), images, width)
    axis = right.subplots()
    for label, run in runs.items():
        if label in BASELINES:
            line = {"none": ":", "real": "--"}[label]
            axis.axhline(run.accuracy[-1], color="black", lw=1, ls=line, label=BASELINES[label])
        else:
            axis.plot(run.steps, run.accuracy, label=label)
    axis.set(xlabel="outer steps", ylabel="test accuracy")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, s.out / "dataset_distillation.png", dpi=85)  # noise does not compress


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    if s.paper and s.data == "digits":
        raise SystemExit("--paper needs --data mnist (or fashion) and --data-root PATH.")
    s = dataclasses.replace(s, **PAPER) if s.paper else s
    train, test = standardised(s)
    print(f"{train.name}: {len(train.y)} training and {len(test.y)} test images")
    runs, images = {}, {}
    files = checkpoint_files("dataset_distillation", (*BASELINES, *s.strategies), s)
    for name, file in files.items():
        strategy = STRATEGIES.get(name, STRATEGIES["identity"])
        runs[name], images[name] = distil(name, strategy, network, train, test, s, file)
    print()
    rows = [run.row(BASELINES.get(n, n), PUBLISHED.get(n, "")) for n, run in runs.items()]
    print_table(HEADER, rows)
    print('Published: MNIST, 5000 outer steps, mean of several runs; "CG" there is cg-betty.')
    save_rows(s.out / "dataset_distillation.csv", HEADER, rows)
    best = min(s.strategies, key=lambda name: runs[name].loss[-1])
    draw(runs, best, images[best], train.width, s)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
