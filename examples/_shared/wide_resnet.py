"""Wide residual networks, for 32 x 32 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = channels_in == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        out: Tensor = skip + self.conv2(F.relu(self.bn2(self.conv1(h))))
        return out


class WideResNet(nn.Sequential):
    """WRN-depth-width for 32×32 images (Zagoruyko & Komodakis, 2016)."""

    def __init__(self, depth: int, width: int, classes: int = 10) -> None:
        blocks = (depth - 4) // 6
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
        channels = 16
        for stage, out in enumerate((16 * width, 32 * width, 64 * width)):
            for i in range(blocks):
                layers.append(_Block(channels, out, stride=2 if stage and not i else 1))
                channels = out
        head = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, *head, nn.Linear(channels, classes))
