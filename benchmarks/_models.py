"""Networks to measure on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples._shared.wide_resnet import WideResNet


def wide_resnet_problem(
    depth: int = 16, width: int = 2, batch: int = 16, seed: int = 0
) -> tuple[nn.Module, nn.Parameter, Callable[[], Tensor], Callable[[], Tensor]]:
    """A WRN, one batch for each level, and a learned weight for each training sample."""
    torch.manual_seed(seed)
    model = WideResNet(depth, width)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    xv, yv = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    weights = nn.Parameter(torch.zeros(batch))

    def train_loss() -> Tensor:
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (weights.sigmoid() * losses).mean()

    def val_loss() -> Tensor:
        return F.cross_entropy(model(xv), yv)

    return model, weights, train_loss, val_loss
