"""Few-shot tasks: classes that a learner has never seen, a handful of images each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .data import load_images

FewShotSource = Literal["digits", "omniglot"]

# 3, 4 and 7 look like no other digit when they are turned; 6 and 9 must stay on one side.
_TEST_DIGITS = (3, 4, 7)


@dataclass(frozen=True)
class Task:
    """Images (n, 1, width, width) in [0, 1] and their class numbers 0 ... ways - 1.

    Of a batch of tasks, each with one more dimension in front.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


@dataclass(frozen=True)
class ClassPool:
    """Classes to draw tasks from; ``images[c]`` is (n_c, width, width), uint8."""

    images: list[Tensor]

    def task(self, ways: int, shots: int, queries: int, generator: torch.Generator) -> Task:
        """Distinct classes, and of each distinct images for support and query."""
        support, query = [], []
        for c in torch.randperm(len(self.images), generator=generator)[:ways].tolist():
            order = torch.randperm(len(self.images[c]), generator=generator)[: shots + queries]
            chosen = self.images[c][order].unsqueeze(1).float() / 255
            support.append(chosen[:shots])
            query.append(chosen[shots:])
        y = torch.arange(ways)
        return Task(
            torch.cat(support), y.repeat_interleave(shots), torch.cat(query),
            y.repeat_interleave(queries),
        )  # fmt: skip

    def tasks(
        self, number: int, ways: int, shots: int, queries: int, generator: torch.Generator
    ) -> Task:
        """So many draws of ``task``, as a batch."""
        drawn = [self.task(ways, shots, queries, generator) for _ in range(number)]
        parts = zip(*((t.support_x, t.support_y, t.query_x, t.query_y) for t in drawn), strict=True)
        return Task(*(torch.stack(part) for part in parts))


@dataclass(frozen=True)
class FewShot:
    """Three pools that share no image; the test classes occur in no other pool."""

    train: ClassPool
    val: ClassPool
    test: ClassPool
    width: int
    name: str

    def check(self, ways: int, images: int) -> None:
        """Says so where a task of ``ways`` classes with ``images`` of each cannot be drawn."""
        for part in ("train", "val", "test"):
            pool = getattr(self, part).images
            if ways > len(pool):
                raise SystemExit(f"--ways {ways}: only {len(pool)} {part} classes in {self.name}.")
            smallest = min(len(x) for x in pool)
            if images > smallest:
                raise SystemExit(
                    f"shots + queries = {images}: a {part} class of {self.name} has only "
                    f"{smallest} images."
                )


def network(
    ways: int, channels: int, width: int, *, strided: bool = False, norm: str = "batch"
) -> nn.Sequential:
    """Four convolutions and a linear head, for images (n, 1, width, width).

    Args:
        strided: convolutions of stride two, which cost a quarter; otherwise pooling after each.
        norm: "batch", statistics over the images shown together, or "group", over the channels of
            each.
    """
    layers: list[nn.Module] = []
    inputs = 1
    for _ in range(4):
        stride = 2 if strided and width > 1 else 1
        layers.append(nn.Conv2d(inputs, channels, 3, stride=stride, padding=1))
        layers.append(
            nn.BatchNorm2d(channels, track_running_stats=False)
            if norm == "batch"
            else nn.GroupNorm(4, channels)
        )
        layers.append(nn.ReLU())
        if strided:
            width = (width + 1) // 2
        elif width > 1:
            layers.append(nn.MaxPool2d(2))
            width //= 2
        inputs = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * width**2, ways))


def load_few_shot(source: FewShotSource, root: Path | None = None) -> FewShot:
    """Classes with their four rotations as classes of their own.

    Args:
        source: "digits" comes with scikit-learn; "omniglot" is read from ``root``.
        root: a folder with ``omniglot28.npz`` and ``omniglot_splits/{train,val,test}.txt``.
    """
    return _digits() if source == "digits" else _omniglot(root)


def _digits() -> FewShot:
    """Seven digits for training, three for tests; every fourth image of the seven validates."""
    data = load_images("digits")
    x = (data.x * 255).round().to(torch.uint8).view(-1, data.width, data.width)
    pools: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
    for digit in range(10):
        images = x[data.y == digit]
        held_out = torch.arange(len(images)) % 4 == 3
        for turns in range(4):
            turned = images.rot90(turns, (1, 2))
            if digit in _TEST_DIGITS:
                pools["test"].append(turned)
            else:
                pools["train"].append(turned[~held_out])
                pools["val"].append(turned[held_out])
    name = f"{data.name}, with rotations"
    return FewShot(*(ClassPool(pools[p]) for p in ("train", "val", "test")), data.width, name)


def _omniglot(root: Path | None) -> FewShot:
    if root is None:
        raise SystemExit("--data omniglot needs --data-root PATH.")
    arrays, splits = root / "omniglot28.npz", root / "omniglot_splits"
    missing = [p for p in (arrays, *(splits / f"{n}.txt" for n in ("train", "val", "test")))
               if not p.exists()]  # fmt: skip
    if missing:
        raise SystemExit(
            f"{', '.join(map(str, missing))} not found. --data omniglot needs, in --data-root:\n"
            "  omniglot28.npz with x_background (19280, 28, 28) and x_evaluation (13180, 28, 28),\n"
            "    uint8, 255 = ink; label_* (n,), numbers into classes_*, 'Alphabet/characterNN'\n"
            "  omniglot_splits/train.txt, val.txt, test.txt: one 'Alphabet/characterNN/rotRRR'\n"
            "    a line, RRR = 000, 090, 180, 270"
        )
    import numpy as np

    characters: dict[str, Tensor] = {}
    with np.load(arrays) as file:
        for part in ("background", "evaluation"):
            x, label = torch.from_numpy(file[f"x_{part}"]), torch.from_numpy(file[f"label_{part}"])
            for number, name in enumerate(file[f"classes_{part}"].tolist()):
                characters[name] = x[label == number]
    lines = {n: (splits / f"{n}.txt").read_text().split() for n in ("train", "val", "test")}

    def pool(name: str) -> ClassPool:
        images = []
        for line in lines[name]:
            character, turn = line.rsplit("/rot", 1)
            images.append(characters[character].rot90(int(turn) // 90, (1, 2)))
        return ClassPool(images)

    return FewShot(pool("train"), pool("val"), pool("test"), 28, "Omniglot, 28x28, with rotations")
