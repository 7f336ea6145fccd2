"""Natural hypergradient descent: Kong, Chen, Zhang & Mou, arXiv:2602.10905, on its two image tasks.

    python examples/nhgd.py
    python examples/nhgd.py --task distillation
    python examples/nhgd.py --data mnist --data-root PATH --download --paper

NHGD puts the empirical Fisher matrix of per-sample gradients, met while training, in place of the
inner Hessian. It needs no product with the Hessian for the solve, only the closing one that gives
the hypergradient; other strategies pay for theirs. Two tasks:

- cleaning: half of the training labels are wrong. A softmax regression is trained on the loss with
  sample weights σ(φ_i), and the weights follow the loss on clean images.
- distillation: five images a class are learned, on which a softmax regression is trained, always
  from the same initialisation; see dataset_distillation.py, whose run this is.

The validation images overlap neither training nor test images; the test set decides nothing. The
article's learning rates and damping were not at hand: they are choices of ours, also with --paper.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.checkpoint import Checkpoint, Stream
from _shared.data import NoisySplit, Source, load_train_test, noisy_split
from _shared.distillation import (
    BASELINES,
    CLASSES,
    HEADER,
    Run,
    checkpoint_files,
    distil,
    measure,
    resumed,
    signature,
    standardised,
)
from _shared.output import print_table, save_figure, save_rows
from dataset_distillation import Settings as DistillationSettings
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import (
    CG,
    IHVP,
    NHGD,
    BilevelOptimizer,
    Curvature,
    GaussNewton,
    Hessian,
    Identity,
    ImplicitDifferentiation,
    PerSample,
    RecycledCG,
)

Method = Literal["nhgd", "nhgd-rescaled", "identity", "cg", "recycled-cg"]
METHODS: tuple[Method, ...] = ("nhgd", "nhgd-rescaled", "identity", "cg", "recycled-cg")


@dataclass(frozen=True)
class Settings:
    """NHGD on hyper-cleaning and distillation. A quick look: --outer-steps 20."""

    task: Literal["cleaning", "distillation"] = "cleaning"
    """What is learned: sample weights, or images."""
    data: Source = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of the other sets."""
    download: bool = False
    """Fetch the set if it is not in the folder."""
    paper: bool = False
    """The published sizes, whatever else is given: 50,000 training images and batches of 1024.
    Needs another set than "digits": mnist for cleaning, fashion for distillation."""
    methods: tuple[Method, ...] = METHODS
    """One run for each, all from the same start."""
    seed: int = 0
    """For the split, the wrong labels, the start and the batches."""
    train: int = 1000
    """Training images, of which NOISE are labelled wrong (distillation: real images, at most)."""
    clean_per_class: int = 20
    """Validation images of each class (cleaning)."""
    noise: float = 0.5
    """Part of the training labels that is replaced by another class (cleaning)."""
    batch: int = 256
    """Training images of an inner step (cleaning), real images of an outer step (distillation)."""
    inner_steps: int = 10
    """Between two outer steps; in distillation from the fixed initialisation."""
    inner_lr: float = 0.1
    """Inner learning rate (SGD)."""
    outer_steps: int = 300
    """Steps of the sample weights, or of the images."""
    outer_lr: float = 0.03
    """Outer learning rate (Adam)."""
    penalty: float = 1e-4
    """λ of the inner penalty λ‖θ‖² (cleaning)."""
    damping: float = 0.03
    """ρ of every strategy but identity; for NHGD, whose ρ follows its Fisher matrix, the least."""
    window: int = 512
    """Rows of NHGD's Fisher matrix."""
    samples: int = 8
    """Rows that an inner step adds to them."""
    evaluations: int = 25
    """Points of a curve, which is also how often a checkpoint is written."""
    resume: bool = False
    """Go on with the checkpoints in the folder, to the same result."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of figure, table and checkpoints."""


PAPER: dict[str, Any] = {
    "train": 50_000,
    "clean_per_class": 500,
    "noise": 0.5,
    "batch": 1024,
    "inner_steps": 10,
    "penalty": 1e-4,
}
PUBLISHED = {  # task -> method -> outer loss, test accuracy
    "cleaning": {"nhgd": "loss .2765, accuracy .9180"},
    "distillation": {"nhgd": "loss .4733"},
}
REMARK = {
    "cleaning": "Published: MNIST, mean of the last 50 epochs; SOBA reached a loss of .1055.",
    "distillation": "Published: Fashion-MNIST, five images a class; network not known to us.",
}


Strategy = tuple[Callable[[], IHVP], Callable[[], Curvature]]


def strategies(s: Settings) -> dict[str, Strategy]:
    def nhgd(rescale: bool) -> NHGD:
        rows = {"rows": "per_sample", "samples": s.samples}
        return NHGD(s.window, min_damping=s.damping, rescale=rescale, **rows)

    return {
        "nhgd": (lambda: nhgd(rescale=False), Hessian),
        "nhgd-rescaled": (lambda: nhgd(rescale=True), Hessian),
        "identity": (Identity, Hessian),
        "cg": (lambda: CG(5, damping=s.damping), GaussNewton),
        "recycled-cg": (lambda: RecycledCG(damping=s.damping), GaussNewton),
    }


def softmax_regression(width: int) -> nn.Linear:
    return nn.Linear(width * width, CLASSES)


class Weights(nn.Module):
    """φ, one number a training image; its weight is σ(φ)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.zeros(count))


def cleaning_split(s: Settings) -> tuple[NoisySplit, int]:
    """Training and clean images from the set's training part, test images from its test part."""
    train, test = load_train_test(s.data, s.data_root, s.download)
    split = noisy_split(
        train, s.seed, train=s.train, clean_per_class=s.clean_per_class, test=0, noise=s.noise
    )
    return dataclasses.replace(split, test_x=test.x, test_y=test.y), train.width


def clean(
    name: str, strategy: Strategy, split: NoisySplit, width: int, s: Settings, file: Path
) -> tuple[Run, Tensor]:
    """One run; "none" makes no outer step. Returns what it measured, and the weights."""
    torch.manual_seed(s.seed)  # a strategy takes its seed from here when it is made
    model, weights = softmax_regression(width), Weights(len(split.labels))
    batches = torch.Generator().manual_seed(s.seed)

    def train_loss() -> tuple[PerSample, Tensor]:  # on the batch of the moment
        outputs = model(split.x[batch])
        losses = F.cross_entropy(outputs, split.labels[batch], reduction="none")
        penalty = s.penalty * sum(p.square().sum() for p in model.parameters())
        return PerSample(losses, weights.phi[batch].sigmoid(), penalty), outputs

    # The bilevel lines: wrap both optimizers, then inner_step and outer_step.
    inner = torch.optim.SGD(model.parameters(), lr=s.inner_lr)
    outer = torch.optim.Adam(weights.parameters(), lr=s.outer_lr)
    ihvp, curvature = (make() for make in strategy)
    optimizer = BilevelOptimizer(inner, outer, ihvp=ihvp, curvature=curvature)

    checkpoint = Checkpoint(
        file, model=model, weights=weights, optimizer=optimizer, batches=Stream(batches)
    )
    run, done = resumed(checkpoint, s)
    every = max(1, s.outer_steps // s.evaluations)
    clock = time.process_time() - run.seconds
    for step in tqdm(range(done, s.outer_steps), desc=name, initial=done, total=s.outer_steps):
        for _ in range(s.inner_steps):
            batch = torch.randint(len(split.labels), (s.batch,), generator=batches)
            optimizer.inner_step(train_loss)
        if name != "none":
            optimizer.outer_step(F.cross_entropy(model(split.clean_x), split.clean_y))
            run.products += optimizer.report.matvecs
        if (step + 1) % every == 0 or step + 1 == s.outer_steps:
            run.steps.append(step + 1)
            run.loss.append(measure(model, split.clean_x, split.clean_y)[0])
            run.accuracy.append(measure(model, split.test_x, split.test_y)[1])
            run.seconds = time.process_time() - clock
            checkpoint.save(step + 1, run=dataclasses.asdict(run), settings=signature(s))
    return run, weights.phi.detach().sigmoid()


def run_cleaning(s: Settings) -> dict[str, Run]:
    split, width = cleaning_split(s)
    print(
        f"{s.data}: {len(split.labels)} training images, {s.noise:.0%} labelled wrong, "
        f"{len(split.clean_y)} clean and {len(split.test_y)} test images"
    )
    runs, found = {}, []
    for name, file in checkpoint_files("nhgd_cleaning", ("none", *s.methods), s).items():
        strategy = strategies(s)["identity" if name == "none" else name]
        runs[name], weights = clean(name, strategy, split, width, s, file)
        right, wrong = weights[~split.wrong].mean(), weights[split.wrong].mean()
        found.append(f"{name} {right:.2f} / {wrong:.2f}")
    print("\nMean weight of correct / wrong labels: " + ", ".join(found[1:]))
    return runs


def run_distillation(s: Settings) -> dict[str, Run]:
    inherited = {f.name for f in dataclasses.fields(DistillationSettings)} - {"strategies"}
    given = {k: v for k, v in dataclasses.asdict(s).items() if k in inherited}
    settings = DistillationSettings(**given, outer_batch=s.batch)
    train, test = standardised(settings, s.seed)
    print(f"{train.name}: {len(train.y)} training and {len(test.y)} test images")
    runs = {}
    files = checkpoint_files("nhgd_distillation", (*BASELINES, *s.methods), s)
    for name, file in files.items():
        ihvp, curvature = strategies(s)["identity" if name in BASELINES else name]

        def make() -> ImplicitDifferentiation:
            return ImplicitDifferentiation(ihvp(), curvature())  # noqa: B023

        runs[name], _ = distil(name, make, softmax_regression, train, test, settings, s.seed, file)
    return runs


def draw(runs: dict[str, Run], s: Settings) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, part in zip(axes, ("loss", "accuracy"), strict=True):
        for name, run in runs.items():
            values = getattr(run, part)
            if len(values) == 1:
                axis.axhline(values[0], color="black", lw=1, ls=":", label=name)
            else:
                axis.plot(run.steps, values, label=name, color="black" if name == "none" else None)
        axis.set(xlabel="outer steps")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="outer (validation) loss", yscale="log")
    axes[1].set(ylabel="test accuracy")
    axes[1].legend(frameon=False, fontsize=8)
    save_figure(figure, s.out / f"nhgd_{s.task}.png")


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    if s.paper and s.data == "digits":
        raise SystemExit("--paper needs --data mnist (or fashion) and --data-root PATH.")
    s = dataclasses.replace(s, **PAPER) if s.paper else s
    runs = run_cleaning(s) if s.task == "cleaning" else run_distillation(s)
    baselines = BASELINES if s.task == "distillation" else {"none": "no cleaning"}
    published = PUBLISHED[s.task]
    rows = [run.row(baselines.get(n, n), published.get(n, "")) for n, run in runs.items()]
    print_table(HEADER, rows)
    print(REMARK[s.task])
    save_rows(s.out / f"nhgd_{s.task}.csv", HEADER, rows)
    draw(runs, s)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
