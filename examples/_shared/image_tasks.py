"""Two bilevel tasks on images: weights for training images, and images learned from nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperopt_torch import PerSample

from .data import Images, noisy_split


class Weights:
    """Cleaning: the inner problem takes mini-batches of noisy images, weighted by σ(φ_i).

    φ is ``learned``, (train,). The outer loss is that of all clean images.
    """

    def __init__(
        self, images: Images, test: Images, seed: int, *, train: int, clean_per_class: int,
        noise: float, batch: int, penalty: float,
    ) -> None:  # fmt: skip
        self.split = noisy_split(
            images, seed, train=train, clean_per_class=clean_per_class, test=0, noise=noise
        )
        self.val, self.test = (self.split.clean_x, self.split.clean_y), (test.x, test.y)
        self.batch, self.penalty = batch, penalty
        self.model = nn.Linear(images.x.shape[1], 10)
        self.learned = nn.Parameter(torch.zeros(train))
        self.draws = torch.Generator().manual_seed(seed)

    def begin(self) -> None:
        """The model goes on from where it was."""

    def next_batch(self) -> None:
        self.chosen = torch.randint(len(self.learned), (self.batch,), generator=self.draws)

    def train_loss(self) -> tuple[PerSample, Tensor]:
        outputs = self.model(self.split.x[self.chosen])
        losses = F.cross_entropy(outputs, self.split.labels[self.chosen], reduction="none")
        penalty = self.penalty * sum(p.square().sum() for p in self.model.parameters())
        return PerSample(losses, self.learned[self.chosen].sigmoid(), penalty), outputs

    def val_loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.val[0]), self.val[1])


class Distilled:
    """Distillation: the inner problem takes the five learned images a class, all of them.

    φ is ``learned``, (50, pixels). The outer loss is that of a batch of real training images.
    Pixels are less their mean, over their deviation.
    """

    def __init__(
        self, images: Images, test: Images, seed: int, *, train: int, batch: int, real: bool
    ) -> None:
        center, width = images.x.mean(), images.x.std()
        self.batch, self.draws = batch, torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images.y), generator=self.draws)[:train]
        x, y = (images.x[order] - center) / width, images.y[order]
        self.val, self.test = (x, y), ((test.x - center) / width, test.y)
        self.model = nn.Linear(x.shape[1], 10)
        self.first = [p.detach().clone() for p in self.model.parameters()]
        of_class = [x[y == c][:5] for c in range(10)]
        start = torch.cat(of_class) if real else torch.randn(50, x.shape[1])
        self.learned, self.labels = nn.Parameter(start), torch.arange(10).repeat_interleave(5)

    def begin(self) -> None:
        """The model goes back to its fixed start."""
        with torch.no_grad():
            for p, value in zip(self.model.parameters(), self.first, strict=True):
                p.copy_(value)

    def next_batch(self) -> None:
        """Every inner step sees all fifty images."""

    def train_loss(self) -> tuple[Tensor, Tensor]:
        # The mean of the losses is meant. One by one they serve NHGD, the outputs Gauss-Newton.
        outputs = self.model(self.learned)
        return F.cross_entropy(outputs, self.labels, reduction="none"), outputs

    def val_loss(self) -> Tensor:
        chosen = torch.randint(len(self.val[1]), (self.batch,), generator=self.draws)
        return F.cross_entropy(self.model(self.val[0][chosen]), self.val[1][chosen])
