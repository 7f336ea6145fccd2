"""Learn features by the loss of the head that is fitted to them: PZOBO without second derivatives.

    python examples/hyper_representation.py
    python examples/hyper_representation.py --task shallow --p 128 --outer-steps 150
    python examples/hyper_representation.py --task deep --samples 5000
    python examples/hyper_representation.py --task digits --data mnist --data-root PATH --download

The inner problem fits a linear head θ to features; the outer parameters φ make the features. After
Sow, Ji & Liang, "On the convergence theory for Hessian-free bilevel algorithms", NeurIPS 2022.

    shallow  features by a matrix, Gaussian data; the head starts anew at the same point for every
             outer step; full batches
    deep     the same with two matrices, 256-512-256, and sigmoids; the public notebook's N(0, 1)
             start, inner rate of .001 and ridge of .001
    digits   a small convolutional body; the head goes on from where it was; mini-batches

Read the tables with care. The outer loss contains φ itself, and not only through the head: ∂g/∂φ
("direct") needs no bilevel method at all, so it is a row of its own. The paper draws directions
from N(0, I), whose second term is mostly noise where φ is large; its public code takes them of unit
length in each tensor, which shrinks the second term by the size of the tensor, and leaves the
direct one. |second| / |direct| shows how much of either is in a step.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import tyro
from _shared.data import Source, load_train_test
from _shared.estimators import METHODS, Method, Run, direct_term, make_estimator, zeroth_order
from _shared.features import Data, Problem, classification, regression
from _shared.output import save_figure
from _shared.runlog import RunLog
from torch import Tensor
from tqdm import tqdm

from hyperopt_torch import BilevelOptimizer

SMOOTHING = 0.01  # μ of PZOBO and HOZOG
Way = Method | Literal["hozog"]


@dataclass(frozen=True)
class Size:
    """How long and how fast a task runs; the outer optimizer is Adam."""

    inner_steps: int
    outer_steps: int
    inner_lr: float
    outer_lr: float
    penalty: float  # λ of ½λ‖θ‖² in the inner loss
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD  # inner
    batch: int = 0  # images at either level; 0: all of them, and a head that starts anew
    drops: tuple[tuple[int, float], ...] = ()  # (step, factor on outer_lr from there on)


SIZES = {
    "shallow": Size(20, 100, 1e-3, 0.05, 0.1),
    "deep": Size(10, 100, 1e-3, 0.01, 1e-3),
    "digits": Size(10, 150, 0.1, 3e-3, 1e-3, batch=64),
}
PAPER = SIZES | {
    "digits": Size(10, 1000, 1e-3, 1e-3, 0.0, torch.optim.Adam, 256, ((80, 0.5), (180, 0.1))),
}


@dataclass(frozen=True)
class Settings:
    """Learn features by the loss of the head. A quick look: --outer-steps 3."""

    task: Literal["shallow", "deep", "digits"] = "shallow"
    """Which problem."""
    methods: tuple[Way, ...] = METHODS
    """Ways to the hypergradient; "fixed-point" is a Neumann series, a term for each inner step;
    "hozog", for full batches, takes differences of the outer objective, and no gradient of it."""
    data: Source = "digits"
    """Images of the task "digits"; the set of that name needs no download."""
    data_root: Path | None = None
    """Folder of the other sets."""
    download: bool = False
    """Fetch the set if it is not in the folder."""
    paper: bool = False
    """The published size of "digits", which needs other data; the others have it anyway."""
    seeds: tuple[int, ...] = (0,)
    """One whole experiment for each."""
    p: Literal[64, 128] = 64
    """Inputs of the shallow problem: 64 x 128 outer entries and 500 samples, or twice each. The
    recorded runs of 128 took 150 outer steps, and "cg" an outer rate of .01."""
    directions: int = 1
    """Directions Q of both kinds of PZOBO."""
    samples: int = 1000
    """Of each of the three sets of "deep"; published: 5000."""
    outer_steps: int | None = None
    """Steps of the body; the default depends on the task."""
    outer_lr: float | None = None
    """Of Adam; the default depends on the task."""
    threads: int = 1
    """CPU threads."""
    resume: bool = False
    """Go on where a stopped command was; what is in the table of --out is not done again."""
    out: Path = Path("results")
    """Folder of the figure and the tables."""

    @property
    def size(self) -> Size:
        size = (PAPER if self.paper else SIZES)[self.task]
        given = {"outer_steps": self.outer_steps, "outer_lr": self.outer_lr}
        return replace(size, **{k: v for k, v in given.items() if v is not None})


def make_problem(s: Settings, draws: torch.Generator) -> Problem:
    if s.task == "digits":
        return classification(*load_train_test(s.data, s.data_root, s.download), draws)
    if s.task == "deep":
        return regression(True, p=256, d=256, n=s.samples)
    return regression(False, p=s.p, d=2 * s.p, n=500 * s.p // 64)


def train(method: Way, seed: int, s: Settings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One run: what it came to, and its curve."""
    size = s.size
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    problem = make_problem(s, draws)
    body, head, first = problem.body, problem.head, copy.deepcopy(problem.head.state_dict())
    outer = list(body.parameters())
    # The bilevel lines: the head is the inner level, the body the outer one.
    optimizer = BilevelOptimizer(
        size.optimizer(head.parameters(), lr=size.inner_lr),
        torch.optim.Adam(outer, lr=size.outer_lr),
        estimator=make_estimator(method, size.inner_steps, size.inner_lr, SMOOTHING, s.directions),
    )
    run = Run()

    def batch(data: Data) -> Data:
        chosen = torch.randint(len(data[1]), (size.batch,), generator=draws) if size.batch else ...
        return data[0][chosen], data[1][chosen]

    def train_loss(x: Tensor, y: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in head.parameters())
        return problem.loss(head(body(x)), y) + size.penalty / 2 * penalty

    def fit_head() -> None:
        if not size.batch:
            head.load_state_dict(first)
            optimizer.reset()
        for _ in range(size.inner_steps):
            optimizer.inner_step(partial(train_loss, *batch(problem.train)))

    def fitted_loss() -> Tensor:
        fit_head()
        x, y = batch(problem.val)
        return problem.loss(head(body(x)), y)

    every = max(1, size.outer_steps // 20)
    bar = tqdm(range(size.outer_steps), f"{s.task}, {method}", leave=False)
    for step in bar:
        start = time.process_time()
        factor = [1.0, *(f for at, f in size.drops if step >= at)][-1]
        optimizer.outer.param_groups[0]["lr"] = size.outer_lr * factor
        # More bilevel lines: inner steps of the head, then one step of the body.
        if method == "hozog":
            run.losses.append(zeroth_order(fitted_loss, outer, SMOOTHING, s.directions).item())
            optimizer.outer.step()
            run.gradients += s.directions * size.inner_steps
        else:
            val_loss = fitted_loss()
            direct = direct_term(val_loss, outer) if step % every == 0 else None  # for the table
            run.losses.append(optimizer.outer_step(val_loss).item())
            run.count(optimizer.report)
            if direct:
                run.look(outer, direct)
        run.seconds += time.process_time() - start
        bar.set_postfix_str(f"outer loss {run.losses[-1]:.4g}")
    fit_head()
    x, y = problem.test
    with torch.no_grad():
        test = problem.test_score(head(body(x)), y).item()
    results = {
        "outer_loss_start": run.losses[0],
        "outer_loss": run.late_loss if size.batch else run.losses[-1],
        "test": test,
        "second_over_direct": median(run.ratios) if run.ratios else "",
        "products": run.products,
        "gradients": run.gradients,
        "cpu_s": run.seconds,
    }
    parts = range(0, size.outer_steps, every)
    smooth = [mean(run.losses[i : i + every if size.batch else i + 1]) for i in parts]
    curve = [{"step": i, "outer_loss": y} for i, y in zip(parts, smooth, strict=True)]
    return results, curve


def draw(s: Settings, log: RunLog) -> None:
    figure, axis = plt.subplots(figsize=(6.2, 4), layout="constrained")
    curves = log.curves("step", "outer_loss", task=s.task)
    for i, (method, points) in enumerate(curves.items()):
        axis.plot(*zip(*points, strict=True), ["-", "--", ":"][i % 3], label=method, lw=1.6)
    axis.set(xlabel="outer steps", ylabel="outer loss", yscale="log", title=s.task)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, s.out / f"features_{s.task}.png")


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    if s.paper and s.task == "digits" == s.data:
        raise SystemExit("--paper --task digits needs --data mnist (or fashion) and --data-root.")
    if "hozog" in s.methods and s.size.batch:
        raise SystemExit("hozog needs full batches: --task shallow or deep.")
    log = RunLog(s.out, f"features_{s.task}", s.resume)
    sizes = {
        "shallow": {"p": s.p},
        "deep": {"samples": s.samples},
        "digits": {"data": s.data, "paper": s.paper},
    }[s.task]
    common = {"outer_steps": s.size.outer_steps, "outer_lr": s.size.outer_lr}
    for seed in s.seeds:
        for method in s.methods:
            factors = {"task": s.task, "method": method, "seed": seed}
            factors |= sizes | common | {"directions": s.directions}
            if not log.has(factors):
                log.add(factors, *train(method, seed, s))
    columns = {
        "start": ("outer_loss_start", ".4g"),
        "outer loss": ("outer_loss", ".3g"),
        "test accuracy" if s.task == "digits" else "test loss": ("test", ".3g"),
        "|second|/|direct|": ("second_over_direct", ".2g"),
        "products": ("products", ".0f"),
        "gradients": ("gradients", ".0f"),
        "CPU s": ("cpu_s", ".1f"),
    }
    log.show(("outer_lr", "method"), columns, task=s.task)
    draw(s, log)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
