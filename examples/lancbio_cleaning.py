"""Hyper-cleaning with LancBiO, SubBiO and their rivals, at the published settings.

    python examples/lancbio_cleaning.py
    python examples/lancbio_cleaning.py --data mnist --data-root PATH --seeds 0 1 2

One weight σ(φᵢ) for each training image, many of them labelled wrong; the inner problem is a linear
softmax model, the outer loss that of clean images. After Yang, Gao & Yuan, "LancBiO", ICLR 2025:
5000 training and 5000 validation images, pixels less .1307 over .3081, .01‖θ‖², full batches, five
inner steps of .1, outer SGD with a rate of 500, which is a tenth of the number of images.

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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from _shared.data import Source, load_train_test, noisy_split
from _shared.runlog import RunLog
from _shared.single_loop import METHODS, Method, Scale, run
from torch import Tensor, nn

MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's pixels; the public code has them for every set
PENALTY = 0.01  # λ of λ‖θ‖²


@dataclass(frozen=True)
class Settings:
    """Hyper-cleaning with LancBiO and its rivals. A quick look: --steps 5 --train 200."""

    methods: tuple[Method, ...] = METHODS
    """How the linear system is solved; "soba" is the method, "cg-warm-1" one warm CG step."""
    seeds: tuple[int, ...] = (0,)
    """One whole experiment for each."""
    steps: int = 50
    """Outer steps; three times as many for "soba", with one inner step each. Published: 3000."""
    data: Source = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of the other sets."""
    download: bool = False
    """Fetch the image set if it is not there."""
    noise: tuple[float, ...] = (0.5, 0.8)
    """Part of the training labels that is replaced by another class."""
    train: int = 5000
    """Training images, at most; "digits" has 700 for them."""
    clean: int = 5000
    """Validation images, a tenth of each class, at most; "digits" has 600."""
    outer_lr: float | None = None
    """None: a tenth of the training images, so 500 as published."""
    resume: bool = False
    """Go on where a stopped command was; what is in the table of --out is not done again."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of the figure and the tables."""


class Cleaning(nn.Module):
    inner_lr = 0.1
    scale = Scale(subspace=10, step=0.05, subbio=0.05, damping=0.02)

    def __init__(self, s: Settings, seed: int, noise: float) -> None:
        super().__init__()
        images, test = load_train_test(s.data, s.data_root, s.download)
        train, clean = (700, 600) if s.data == "digits" else (s.train, s.clean)
        train, clean = min(train, s.train), min(clean, s.clean)
        split = noisy_split(
            images, seed, train=train, clean_per_class=clean // 10, test=0, noise=noise
        )
        self.wrong, self.labels, self.clean_y, self.test_y = (
            *(split.wrong, split.labels, split.clean_y, test.y),
        )
        self.x, self.clean_x, self.test_x = (
            (x - MEAN) / DEVIATION for x in (split.x, split.clean_x, test.x)
        )
        self.inner = nn.Parameter(torch.zeros(10, images.x.shape[1] + 1))  # bias last
        self.outer = nn.Parameter(torch.zeros(train))
        self.outer_lr = s.outer_lr or 0.1 * train

    def train_loss(self) -> Tensor:
        return objective(self.inner, self.x, self.labels, self.outer.sigmoid())

    def val_loss(self) -> Tensor:
        return F.cross_entropy(logits(self.inner, self.clean_x), self.clean_y)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.outer], lr=self.outer_lr)

    def accuracy(self, theta: Tensor) -> float:
        guess = logits(theta.detach(), self.test_x).argmax(1)
        return (guess == self.test_y).float().mean().item()

    def scores(self) -> dict[str, float]:
        """At the end of a run."""
        weights = self.outer.detach().sigmoid()
        alone = fitted(self.x, self.labels, weights)
        return {
            "validation_loss": self.val_loss().item(),
            "accuracy": self.accuracy(self.inner),
            "accuracy_alone": self.accuracy(alone),
            "weight_correct": weights[~self.wrong].mean().item(),
            "weight_wrong": weights[self.wrong].mean().item(),
        }

    def baselines(self) -> Iterator[tuple[str, Tensor]]:
        """Names and heads of models without learned weights."""
        right = ~self.wrong
        yield "none", fitted(self.x, self.labels)
        yield "none, stopped", self.stopped()
        yield "clean alone", fitted(self.clean_x, self.clean_y)
        both = torch.cat([self.x, self.clean_x]), torch.cat([self.labels, self.clean_y])
        yield "all together", fitted(*both)
        yield "oracle", fitted(self.x[right], self.labels[right])
        yield "oracle weights", fitted(self.x, self.labels, right.float())

    def stopped(self, steps: int = 150) -> Tensor:
        """Plain gradient descent on the given labels, where the validation loss is lowest."""
        best, lowest = torch.zeros_like(self.inner), float("inf")
        for lr in (0.05, 0.02):  # at .1 it oscillates: weights of 1 make twice the curvature
            theta = torch.zeros_like(self.inner, requires_grad=True)
            for _ in range(steps):
                (g,) = torch.autograd.grad(objective(theta, self.x, self.labels), theta)
                theta.data -= lr * g
                loss = F.cross_entropy(logits(theta.detach(), self.clean_x), self.clean_y).item()
                if loss < lowest:
                    best, lowest = theta.detach().clone(), loss
        return best


def logits(theta: Tensor, x: Tensor) -> Tensor:
    return x @ theta[:, :-1].T + theta[:, -1]


def objective(theta: Tensor, x: Tensor, y: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    losses = F.cross_entropy(logits(theta, x), y, reduction="none")
    return (weights * losses).mean() + PENALTY * theta.square().sum()


def fitted(x: Tensor, y: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """The inner problem from scratch, to its optimum."""
    theta = torch.zeros(10, x.shape[1] + 1, requires_grad=True)
    lbfgs = torch.optim.LBFGS(
        [theta], max_iter=100, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = objective(theta, x, y, weights)
        loss.backward()
        return loss

    lbfgs.step(closure)
    return theta.detach()


def measure(problem: Cleaning) -> dict[str, float]:
    """For the curve."""
    return {"validation_loss": problem.val_loss().item()}


def experiment(s: Settings, log: RunLog, noise: float, seed: int) -> None:
    """All methods on one split."""
    where = {"data": s.data, "noise": noise, "seed": seed}
    if not log.has({"method": "oracle weights", **where}):
        problem, began = Cleaning(s, seed, noise), time.process_time()
        for name, theta in problem.baselines():
            loss = F.cross_entropy(logits(theta, problem.clean_x), problem.clean_y).item()
            results = {"validation_loss": loss, "accuracy": problem.accuracy(theta)}
            results |= {"outer_steps": 0, "products": 0, "cpu_s": time.process_time() - began}
            log.add({"method": name, **where}, results)
            began = time.process_time()
    for method in s.methods:
        problem = Cleaning(s, seed, noise)
        factors = {"method": method, **where, "outer_lr": problem.outer_lr, "steps": s.steps}
        if not log.has(factors):
            torch.manual_seed(seed)  # strategies take their seed here
            look = partial(measure, problem)
            cost, curve = run(problem, method, s.steps, look)
            log.add(factors, cost | problem.scores(), curve)


def draw(s: Settings, log: RunLog) -> None:
    title = f"{s.data}, {s.noise[0]:.0%} of the labels wrong"
    labels = {"residual": "||Av - b||", "validation_loss": "validation loss"}
    log.draw("lancbio_cleaning", labels, title, data=s.data, noise=s.noise[0])


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    log = RunLog(s.out, "lancbio_cleaning", s.resume)
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
    log.show(("noise", "outer_steps", "method"), columns, data=s.data)
    draw(s, log)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
