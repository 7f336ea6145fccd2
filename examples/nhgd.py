"""Natural hypergradient descent: Kong, Chen, Zhang & Mou, arXiv:2602.10905, on its two image tasks.

    python examples/nhgd.py
    python examples/nhgd.py --task distillation
    python examples/nhgd.py --data mnist --data-root PATH --download --paper

NHGD puts the empirical Fisher matrix of per-sample gradients, met while training, in place of the
inner Hessian. It needs no product with the Hessian for the solve, only the closing one that gives
the hypergradient; other strategies pay for theirs. "nhgd" keeps the last rows, "kronecker" a factor
for each side of a layer's weight, "kronecker-batch" the same of one row a step. Two tasks:

- cleaning: half of the training labels are wrong. A softmax regression is trained on the loss with
  sample weights σ(φ_i), and the weights follow the loss on clean images. Without bilevel
  optimization: "none", and "none, stopped", the same where its validation loss was lowest.
- distillation: five images a class are learned, on which a softmax regression is trained, always
  from the same initialisation. Without: "random" and "real" images, as they are.

The validation images overlap neither training nor test images; the test set decides nothing. The
article's learning rates and damping were not at hand: they are choices of ours, also with --paper.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.data import Source, load_train_test
from _shared.image_tasks import Distilled, Weights
from _shared.output import save_figure
from _shared.runlog import Row, RunLog
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import (
    CG,
    NHGD,
    BilevelOptimizer,
    GaussNewton,
    Hessian,
    Identity,
    RecycledCG,
    Unrolled,
)

Method = Literal[
    "nhgd", "nhgd-rescaled", "kronecker", "kronecker-rescaled", "kronecker-batch",
    "identity", "cg", "cg-long", "cg-warm", "default", "damped", "unrolled",
]  # fmt: skip
PUBLISHED = {"cleaning": "outer loss .2765, test accuracy .9180", "distillation": "loss .4733"}


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
    methods: tuple[Method, ...] = get_args(Method)
    """One run for each, all from the same start; "default" is BilevelOptimizer's own choice."""
    seeds: tuple[int, ...] = (0,)
    """For the split, the wrong labels, the start and the batches."""
    train: int = 1000
    """Training images (distillation: real images, at most)."""
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
    """ρ of CG; for NHGD, whose ρ follows its Fisher matrix, the least."""
    window: int = 512
    """Rows of NHGD's Fisher matrix."""
    samples: int = 8
    """Rows that an inner step adds to them, or to the Kronecker factors."""
    decay: float = 0.99
    """Weight of what the Kronecker factors held, at each inner step."""
    evaluations: int = 20
    """Points of a curve."""
    resume: bool = False
    """Go on where a stopped command was; what is in the table of --out is not done again."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of the figure and the tables."""


PAPER: dict[str, Any] = {"train": 50_000, "clean_per_class": 500, "noise": 0.5, "batch": 1024}


def strategy(method: str, s: Settings) -> dict[str, Any]:
    """What BilevelOptimizer is given; nothing for its default."""

    def nhgd(rows: str = "per_sample", **more: Any) -> dict[str, Any]:
        ihvp = NHGD(s.window, min_damping=s.damping, rows=rows, samples=s.samples, **more)
        return {"ihvp": ihvp, "curvature": Hessian()}

    factors = {"structure": "kronecker", "decay": s.decay}
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "nhgd": nhgd,
        "nhgd-rescaled": lambda: nhgd(rescale=True),
        "kronecker": lambda: nhgd(**factors),
        "kronecker-rescaled": lambda: nhgd(**factors, rescale=True),
        "kronecker-batch": lambda: nhgd("batch", **factors),
        "identity": lambda: {"ihvp": Identity()},
        "cg": lambda: {"ihvp": CG(5, damping=s.damping), "curvature": GaussNewton()},
        "cg-long": lambda: {"ihvp": CG(50, damping=s.damping), "curvature": GaussNewton()},
        "cg-warm": lambda: {
            "ihvp": CG(5, damping=s.damping, warm_start=True),
            "curvature": GaussNewton(),
        },
        # T steps of gradient descent at rate η leave a curvature below about 1 / ηT unresolved.
        "damped": lambda: {
            "ihvp": RecycledCG(window=20, damping=1 / (s.inner_lr * s.inner_steps)),
            "curvature": GaussNewton(),
        },
        "unrolled": lambda: {"estimator": Unrolled()},
    }
    return made[method]() if method in made else {}


@torch.no_grad()
def measure(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss, and accuracy."""
    outputs = model(x)
    return F.cross_entropy(outputs, y).item(), (outputs.argmax(1) == y).float().mean().item()


def make_task(method: str, seed: int, s: Settings) -> Weights | Distilled:
    images, test = load_train_test(s.data, s.data_root, s.download)
    sizes: dict[str, Any] = {"train": s.train, "batch": s.batch}
    if s.task == "distillation":
        return Distilled(images, test, seed, real=method == "real", **sizes)
    sizes |= {"clean_per_class": s.clean_per_class, "noise": s.noise, "penalty": s.penalty}
    return Weights(images, test, seed, **sizes)


def train(method: str, seed: int, s: Settings) -> tuple[Row, list[Row]]:
    """One run: what it came to, and its curve. Of methods without a strategy φ stays."""
    torch.manual_seed(seed)  # a strategy takes its seed from here when it is made
    task = make_task(method, seed, s)
    # The bilevel lines: wrap both optimizers, then inner_step and outer_step.
    optimizer = BilevelOptimizer(
        torch.optim.SGD(task.model.parameters(), lr=s.inner_lr),
        torch.optim.Adam([task.learned], lr=s.outer_lr),
        **strategy(method, s),
    )
    still = method not in get_args(Method)
    steps = 1 if still and s.task == "distillation" else s.outer_steps
    curve, products, seconds = [], 0, 0.0
    for step in tqdm(range(1, steps + 1), method, leave=False):
        began = time.process_time()
        task.begin()
        for _ in range(s.inner_steps):
            task.next_batch()
            optimizer.inner_step(task.train_loss)
        if not still:
            optimizer.outer_step(task.val_loss())
            products += optimizer.report.matvecs
        seconds += time.process_time() - began
        if step % max(1, steps // s.evaluations) == 0 or step == steps:
            loss, accuracy = measure(task.model, *task.val)[0], measure(task.model, *task.test)[1]
            point = {"outer_loss": loss, "accuracy": accuracy}
            curve.append({"step": step, "cpu_s": seconds} | point)
    return point | {"products": products, "cpu_s": seconds}, curve


def draw(s: Settings, log: RunLog) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, part in zip(axes, ("outer_loss", "accuracy"), strict=True):
        curves = log.curves("step", part, task=s.task)
        for i, (method, points) in enumerate(curves.items()):
            if len(points) == 1:
                style = {"random": ":", "real": "--"}[method]
                axis.axhline(points[0][1], color="black", lw=1, ls=style, label=method)
            else:
                colour = "black" if method == "none" else f"C{i}"
                axis.plot(
                    *zip(*points, strict=True), ["-", "--", ":"][i % 3], label=method, color=colour
                )
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
    log = RunLog(s.out, f"nhgd_{s.task}", s.resume)
    baselines = ("none",) if s.task == "cleaning" else ("random", "real")
    for seed in s.seeds:
        for method in (*baselines, *s.methods):
            factors = {"task": s.task, "data": s.data, "method": method, "seed": seed}
            factors |= {"train": s.train, "outer_steps": s.outer_steps}
            if log.has(factors):
                continue
            results, curve = train(method, seed, s)
            log.add(factors, results, curve)
            if method == "none":
                best = min(curve, key=lambda point: point["outer_loss"])
                stopped = {k: best[k] for k in ("outer_loss", "accuracy", "cpu_s")}
                log.add(factors | {"method": "none, stopped"}, stopped | {"products": 0})
    columns = {
        "outer loss": ("outer_loss", ".4f"),
        "test accuracy": ("accuracy", ".4f"),
        "products": ("products", ".0f"),
        "CPU s": ("cpu_s", ".1f"),
    }
    print(f"{s.data}, {s.train} training images, {s.outer_steps} outer steps")
    log.show(("method",), columns, task=s.task)
    print(f"Published for NHGD: {PUBLISHED[s.task]}.")
    draw(s, log)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
