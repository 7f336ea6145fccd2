"""Problems whose outer parameters are features, and whose inner ones are a linear head on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Images

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A body φ, a head θ, the loss of outputs that both levels share, and three sets of data."""

    body: nn.Module
    head: nn.Linear
    loss: Callable[[Tensor, Tensor], Tensor]
    test_score: Callable[[Tensor, Tensor], Tensor]
    train: Data
    val: Data
    test: Data


def gaussian(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight)
    return layer


def regression(deep: bool, p: int, d: int, n: int) -> Problem:
    """½ mean (w·h(x) - y)² with w = θ and the features h of φ; N(0, 1) data with noise of .1.

    p inputs, d features, n samples of each set; ``deep``: sigmoids, 512 units between p and d.
    """

    def body() -> nn.Module:
        if not deep:
            return gaussian(p, d)
        return nn.Sequential(gaussian(p, 512), nn.Sigmoid(), gaussian(512, d), nn.Sigmoid())

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs.squeeze(1) - y).square().mean() / 2

    truth = nn.Sequential(body(), gaussian(d, 1))
    sets = []
    for _ in range(3):
        x = torch.randn(n, p)
        sets.append((x, truth(x).detach().squeeze(1) + 0.1 * torch.randn(n)))
    return Problem(body(), gaussian(d, 1), loss, loss, *sets)


def classification(images: Images, tested: Images, draws: torch.Generator) -> Problem:
    """Ten classes; half of the training images fit the head, the other half judges it."""
    width = images.width
    body = nn.Sequential(
        nn.Unflatten(1, (1, width, width)),
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    )
    head = nn.Linear(16 * (width // 4) ** 2, 10)

    def accuracy(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs.argmax(1) == y).float().mean()

    halves = torch.randperm(len(images.y), generator=draws).chunk(2)
    train, val = ((images.x[half], images.y[half]) for half in halves)
    return Problem(body, head, F.cross_entropy, accuracy, train, val, (tested.x, tested.y))


class Residual(nn.Module):
    """A block of ResNet-12: three convolutions, a shortcut, pooling."""

    def __init__(self, inputs: int, channels: int, pool: int) -> None:
        super().__init__()

        def convolution(inputs: int, width: int) -> list[nn.Module]:
            norm = nn.BatchNorm2d(channels, track_running_stats=False)
            return [nn.Conv2d(inputs, channels, width, padding=width // 2, bias=False), norm]

        self.main = nn.Sequential(
            *(*convolution(inputs, 3), nn.LeakyReLU(0.1)),
            *(*convolution(channels, 3), nn.LeakyReLU(0.1)),
            *convolution(channels, 3),
        )
        self.shortcut = nn.Sequential(*convolution(inputs, 1))
        self.pool = nn.MaxPool2d(pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.leaky_relu(self.main(x) + self.shortcut(x), 0.1))


class FewShotNet(nn.Module):
    """A body φ of four blocks for images of ``width``, and a head θ for the task at hand.

    Args:
        backbone: "conv4", four convolutions with pooling; "strided", the same with strides in
            place of it, at a quarter of the cost; "resnet12".
        channels: of each convolution, or of the first block of resnet12.
        ways: classes of a task.
        width: of the images.
    """

    def __init__(self, backbone: str, channels: int, ways: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, first = 1, channels
        for block in range(4):
            pool = 2 if width > 1 else 1
            if backbone == "resnet12":
                channels = first * 2**block
                layers.append(Residual(inputs, channels, pool))
            else:
                stride = pool if backbone == "strided" else 1
                norm = nn.BatchNorm2d(channels, track_running_stats=False)
                conv = nn.Conv2d(inputs, channels, 3, stride, padding=1)
                layers += [conv, norm, nn.ReLU(), nn.MaxPool2d(pool // stride)]
            inputs, width = channels, width // pool
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, ways)
        self.first = nn.Linear(channels, ways)  # where the head of every task starts
        for p in self.first.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))
