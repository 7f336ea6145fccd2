"""Hyper-cleaning with a linear model, as LancBiO's paper has it, and what does without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Source, load_train_test, noisy_split
from .single_loop import Scale

MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's pixels; the public code has them for every set
PENALTY = 0.01  # λ of λ‖θ‖²

Baseline = Literal[
    "none", "none, stopped", "clean alone", "all together", "oracle", "oracle weights"
]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)


@dataclass(frozen=True)
class Task:
    """Which images, how many, and in what batches."""

    data: Source = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of the other sets."""
    download: bool = False
    """Fetch the image set if it is not there."""
    train: int = 5000
    """Training images, at most; "digits" has 700 for them."""
    clean: int = 5000
    """Validation images, a tenth of each class, at most; "digits" has 600."""
    batch: int | None = None
    """Images in a batch of each set; None: all of them. Published: 256 of 20000, 3 inner steps."""
    inner_lr: float | None = None
    """None: .1 as published, with --batch .05, to which it is halved on the way there. Otherwise η
    of SOBA, SubBiO and the like, .05 as published, becomes half of it."""
    outer_lr: float | None = None
    """None: a tenth of the training images, so 500 as published; 100 as published with --batch."""


class Cleaning(nn.Module):
    """One weight σ(φᵢ) for each training image; the outer loss is that of clean images."""

    def __init__(self, task: Task, seed: int, noise: float) -> None:
        super().__init__()
        images, test = load_train_test(task.data, task.data_root, task.download)
        train, clean = (700, 600) if task.data == "digits" else (task.train, task.clean)
        train, clean = min(train, task.train), min(clean, task.clean)
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
        self.noisy = task.batch is not None
        self.inner_lr = task.inner_lr or (0.05 if self.noisy else 0.1)
        eta = 0.5 * task.inner_lr if task.inner_lr else 0.05
        self.scale = Scale(
            subspace=10,
            growth=(1.3, 5),  # in 50 steps as far as the published schedule, every 50, in 500
            step=eta,
            subbio=eta,
            damping=0.02,
            rates={"ttsa": 10.0, "bsa": 3.0, "f2sa": 10.0},  # from 25 steps with seed 100 of MNIST
        )
        self.outer_lr = task.outer_lr or (100.0 if self.noisy else 0.1 * train)
        self._size, self._stream = task.batch, torch.Generator().manual_seed(seed)
        self.draw()

    def draw(self) -> None:
        self.batch, self.clean_batch = (
            torch.randint(len(x), (self._size,), generator=self._stream) if self._size else ...
            for x in (self.x, self.clean_x)
        )

    def train_loss(self) -> Tensor:
        i = self.batch
        return objective(self.inner, self.x[i], self.labels[i], self.outer.sigmoid()[i])

    def val_loss(self) -> Tensor:
        i = self.clean_batch
        return F.cross_entropy(logits(self.inner, self.clean_x[i]), self.clean_y[i])

    def whole_val_loss(self, theta: Tensor) -> float:
        return F.cross_entropy(logits(theta.detach(), self.clean_x), self.clean_y).item()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.outer], lr=self.outer_lr)

    def accuracy(self, theta: Tensor) -> float:
        guess = logits(theta.detach(), self.test_x).argmax(1)
        return (guess == self.test_y).float().mean().item()

    def scores(self, refit: bool) -> dict[str, float]:
        """At the end of a run."""
        weights = self.outer.detach().sigmoid()
        found = {
            "validation_loss": self.whole_val_loss(self.inner),
            "accuracy": self.accuracy(self.inner),
            "weight_correct": weights[~self.wrong].mean().item(),
            "weight_wrong": weights[self.wrong].mean().item(),
        }
        if refit:
            found["accuracy_alone"] = self.accuracy(fitted(self.x, self.labels, weights))
        return found

    def baseline(self, name: Baseline) -> Tensor:
        """The head of a model without learned weights."""
        right = ~self.wrong
        if name == "none":
            return fitted(self.x, self.labels)
        if name == "none, stopped":
            return self.stopped()
        if name == "clean alone":
            return fitted(self.clean_x, self.clean_y)
        if name == "oracle":
            return fitted(self.x[right], self.labels[right])
        if name == "oracle weights":
            return fitted(self.x, self.labels, right.float())
        return fitted(torch.cat([self.x, self.clean_x]), torch.cat([self.labels, self.clean_y]))

    def stopped(self, steps: int = 150) -> Tensor:
        """Plain gradient descent on the given labels, where the validation loss is lowest."""
        best, lowest = torch.zeros_like(self.inner), float("inf")
        for lr in (0.05, 0.02):  # at .1 it oscillates: weights of 1 make twice the curvature
            theta = torch.zeros_like(self.inner, requires_grad=True)
            for _ in range(steps):
                (g,) = torch.autograd.grad(objective(theta, self.x, self.labels), theta)
                theta.data -= lr * g
                loss = self.whole_val_loss(theta)
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
