"""Few-shot learning on cached features: the body that makes them, heads, draws of tasks."""

from __future__ import annotations

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from .fewshot import ClassPool

HEAD_STEPS = 60  # of the inner solver
TEST_QUERIES = 15  # images of each class that a test task asks for, at most


class Body(nn.Module):
    """Images (n, 1, width, width) to features (n, d): four convolutions of stride two."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for _ in range(4):
            conv = nn.Conv2d(inputs, channels, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            inputs, width = channels, (width + 1) // 2
        self.size = channels * width**2
        self.layers = nn.Sequential(*layers, nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) / sqrt(self.size)  # lengths near one, so that λ means the same


def labels(images: int, ways: int) -> Tensor:
    """(images,): 0 0 0 1 1 1 ..., as ``draw_tasks`` orders them."""
    return torch.arange(ways).repeat_interleave(images // ways)


def fit_head(shown: Tensor, ways: int, penalty: float) -> Tensor:
    """The minimum of ``inner_loss``, (d, ways), by Nesterov's method.

    The optimum is a combination of the shown features (n, d): its coefficients (n, ways) are
    iterated, on their Gram matrix.
    """
    gram, onehot = shown @ shown.mT, F.one_hot(labels(len(shown), ways)).float()
    steepest = gram.diagonal().mean() / 2 + penalty  # bounds the largest curvature
    root = (penalty / steepest).sqrt()
    a = ahead = torch.zeros_like(onehot)
    for _ in range(HEAD_STEPS):
        slope = ((gram @ ahead).softmax(1) - onehot) / len(shown) + penalty * ahead
        new = ahead - slope / steepest
        a, ahead = new, new + (1 - root) / (1 + root) * (new - a)
    return shown.mT @ a


def prototype_logits(shown: Tensor, asked: Tensor, ways: int) -> Tensor:
    """Minus half the squared distance to each class mean; what all classes share is left out."""
    means = shown.unflatten(0, (ways, -1)).mean(1)
    return asked @ means.mT - means.square().sum(1) / 2


def draw_images(pool: ClassPool, chosen: list[int], each: int, g: torch.Generator) -> Tensor:
    """(classes · each, 1, width, width) in [0, 1], class by class."""
    images = [pool.images[c][torch.randperm(len(pool.images[c]), generator=g)[:each]]
              for c in chosen]  # fmt: skip
    return torch.cat(images).unsqueeze(1).float() / 255


def draw_tasks(
    tasks: int, classes: int, each: int, ways: int, shots: int, queries: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows of shown and of asked images in a batch of ``draw_images``, (tasks, ways · number)."""
    chosen = torch.rand(tasks, classes, generator=g).argsort(1)[:, :ways]
    order = torch.rand(tasks, ways, each, generator=g).argsort(2)[..., : shots + queries]
    rows = chosen.unsqueeze(2) * each + order
    return rows[..., :shots].flatten(1), rows[..., shots:].flatten(1)


@torch.no_grad()
def embed(body: Body, pool: ClassPool, classes: int) -> tuple[Tensor, int]:
    """Features of the first classes of a pool, and the number of images of each."""
    each = min(len(x) for x in pool.images)
    chosen = torch.randperm(len(pool.images), generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(0)
    x = draw_images(pool, chosen[:classes].tolist(), each, g)
    body.eval()
    features = torch.cat([body(part) for part in x.split(500)])
    body.train()
    return features, each


def accuracies(
    features: Tensor, each: int, ways: int, shots: int, tasks: int, penalty: float | None
) -> list[float]:
    """Of each task, by heads of that penalty or, None, by class means; always the same tasks.

    Args:
        features, each: as ``embed`` gives them.
        ways, shots: classes of a task, and images of each that it shows.
        tasks: a multiple of 50, which are looked at together.
    """
    g = torch.Generator().manual_seed(1_000_003)
    queries = min(TEST_QUERIES, each - shots)
    shown, asked = draw_tasks(tasks, len(features) // each, each, ways, shots, queries, g)

    def right(shown: Tensor, asked: Tensor) -> Tensor:
        if penalty is None:
            logits = prototype_logits(shown, asked, ways)
        else:
            logits = asked @ fit_head(shown, ways, penalty)
        return (logits.argmax(1) == labels(len(asked), ways)).float().mean()

    pairs = zip(shown.split(50), asked.split(50), strict=True)
    return torch.cat([vmap(right)(features[a], features[b]) for a, b in pairs]).tolist()
