"""Labelled images for the examples; a loader never falls back on another set in silence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Source = Literal["digits", "mnist", "fashion"]


@dataclass(frozen=True)
class Images:
    """x (n, pixels) in [0, 1], y (n,) class numbers, and how wide an image is."""

    x: Tensor
    y: Tensor
    width: int
    name: str


def load_images(
    source: Source, root: Path | None = None, download: bool = False, train: bool = True
) -> Images:
    """The training images of a set, or its test images.

    Args:
        source: "digits" comes with scikit-learn; "mnist" and "fashion" through torchvision.
        root: torchvision's data folder, needed for the latter two.
        download: fetch the set if it is not there.
        train: whether the training part is wanted; "digits" has none and is given whole.
    """
    if source == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.tensor(digits.data / 16, dtype=torch.float32)
        return Images(x, torch.tensor(digits.target), 8, "scikit-learn digits, 8x8")
    if root is None:
        raise SystemExit(f"--data {source} needs --data-root PATH (and --download the first time).")
    try:
        from torchvision.datasets import MNIST, FashionMNIST
    except ImportError as error:
        raise SystemExit(f"--data {source} needs torchvision: pip install torchvision") from error
    kind = {"mnist": MNIST, "fashion": FashionMNIST}[source]
    try:
        data = kind(str(root), train=train, download=download)
    except RuntimeError as error:
        raise SystemExit(f"{error} Pass --download, or another --data-root.") from error
    return Images(data.data.flatten(1).float() / 255, data.targets, 28, f"{kind.__name__}, 28x28")


def load_train_test(
    source: Source, root: Path | None = None, download: bool = False
) -> tuple[Images, Images]:
    """Training and test images: the set's own split; of "digits" every fifth image is for tests."""
    whole = load_images(source, root, download)
    if source != "digits":
        return whole, load_images(source, root, download, train=False)
    tested = torch.arange(len(whole.y)) % 5 == 4
    train, test = (
        Images(whole.x[chosen], whole.y[chosen], whole.width, whole.name)
        for chosen in (~tested, tested)
    )
    return train, test


@dataclass(frozen=True)
class NoisySplit:
    """A training set with wrong labels, a small clean set, and a test set.

    ``labels`` are the training labels as given, ``truth`` as they should be.
    """

    x: Tensor
    labels: Tensor
    truth: Tensor
    clean_x: Tensor
    clean_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def wrong(self) -> Tensor:
        """(n,) bool: which training labels were replaced."""
        return self.labels != self.truth


def noisy_split(
    images: Images, seed: int, *, train: int, clean_per_class: int, test: int, noise: float
) -> NoisySplit:
    """Three disjoint sets; a ``noise`` part of the training labels becomes another class."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.y), generator=g)
    x, y = images.x[order], images.y[order]
    classes = int(y.max()) + 1
    clean = torch.cat([(y == c).nonzero()[:clean_per_class, 0] for c in range(classes)])
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[clean] = False
    rest_index = rest.nonzero()[:, 0]
    chosen, tested = rest_index[:train], rest_index[train : train + test]
    truth = y[chosen]
    labels = truth.clone()
    wrong = torch.randperm(len(chosen), generator=g)[: round(noise * len(chosen))]
    shift = torch.randint(1, classes, (len(wrong),), generator=g)
    labels[wrong] = (labels[wrong] + shift) % classes
    return NoisySplit(x[chosen], labels, truth, x[clean], y[clean], x[tested], y[tested])
