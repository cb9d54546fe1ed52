"""``basic_cnn``: three convolutions and a head, the baseline to beat, grey or colour."""

from __future__ import annotations

import torch
from torch import nn

NUM_FEATURES = 128


class BasicCNN(nn.Module):
    """(n, channels, S, S) to features (n, 128). BatchNorm after each convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer1 = _block(channels, 32)
        self.layer2 = _block(32, 64)
        self.layer3 = _block(64, NUM_FEATURES)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.pool(self.layer3(self.layer2(self.layer1(images))))
        return out.flatten(1)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )
