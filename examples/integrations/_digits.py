"""What the programs here share: digits with wrong labels, a small network, a weight a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

losses = nn.CrossEntropyLoss(reduction="none")


@dataclass(frozen=True)
class Digits:
    """Training samples (x, y, number), of which 40% have a wrong y; clean ones beside them."""

    train: TensorDataset
    wrong: Tensor
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def batches(self, size: int = 64) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled by a generator of its own, so that every program sees the same ones."""
        g = torch.Generator().manual_seed(0)
        return DataLoader(self.train, size, shuffle=True, generator=g)


def noisy_digits(n: int = 768) -> Digits:
    """n training samples, 200 for validation, the rest of the 1797 for tests."""
    data, g = load_digits(), torch.Generator().manual_seed(0)
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=g)
    x, y = x[order], y[order]
    wrong = torch.rand(n, generator=g) < 0.4
    labels = torch.where(wrong, (y[:n] + torch.randint(1, 10, (n,), generator=g)) % 10, y[:n])
    train = TensorDataset(x[:n], labels, torch.arange(n))
    return Digits(train, wrong, (x[n : n + 200], y[n : n + 200]), (x[n + 200 :], y[n + 200 :]))


def network(hidden: int = 16) -> nn.Module:
    """64-hidden-10, always from the same start."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))


class SampleWeights(nn.Module):
    """Outer parameters φ, one a sample: weight 2σ(φ), which is 1 at the start."""

    def __init__(self, samples: int = 768) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.zeros(samples))

    def forward(self, numbers: Tensor) -> Tensor:
        return 2 * self.phi[numbers].sigmoid()


def mean_loss(net: nn.Module, data: Sequence[Tensor]) -> Tensor:
    """Of all samples; scalar."""
    return F.cross_entropy(net(data[0]), data[1])


def print_result(net: nn.Module, digits: Digits, history: Sequence[Tensor]) -> None:
    """The validation loss at both ends, and the accuracy on the test samples."""
    with torch.no_grad():
        right = (net(digits.test[0]).argmax(1) == digits.test[1]).float().mean()
    print(f"validation loss, first step   {float(history[0]):.3f}")
    print(f"validation loss, last step    {float(history[-1]):.3f}")
    print(f"test accuracy                 {float(right):.3f}")
