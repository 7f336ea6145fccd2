"""Bilevel runs to measure strategies along: hyper-cleaning at points of one fixed trajectory."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hyperopt_torch import Curvature, Hessian, PerSample


@dataclass(frozen=True)
class Setting:
    """One problem and how fast it drifts.

    Attributes:
        name: row label.
        data: "digits", or the root of a torchvision-style MNIST folder.
        hidden: units of the tanh layer; 0 for a linear softmax model.
        samples: in the training set, and in the validation set.
        penalty: coefficient of ‖θ‖² in the training loss.
        damping: ρ.
        curvature: what stands for H.
        outer_lr: of Adam on the sample weights; sets the drift.
        inner_steps: between two outer steps; ``inner_lr``, momentum 0.9, full batch.
        batch: samples of the curvature that strategies see, drawn anew at every outer step; 0: all.
        batch_damping: ρ of the strategies then, larger for the noise in the curvature.
    """

    name: str
    data: str = "digits"
    hidden: int = 0
    samples: int = 800
    penalty: float = 1e-2
    damping: float = 0.0
    curvature: Callable[[], Curvature] = Hessian
    outer_lr: float = 0.01
    inner_lr: float = 0.5
    inner_steps: int = 20
    batch: int = 0
    batch_damping: float = 0.0


class Cleaning:
    """Softmax cross-entropy weighted by σ(φ_i), 40% of the training labels wrong."""

    def __init__(self, setting: Setting, seed: int, dtype: torch.dtype) -> None:
        self.setting = setting
        x, y = images(setting.data)
        g = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(x), generator=g)[: 2 * setting.samples]
        x, y = x[chosen].to(dtype), y[chosen]
        n = setting.samples
        self.x, self.xv, self.yv, self.y = x[:n], x[n:], y[n:], y[:n].clone()
        wrong = torch.rand(n, generator=g) < 0.4
        shift = torch.randint(1, 10, (int(wrong.sum()),), generator=g)
        self.y[wrong] = (self.y[wrong] + shift) % 10
        self.model = _model(x.shape[1], setting.hidden, seed).to(dtype)
        self.weights = nn.Parameter(torch.zeros(n, dtype=dtype))
        self.generator = g  # of the batches, from here on

    def train_loss(self, chosen: Tensor | slice = slice(None)) -> tuple[PerSample, Tensor]:
        outputs = self.model(self.x[chosen])
        losses = F.cross_entropy(outputs, self.y[chosen], reduction="none")
        penalty = sum(p.square().sum() for p in self.model.parameters()) * self.setting.penalty
        return PerSample(losses, self.weights[chosen].sigmoid(), penalty), outputs

    def val_loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.xv), self.yv)

    def copy_from(self, other: Cleaning) -> None:
        mine, theirs = (
            [*self.model.parameters(), self.weights],
            [
                *other.model.parameters(),
                other.weights,
            ],
        )
        with torch.no_grad():
            for p, q in zip(mine, theirs, strict=True):
                p.copy_(q)


def _model(inputs: int, hidden: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if not hidden:
        linear = nn.Linear(inputs, 10)
        nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
        return linear
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 10))


def images(data: str, split: str = "train") -> tuple[Tensor, Tensor]:
    """Images (n, d) in [0, 1] and labels (n,); the split "train" or "t10k" of a MNIST folder."""
    if data == "digits":
        digits = load_digits()
        return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    images = _idx(Path(data), f"{split}-images-idx3-ubyte", header=16).reshape(-1, 784)
    return images.float() / 255, _idx(Path(data), f"{split}-labels-idx1-ubyte", header=8).long()


def _idx(root: Path, name: str, header: int) -> Tensor:
    path = root / "MNIST" / "raw" / name
    raw = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)[header:]
