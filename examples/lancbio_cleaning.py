"""Hyper-cleaning with LancBiO, SubBiO and their rivals, at the published settings.

    python examples/lancbio_cleaning.py
    python examples/lancbio_cleaning.py --data mnist --data-root PATH --seeds 0 1 2
    python examples/lancbio_cleaning.py --data fashion --data-root PATH --inner-lr 0.03
    python examples/lancbio_cleaning.py --data mnist --data-root PATH --seeds 0 1 2 --train 20000 \
        --batch 256 --inner-steps 3 --steps 1000

One weight σ(φᵢ) for each training image, many of them labelled wrong; the inner problem is a linear
softmax model, the outer loss that of clean images. After Yang, Gao & Yuan, "LancBiO", ICLR 2025:
5000 training and 5000 validation images, pixels less .1307 over .3081, .01‖θ‖², full batches, five
inner steps of .1, outer SGD with a rate of 500, which is a tenth of the number of images. The last
command is their run with mini-batches, which takes 5000 steps.

Training, validation and test images are disjoint (in the paper's code the second may hold the
first). The test set is looked at once, at the end of a run. "alone" is the accuracy of a model that
is fitted to its optimum with the learned weights: it shows what the weights are worth without the
steps that led to them. Some rows use no bilevel optimization at all:

    none               all given labels, to the optimum
    none, stopped      the same by gradient descent, with the rate (.05 or .02) and stopped where
                       the validation loss is lowest
    clean alone        the clean validation images, to the optimum
    all together       given labels and clean images in one set
    oracle             the correctly labelled training images alone
    oracle weights     weights 1 and 0 in the objective that the learned ones have
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from _shared.linear_cleaning import BASELINES, Baseline, Cleaning, Task
from _shared.runlog import RunLog
from _shared.single_loop import METHODS, Method, run


@dataclass(frozen=True)
class Settings(Task):
    """Hyper-cleaning with LancBiO and its rivals. A quick look: --steps 5 --train 200."""

    methods: tuple[Method, ...] = METHODS
    """How the linear system is solved; "soba" is the method, "cg-warm-1" one warm CG step."""
    baselines: tuple[Baseline, ...] = BASELINES
    """Rows without bilevel optimization."""
    alone: bool = True
    """Fit the model anew to its optimum with the learned weights."""
    seeds: tuple[int, ...] = (0,)
    """One whole experiment for each."""
    steps: int = 50
    """Outer steps; three times as many for "soba" and "ttsa", with one inner step each. Published:
    3000."""
    inner_steps: int = 5
    """To an outer step."""
    noise: tuple[float, ...] = (0.5, 0.8)
    """Part of the training labels that is replaced by another class."""
    resume: bool = False
    """Go on where a stopped command was; what is in the table of --out is not done again."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of the figure and the tables."""

    @property
    def name(self) -> str:
        return "lancbio_cleaning" if self.batch is None else "lancbio_cleaning_batches"


def measure(problem: Cleaning) -> dict[str, float]:
    """For the curve."""
    return {"validation_loss": problem.whole_val_loss(problem.inner)}


def experiment(s: Settings, log: RunLog, noise: float, seed: int) -> None:
    """All methods on one split."""
    where = {"data": s.data, "noise": noise, "seed": seed}
    problem = Cleaning(s, seed, noise)
    for name in s.baselines:
        if not log.has({"method": name, **where}):
            began = time.process_time()
            theta = problem.baseline(name)
            results = {"validation_loss": problem.whole_val_loss(theta)}
            results |= {"accuracy": problem.accuracy(theta)}
            results |= {"outer_steps": 0, "products": 0, "cpu_s": time.process_time() - began}
            log.add({"method": name, **where}, results)
    for method in s.methods:
        problem = Cleaning(s, seed, noise)
        factors = {"method": method, **where, "outer_lr": problem.outer_lr, "steps": s.steps}
        factors |= {"inner_lr": problem.inner_lr}
        if not log.has(factors):
            torch.manual_seed(seed)  # strategies take their seed here
            look = partial(measure, problem)
            cost, curve = run(problem, method, s.steps, look, inner_steps=s.inner_steps)
            log.add(factors, cost | problem.scores(s.alone), curve)


def draw(s: Settings, log: RunLog) -> None:
    title = f"{s.data}, {s.noise[0]:.0%} of the labels wrong"
    labels = {"residual": "||Av - b||", "validation_loss": "validation loss"}
    log.draw(s.name, labels, title, data=s.data, noise=s.noise[0])


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    log = RunLog(s.out, s.name, s.resume)
    for noise in s.noise:
        for seed in s.seeds:
            experiment(s, log, noise, seed)
    columns = {
        "test accuracy": ("accuracy", ".4f"),
        "alone": ("accuracy_alone", ".4f"),
        "validation loss": ("validation_loss", ".4f"),
        "||Av - b||": ("residual", ".2g"),
        "products": ("products", ".0f"),
        "CPU s": ("cpu_s", ".1f"),
    }
    log.show(("noise", "inner_lr", "outer_steps", "method"), columns, data=s.data)
    draw(s, log)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
